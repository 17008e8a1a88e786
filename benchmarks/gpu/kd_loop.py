"""Distillation in one process, as timm's train.py does it with --kd-model-name: the alternative of row 5.

timm's wheel does not hold that script, so this is its plain form: timm's loader with its training transforms and
workers, both networks on the device in channels_last under autocast, the teacher without gradients, mixup, AdamW,
kernels chosen by the clock. What the script does beside (logs, averages of weights, checkpoints) is left out, which
favours it. `python -m benchmarks.gpu.kd_loop FOLDER TEACHER STUDENT SIZE ROWS STEPS` prints images/s, a step a line.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data.dataset import ImageDataset
from timm.data.loader import create_loader
from timm.optim._optim_factory import create_optimizer_v2
from torch.nn import functional
from torch.utils.data import ConcatDataset

import models

_HALF = (0.5, 0.5, 0.5)


def images_per_s(
    folder: Path, teacher: str, student: str, size: int, num_rows: int, num_steps: int, device: torch.device
) -> Iterator[float]:
    """Of each step, by the clock between the ends of two steps.

    Args:
        folder: with a folder of pictures for each class.
        teacher: timm's name; its weights are random, which changes no time.
        student: the same.
        size: pixels a side, of both.
        num_rows: of a batch.
        num_steps: to make.
        device: of both networks.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    pictures = ImageDataset(str(folder))  # type: ignore[no-untyped-call]
    epochs: Any = ConcatDataset([pictures] * (1 + num_rows * (num_steps + 4) // len(pictures)))  # a loader starts once
    classes = len(list(folder.iterdir()))
    teaches, learns = (
        models.create(name, classes).to(device).to(memory_format=torch.channels_last) for name in (teacher, student)
    )
    teaches.eval().requires_grad_(False)
    learns.train()
    optimizer = create_optimizer_v2(learns, opt="adamw", lr=1e-4, weight_decay=0.05)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
    loader = create_loader(
        epochs, (3, size, size), num_rows, is_training=True, use_prefetcher=device.type == "cuda", mean=_HALF,
        std=_HALF, interpolation="bilinear", num_workers=max(1, len(os.sched_getaffinity(0)) - 2), device=device,
    )  # fmt: skip
    pictures.transform = epochs.transform  # where the loader has put it
    rng = torch.Generator().manual_seed(0)
    before = time.perf_counter()
    for images_R3SS, _ in itertools.islice(loader, num_steps):
        lam = float(torch.rand((), generator=rng))
        images_R3SS = images_R3SS.to(device)
        images_R3SS = (lam * images_R3SS + (1 - lam) * images_R3SS.roll(1, 0)).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast(device.type, half):
            with torch.no_grad():
                teacher_RK = teaches(images_R3SS)
            student_RK = learns(images_R3SS)
            loss = functional.kl_div(
                student_RK.log_softmax(1), teacher_RK.log_softmax(1), reduction="batchmean", log_target=True
            )
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(learns.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        loss.item()  # wait for the step, as our loop does for its numbers
        now = time.perf_counter()
        yield num_rows / (now - before)
        before = now


def main() -> None:
    """Print images/s, a step a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("teacher")
    parser.add_argument("student")
    for name in ("size", "rows", "steps"):
        parser.add_argument(name, type=int)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    speeds = images_per_s(
        asked.folder, asked.teacher, asked.student, asked.size, asked.rows, asked.steps, torch.device(asked.device)
    )
    for speed in speeds:
        print(speed, flush=True)


if __name__ == "__main__":
    main()
