"""Does an epoch cost anything? `python -m benchmarks.patience [--epochs 10000]`: step time and memory over many epochs.

A tiny data set (16 handwritten digits) is distilled from a tiny teacher for 10,000 epochs. An epoch's border must be
like any other step: no order is rebuilt, no reader starts anew, nothing is kept. Printed per tenth of the run: the
median and 99 % quantile of a step, and the resident memory of trainer and teacher. At the end, the ratio of the last
tenth to the second (the first warms up), and steps that cross a border beside those that do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

import models

_ROOT = Path(__file__).resolve().parents[1]
_NUM_PICTURES, _BATCH = 16, 12  # three of four steps cross a border or touch one; one does not


def make_data(folder: Path) -> Path:
    """Sixteen digits as a prepared data set."""
    digits = load_digits()
    for number in range(_NUM_PICTURES + 4):
        split = "train" if number < _NUM_PICTURES else "val"
        path = folder / "pictures" / split / f"{digits.target[number]}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[number] * 15.9375).astype(np.uint8)
        Image.fromarray(pixels).resize((32, 32)).convert("RGB").save(path)
    out = folder / "data"
    command = [sys.executable, "-m", "data_prep.prepare", "folder", "--source", folder / "pictures", "--out", out]
    subprocess.run([*map(str, command)], cwd=_ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out


def make_teacher(folder: Path) -> Path:
    """A network that nobody trained: what it says does not matter here."""
    model = models.create("resnetv2_14x05_bit", 10)
    half = (0.5, 0.5, 0.5)
    card = models.ModelCard(architecture="resnetv2_14x05_bit", num_classes=10, size=32, mean=half, std=half)
    models.save(folder / "teacher.safetensors", model, card)
    return folder / "teacher.safetensors"


def resident_mib(pid: int) -> float:
    """Resident memory of a process and its children."""
    pids = [pid, *(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def train(folder: Path, epochs: int) -> tuple[list[float], list[tuple[int, float]]]:
    """Run; seconds of each step, and (step, MiB) as it went."""
    run_dir, memory = folder / "run", []
    command = [
        sys.executable, "student_trainer/main.py", "--recipe=digits/demo", f"--data={make_data(folder)}",
        f"--teacher.model={make_teacher(folder)}", f"--run-dir={run_dir}", f"--optim.batch-size={_BATCH}",
        f"--optim.epochs={epochs}", "--evaluate-every=0", "--data.evaluate=val", "--checkpoint-every=1000000",
        "--device=cpu", "--optim.warmup-steps=10", "--teacher.audit-every=500",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=_ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    record = run_dir / "metrics.jsonl"

    def watch() -> None:
        while process.poll() is None:
            if record.exists():
                memory.append((record.read_bytes().count(b"\n"), resident_mib(process.pid)))
            time.sleep(2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if process.wait():
        sys.exit(f"the run failed: {' '.join(command)}")
    watcher.join()
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return [_BATCH / line["images_per_s"] for line in lines], memory


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10_000)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        seconds, memory = train(Path(folder), epochs)
    steps = np.arange(len(seconds))
    tenths = np.array_split(np.array(seconds) * 1000, 10)
    at, mib = np.array(memory).T
    print(f"{epochs} epochs of {_NUM_PICTURES} pictures, {len(seconds)} steps of {_BATCH}\n")
    print("tenth   median step, ms   99 %, ms   memory of trainer and teacher, MiB")
    resident = []
    for i, tenth in enumerate(tenths):
        inside = (at >= i * len(seconds) / 10) & (at < (i + 1) * len(seconds) / 10)
        resident.append(float(np.median(mib[inside])) if inside.any() else float("nan"))
        print(f"{i + 1:5}{np.median(tenth):18.2f}{np.quantile(tenth, 0.99):11.2f}{resident[-1]:14.0f}")
    crosses = (steps * _BATCH) // _NUM_PICTURES != ((steps + 1) * _BATCH - 1) // _NUM_PICTURES
    late = steps > len(seconds) // 10
    ms = np.array(seconds) * 1000
    print(f"\nlast tenth : second tenth   step {np.median(tenths[-1]) / np.median(tenths[1]):.3f}, "
          f"memory {resident[-1] / resident[1]:.3f}")  # fmt: skip
    print(f"steps that cross an epoch's border : others   {np.median(ms[late & crosses]):.2f} ms : "
          f"{np.median(ms[late & ~crosses]):.2f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
