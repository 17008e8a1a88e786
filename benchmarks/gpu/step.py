"""A student's step on a GPU with remote teachers, beside one with the logits in memory (row 4).

`python -m benchmarks.gpu.step NETWORK SIZE` prints a figure as JSON. As in benchmarks/step.py, which has the form for
the CPU, teachers are enough and elsewhere: two servers that answer after a fixed time and use nothing of this machine
(benchmarks/echo.py). Both sides decode, mix and learn on the device from the same pictures and rows, in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import models
from benchmarks import echo, photographs
from benchmarks.figure import Figure
from data_prep.index import Index
from student_trainer.config import OptimConfig
from student_trainer.fleet import Audit, Fleet
from student_trainer.loader import Batch, Lesson, Source, run_ahead
from student_trainer.loss import distillation_loss
from student_trainer.optimizer import clip_gradients, make_optimizer
from student_trainer.pictures import Pictures
from student_trainer.teachers import LiveTeacher, Teacher
from views.draw import Plan, ViewLaw
from views.mix import mix
from views.render import Renderer, Rendering
from views.view import Rows

_HALF = (0.5, 0.5, 0.5)
_PREFETCH = 3  # as a run has it
_LATENCY_S = 0.1
_GOAL = 1.03


class _AtHand:
    """A teacher, and its answer: logits that lie in memory."""

    recomputed = 0

    def __init__(self, num_rows: int) -> None:
        self._logits = echo.some_logits(num_rows, echo.NUM_CLASSES)

    def ask(self, step: int, rows: Rows, pictures: Pictures) -> _AtHand:  # noqa: ARG002 - a Teacher's
        return self

    def result(self) -> NDArray[np.float32]:
        return self._logits

    def audit(self) -> Audit | None:
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """What both sides share."""

    index: Index
    network: nn.Module
    optim: OptimConfig
    optimizer: torch.optim.Optimizer
    size: int
    device: torch.device

    def step_s(self, teacher: Teacher, warm: int, steps: int) -> float:
        """Mean time of so many steps, after those that fill what runs ahead."""
        began = 0.0
        for number, batch in enumerate(itertools.islice(self._batches(teacher), warm + steps)):
            if number == warm:
                began = time.perf_counter()
            self._step(batch)
        return (time.perf_counter() - began) / steps

    def _batches(self, teacher: Teacher) -> Iterator[Batch]:
        rows, cuda = self.optim.batch_size, self.device.type == "cuda"
        plan = Plan(
            seed=0, batch_size=rows, law=ViewLaw(), samples=range(len(self.index)), height=self.index.height,
            width=self.index.width,
        )  # fmt: skip
        threads = max(2, len(os.sched_getaffinity(0)) // 2)
        renderer = Renderer(Rendering(size=self.size), rows + 1, 0 if cuda else None, threads)
        planned = (plan.rows(step, 0, rows) for step in itertools.count())
        lessons = (Lesson(step, one, one) for step, one in enumerate(planned))
        return run_ahead(Source(self.index, renderer, [teacher]), lessons, _PREFETCH)

    def _step(self, batch: Batch) -> None:
        partner = torch.from_numpy(batch.rows.partner).long().to(self.device)
        lam = torch.from_numpy(batch.rows.lam).to(self.device)
        images_R3SS = mix(batch.pixels.to(self.device), partner, lam, _HALF, _HALF)
        images_R3SS = images_R3SS.contiguous(memory_format=torch.channels_last)
        teacher_MRK = torch.stack([torch.from_numpy(target.result()) for target in batch.targets]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            student_RK = self.network(images_R3SS).float()
        loss = distillation_loss(student_RK, teacher_MRK, 1.0, "logits")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(self.network.parameters(), self.optim.clip_norm)
        self.optimizer.step()
        loss.item()  # a run writes it down at every step


def measure(
    architecture: str, size: int, device: torch.device, *, num_rows: int = 256, pairs: int = 5, warm: int = 8,
    steps: int = 15, num_pictures: int = 256,
) -> Iterator[Figure]:  # fmt: skip
    """The figure, over so many pairs of turns."""
    torch.manual_seed(0)
    network = models.create(architecture, echo.NUM_CLASSES).to(device).to(memory_format=torch.channels_last).train()
    optim = OptimConfig(batch_size=num_rows)
    command = "echo", "pause", str(_LATENCY_S), str(echo.NUM_CLASSES)
    with tempfile.TemporaryDirectory() as folder, echo.serving(*command) as one, echo.serving(*command) as other:
        index = photographs.prepared(Path(folder), num_pictures)
        run = _Run(index, network, optim, make_optimizer(network, optim), size, device)
        with Fleet([one, other], data_digest=echo.DIGEST, client="benchmark") as fleet:
            sides: tuple[Teacher, Teacher] = LiveTeacher(fleet, None), _AtHand(num_rows)
            times = [tuple(run.step_s(side, warm, steps) for side in sides) for _ in range(pairs)]
    remote_s, memory_s = zip(*times, strict=True)
    yield dataclasses.replace(
        unmeasured(architecture, size, ""), value=1000 * statistics.median(remote_s),
        alternative=1000 * statistics.median(memory_s), judged=statistics.median(a / b for a, b in times),
        note=f"{num_rows} rows, {echo.NUM_CLASSES} classes; two replicas that answer after {1000 * _LATENCY_S:.0f} ms; "
        f"{pairs} pairs of {steps} steps",
    )  # fmt: skip


def unmeasured(architecture: str, size: int, why: str) -> Figure:
    """The row of the table without its numbers."""
    return Figure(
        row="4", name=f"student step on the GPU, remote teachers, {architecture} at {size}", value=None, unit="ms",
        beside="logits in memory", goal=("<=", _GOAL), note=why,
    )  # fmt: skip


def main() -> None:
    """Print the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="resnetv2_50x1_bit")
    parser.add_argument("size", type=int, help="pixels a side")
    asked = parser.parse_args()
    for one in measure(asked.network, asked.size, torch.device("cuda", 0)):
        print(json.dumps(dataclasses.asdict(one)), flush=True)


if __name__ == "__main__":
    main()
