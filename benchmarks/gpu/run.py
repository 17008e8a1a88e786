"""A whole run on one GPU that teacher and student share, beside distillation in one process (row 5).

`python -m benchmarks.gpu.run TEACHER STUDENT SIZE` prints a figure as JSON. Ours is the real command: the trainer,
which starts the teacher's server beside it; FunMatch's views, the same for both; every batch answered over gRPC. Beside
it the same pair in kd_loop.py, over the same pictures with as many rows a step. One after the other, not in
turns: each takes most of a minute to come up. Median images/s of the steps after the first ones.

Rejected: to stop one process while the other has its turn. A run that is stopped takes its teacher for hung.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import models
from benchmarks import photographs
from benchmarks.figure import Figure
from benchmarks.gpu.forward import random_bit
from models import ModelCard

_ROOT = Path(__file__).resolve().parents[2]
_RECIPE = "imagenet/funmatch/30"
_HALF = (0.5, 0.5, 0.5)


def measure(
    teacher: str, student: str, size: int, device: str, *, num_rows: int = 256, steps: int = 60, warm: int = 20,
    num_pictures: int = 256,
) -> Iterator[Figure]:  # fmt: skip
    """The figure, from two runs of so many steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = photographs.prepared(folder, num_pictures)
        card = ModelCard(
            architecture=teacher, num_classes=len(index.classes), size=size, mean=_HALF, std=_HALF, data_set=index.name
        )
        models.save(folder / "teacher.safetensors", random_bit(teacher, card.num_classes), card)
        ours = _ours(folder, index.root, student, size, device, num_rows, steps * num_rows / len(index))[warm:]
        theirs = _theirs(
            str(folder / "pictures" / "train"),
            teacher,
            student,
            *map(str, (size, num_rows, steps)),
            f"--device={device}",
        )[warm:]
    value, alternative = statistics.median(ours), statistics.median(theirs)
    yield dataclasses.replace(
        unmeasured(teacher, student, size, ""), value=value, alternative=alternative, judged=value / alternative,
        note=f"{len(ours)} steps of {num_rows} rows each, after {warm}; JPEGs of {photographs.WIDTH} x "
        f"{photographs.HEIGHT}; ours has two views of a picture to decode (the student's and the teacher's), they one; "
        "the teacher passed its gate",
    )  # fmt: skip


def unmeasured(teacher: str, student: str, size: int, why: str) -> Figure:
    """The row of the table without its numbers."""
    return Figure(
        row="5", name=f"whole run on one GPU, {teacher} teaches {student} at {size}", value=None, unit="images/s",
        beside="in one process, as timm's train.py with --kd-model-name", goal=(">=", 1.0), note=why,
    )  # fmt: skip


def _ours(folder: Path, data: Path, student: str, size: int, device: str, num_rows: int, epochs: float) -> list[float]:
    command = [
        sys.executable, "student_trainer/main.py", f"--recipe={_RECIPE}", f"--data={data}", "--data.evaluate=train",
        f"--run-dir={folder / 'run'}", f"--teacher.model={folder / 'teacher.safetensors'}", f"--device={device}",
        f"--student.architecture={student}", f"--student.size={size}", f"--optim.batch-size={num_rows}",
        f"--optim.epochs={epochs}", "--optim.warmup-steps=1", "--evaluate-every=0", "--log-every=1",
        f"--decode-threads={max(1, len(os.sched_getaffinity(0)) // 2)}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=_ROOT, stdout=sys.stderr, check=False)
    if done.returncode:
        log = folder / "run" / "teacher.log"
        raise RuntimeError(f"our run failed. Its teacher's log:\n{log.read_text()[-3000:] if log.exists() else 'none'}")
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line["images_per_s"] for line in lines if "images_per_s" in line]


def _theirs(*arguments: str) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.gpu.kd_loop", *arguments]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def main() -> None:
    """Print the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="resnetv2_152x2_bit")
    parser.add_argument("student", help="resnetv2_50x1_bit")
    parser.add_argument("size", type=int, help="pixels a side")
    parser.add_argument("--quick", action="store_true", help="six steps of 32 rows")
    asked = parser.parse_args()
    length = {"num_rows": 32, "steps": 6, "warm": 2} if asked.quick else {}
    for one in measure(asked.teacher, asked.student, asked.size, "cuda", **length):
        print(json.dumps(dataclasses.asdict(one)), flush=True)


if __name__ == "__main__":
    main()
