"""The consistency study (paper, section 3.1, figure 3), small: one teacher, one student, equal budgets, eight settings.

    python -m benchmarks.study --data data/flowers102 --teacher teacher/model.safetensors --out runs/study

runs every view setting with every seed as a run of its own, `--jobs` at a time beside one teacher server, and draws
OUT/study.png and OUT/study.md. Started again it goes on: finished runs stay, an interrupted one continues from its
checkpoint. What follows `--` goes to every run: `-- --optim.epochs 300`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from views.setting import SETTINGS

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What to compare."""

    data: Path
    """Prepared Flowers102."""
    teacher: Path
    """The teacher's weights (.safetensors)."""
    out: Path = Path("runs/study")
    """Runs go to OUT/SETTING/seed_N."""
    seeds: tuple[int, ...] = (0, 1)
    settings: tuple[str, ...] = SETTINGS
    jobs: int = 2
    """Runs at a time, with one thread each."""
    recipe: str = "flowers102/laptop_study"


def run_dir(study: Study, setting: str, seed: int) -> Path:
    """Where a run's record lies."""
    return study.out / setting.replace("/", "_") / f"seed_{seed}"


@contextlib.contextmanager
def teacher(study: Study) -> Iterator[str]:
    """One server for all runs; yields its address."""
    with tempfile.TemporaryDirectory() as folder, (study.out / "teacher.log").open("ab") as log:
        address_file = Path(folder) / "address"
        server = subprocess.Popen(
            [sys.executable, "-m", "teacher_server.main", f"--model={study.teacher}", f"--data={study.data}",
             "--address=127.0.0.1:0", f"--address-file={address_file}", "--threads=1", "--exit-when-stdin-closes"],
            cwd=_ROOT, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert server.stdin is not None
        try:
            while not address_file.exists():
                if server.poll() is not None:
                    sys.exit(f"the teacher did not come up: see {study.out / 'teacher.log'}")
                time.sleep(0.1)
            yield address_file.read_text().strip()
        finally:
            server.stdin.close()
            server.wait()


def run(study: Study, setting: str, seed: int, address: str, more: Sequence[str]) -> None:
    """One run to its end, in a process of its own."""
    folder = run_dir(study, setting, seed)
    if (folder / "summary.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (folder / "output.log").open("ab") as log:
        subprocess.run(
            [sys.executable, "student_trainer/leash.py", "SIGTERM", str(os.getpid()),  # ends, and saves, with us
             sys.executable, "student_trainer/main.py", f"--recipe={study.recipe}", f"--views.setting={setting}",
             f"--seed={seed}", f"--data={study.data.resolve()}", f"--teacher={address}",
             f"--run-dir={folder.resolve()}", f"--teacher.store={(study.out / 'logits').resolve()}", *more],
            cwd=_ROOT, stdout=log, stderr=subprocess.STDOUT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    print(f"{setting}, seed {seed}: {(time.monotonic() - began) / 60:.1f} min", flush=True)


def main() -> None:
    """Run what is missing, and draw."""
    args = sys.argv[1:]
    cut = args.index("--") if "--" in args else len(args)
    study = tyro.cli(Study, description=__doc__, args=args[:cut])
    study.out.mkdir(parents=True, exist_ok=True)
    todo = [(setting, seed) for seed in study.seeds for setting in study.settings]
    with teacher(study) as address, ThreadPoolExecutor(study.jobs) as pool:
        # The first error ends the study once the runs in progress have come to their end.
        for done in [pool.submit(run, study, *one, address, args[cut + 1 :]) for one in todo]:
            done.result()
    subprocess.run([sys.executable, "-m", "student_trainer.report", "--study", str(study.out)], cwd=_ROOT, check=True)


if __name__ == "__main__":
    main()
