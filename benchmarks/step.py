"""Row 4: what remote teachers cost the student: `python -m benchmarks.step`.

A training step's time with teachers in other processes, over its time with the logits in memory already. Both sides
run the loop's own parts on the same pictures, rows and network: plan, read, render ahead, mix, forward, loss, backward,
clip, update, metrics (student_trainer/train.py); only who answers differs. Teachers are enough, and elsewhere: they
answer after a fixed time and use no core for it (benchmarks/echo.py). On the CPU the network has one thread, as
torchrun gives each of several processes; more would spin against the decoders, and measure that.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import models
from benchmarks import echo, figure, photographs
from benchmarks.figure import Figure
from data_prep.index import Index
from student_trainer.config import OptimConfig
from student_trainer.fleet import Audit, Fleet
from student_trainer.loader import Batch, Lesson, Source, run_ahead
from student_trainer.loss import agreement, distillation_loss, entropy, kl_divergence, one_teacher
from student_trainer.optimizer import clip_gradients, make_optimizer
from student_trainer.pictures import Pictures
from student_trainer.teachers import LiveTeacher, Teacher
from views.draw import Plan, ViewLaw
from views.mix import mix
from views.render import Renderer, Rendering
from views.view import Rows

_ARCHITECTURE, _SIZE, _ROWS = "resnetv2_14x05_bit", 96, 64
_HALF = (0.5, 0.5, 0.5)
_PREFETCH = 3  # as a run has it (student_trainer/config.py)
_WARM_STEPS = (
    10  # until what was made ahead before the clock started is used up, and teachers are asked far enough ahead
)
_REPLICAS = 2
_PAIRS = 8  # every other one the other way round: what a machine gains or loses meanwhile falls on both sides
_LATENCIES_S = 0.05, 1.0  # of a replica with room, and of one far away or busy


@dataclass(frozen=True, slots=True)
class _Time:
    """Of a step."""

    step_s: float
    wait_s: float
    """Of it, for answers."""


class _Ready:
    """A teacher whose logits lie in memory."""

    recomputed = 0

    def __init__(self) -> None:
        self._logits = echo.some_logits(_ROWS, echo.NUM_CLASSES).astype(np.float16).astype(np.float32)

    def ask(self, step: int, rows: Rows, pictures: Pictures) -> _Ready:  # noqa: ARG002 - a Teacher's
        return self

    def result(self) -> NDArray[np.float32]:
        return self._logits

    def audit(self) -> Audit | None:
        return None


class _Student:
    """A network that learns, as the loop has it."""

    def __init__(self) -> None:
        self.waited_s = 0.0
        torch.manual_seed(0)
        self._network: nn.Module = models.create(_ARCHITECTURE, echo.NUM_CLASSES)
        self._network.to(memory_format=torch.channels_last).train()
        self._optim = OptimConfig(batch_size=_ROWS)
        self._optimizer = make_optimizer(self._network, self._optim)

    def step(self, batch: Batch) -> None:
        """One step of student_trainer/train.py, on one process."""
        partner, lam = torch.from_numpy(batch.rows.partner).long(), torch.from_numpy(batch.rows.lam)
        images_R3SS = mix(batch.pixels, partner, lam, _HALF, _HALF).contiguous(memory_format=torch.channels_last)
        began = time.perf_counter()
        teacher_MRK = torch.stack([torch.from_numpy(target.result()) for target in batch.targets])
        self.waited_s += time.perf_counter() - began
        student_RK = self._network(images_R3SS)
        loss = distillation_loss(student_RK, teacher_MRK, self._optim.temperature, "logits")
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = clip_gradients(self._network.parameters(), self._optim.clip_norm)
        teacher_RK = one_teacher(teacher_MRK, "logits")
        numbers = [
            loss, norm, entropy(student_RK).mean(), entropy(teacher_RK).mean(),
            kl_divergence(student_RK, teacher_RK).mean(), agreement(student_RK, teacher_RK, k=1).float().mean(),
        ]  # fmt: skip
        torch.stack([number.detach().float() for number in numbers]).tolist()
        self._optimizer.step()


def measure(quick: bool) -> Iterator[Figure]:
    """Both in turn, for teachers near by and far away."""
    torch.set_num_threads(1)
    pairs, steps, latencies_s = (1, 3, _LATENCIES_S[:1]) if quick else (_PAIRS, 12, _LATENCIES_S)
    with tempfile.TemporaryDirectory() as folder:
        index = photographs.prepared(Path(folder), 2 * _ROWS)
        for latency_s in latencies_s:
            command = "echo", "pause", str(latency_s), str(echo.NUM_CLASSES)
            with echo.serving(*command) as one, echo.serving(*command) as other:
                with Fleet([one, other], data_digest=echo.DIGEST, client="benchmark") as fleet:
                    yield _figure(index, fleet, latency_s, pairs, steps)


def _figure(index: Index, fleet: Fleet, latency_s: float, pairs: int, steps: int) -> Figure:
    student = _Student()
    live, ready = LiveTeacher(fleet, None), _Ready()
    _check_same_lessons(index, live, ready)
    remote: list[_Time] = []
    memory: list[_Time] = []
    sides: list[tuple[list[_Time], Teacher]] = [(remote, live), (memory, ready)]
    for number in range(pairs):
        for times, teacher in reversed(sides) if number % 2 else sides:
            times.append(_time(index, student, teacher, steps))
    remote_s, memory_s = [one.step_s for one in remote], [one.step_s for one in memory]
    ratios = sorted(a / b for a, b in zip(remote_s, memory_s, strict=True))
    return Figure(
        row="4", name=f"student step, teachers {1000 * latency_s:.0f} ms away, {_ARCHITECTURE} at {_SIZE}, {_ROWS} "
        f"rows, {echo.NUM_CLASSES} classes", value=1000 * statistics.median(remote_s), unit="ms",
        beside="logits in memory", alternative=1000 * statistics.median(memory_s), goal=("<=", 1.03),
        judged=statistics.median(ratios),
        note=f"{_REPLICAS} replicas that answer after a pause, by reference, {_PREFETCH} batches ahead; medians over "
        f"{pairs} pairs of {steps} steps, ratios {ratios[0]:.3f} to {ratios[-1]:.3f}; of a step "
        f"{1000 * statistics.median(one.wait_s for one in remote):.2f} ms are waiting for answers",
    )  # fmt: skip


def _batches(index: Index, teacher: Teacher, num: int) -> Iterator[Batch]:
    plan = Plan(
        seed=0, batch_size=_ROWS, law=ViewLaw(), samples=range(len(index)), height=index.height, width=index.width
    )
    renderer = Renderer(Rendering(size=_SIZE), _ROWS + 1, None, 2)
    lessons = (Lesson(step, rows, rows) for step in range(num) for rows in [plan.rows(step, 0, _ROWS)])
    return run_ahead(Source(index, renderer, [teacher]), lessons, _PREFETCH)


def _check_same_lessons(index: Index, live: Teacher, ready: Teacher) -> None:
    """The same pixels and the same logits on both sides."""
    for ours, theirs in zip(_batches(index, live, 2), _batches(index, ready, 2), strict=True):
        assert torch.equal(ours.pixels, theirs.pixels), "the two sides see other pixels"
        for a, b in zip(ours.targets, theirs.targets, strict=True):
            assert a.result().shape == b.result().shape, "the two sides learn from other logits"


def _time(index: Index, student: _Student, teacher: Teacher, steps: int) -> _Time:
    """Means over steps, once the loader runs ahead as it does in the middle of a run."""
    began = 0.0
    for number, batch in enumerate(_batches(index, teacher, _WARM_STEPS + steps + _PREFETCH)):
        if number == _WARM_STEPS:
            began, student.waited_s = time.perf_counter(), 0.0
        if number == _WARM_STEPS + steps:
            break
        student.step(batch)
    return _Time((time.perf_counter() - began) / steps, student.waited_s / steps)


if __name__ == "__main__":
    figure.present(measure, __doc__)
