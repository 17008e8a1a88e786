"""Row 12: what a cost does when the work grows: `python -m benchmarks.growth [--plot docs/images/growth.png]`.

    pictures   10^3 to 10^9: planning and drawing a batch of 4096 rows, its time and its memory
    classes    10 to 21,843: a request of 64 rows through the real service, whose model answers at once; its bytes; loss
    replicas   1 to 64 teachers of 40 rows a second each (benchmarks/fleet.py): rows a second of the fleet
    ranks      1 to 4 processes over gloo: the collective that the loop adds to a step, beside that of the gradients

Sizes take turns, so that a busy moment is no point of a curve. Judged is the slope in log-log (benchmarks/curve.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import grpc
import numpy as np
import torch

from benchmarks import blank, echo, figure, fleet, ranks
from benchmarks.curve import AS_MUCH_MORE, FLAT, LINEAR, Curve, draw
from benchmarks.figure import Figure
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from student_trainer.loss import distillation_loss
from teacher_server.config import Config
from teacher_server.gate import Report
from teacher_server.loading import Loaded
from teacher_server.model import Teacher
from teacher_server.pictures import Pictures
from teacher_server.server import Server
from views.draw import Plan, ViewLaw
from views.view import Rows
from views.wire import ask_by_reference

_PICTURES = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
_CLASSES = (10, 100, 1000, 10_000, 21_843)
_REPLICAS = (1, 4, 16, 64)
_RANKS = (1, 2, 4)
_BATCH, _REQUEST, _SHARE = 4096, 64, 256
_RATE = 40.0  # rows a second of one replica


def measure(quick: bool) -> Iterator[Figure]:
    """All curves, as figures."""
    for curve in curves(quick):
        yield curve.figure()


def curves(quick: bool) -> Iterator[Curve]:
    """Measure."""
    yield from by_pictures(3 if quick else 40)
    yield from by_classes(3 if quick else 40)
    yield by_replicas(_REPLICAS[:2] if quick else _REPLICAS, 0.5 if quick else 8.0)
    yield by_ranks(_RANKS[:2] if quick else _RANKS, 5 if quick else 300)


def in_turns(work: Mapping[int, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> list[float]:
    """Milliseconds of each size's work, the median of so many rounds, after one that warms up."""
    times: dict[int, list[float]] = {size: [] for size in work}
    for number in range(rounds + 1):
        for size, run in work.items():
            began = clock()
            run()
            if number:
                times[size].append(1000 * (clock() - began))
    return [statistics.median(times[size]) for size in work]


# ---- pictures ------------------------------------------------------------------------------------------------


def plan_of(num_pictures: int) -> Plan:
    """Of pictures that are all of one size: a column that takes no memory, where a real one lies in a file."""
    height, width = np.broadcast_to(np.int32(375), num_pictures), np.broadcast_to(np.int32(500), num_pictures)
    return Plan(seed=0, batch_size=_BATCH, law=ViewLaw(), samples=range(num_pictures), height=height, width=width)


def by_pictures(rounds: int) -> Iterator[Curve]:
    """Time and memory of a batch's rows."""
    plans = {size: plan_of(size) for size in _PICTURES}
    # The first batch of the second epoch: its order has never been looked at.
    work = {size: partial(plan.rows, size // _BATCH + 1) for size, plan in plans.items()}
    curve = partial(Curve, by="pictures", sizes=_PICTURES, goal=FLAT)
    milliseconds = in_turns(work, rounds, time.process_time)
    yield curve(name=f"plan and draw {_BATCH} rows", unit="ms of CPU", values=milliseconds)
    yield curve(name=f"memory of {_BATCH} rows", unit="MB at most", values=[peak_mb(run) for run in work.values()])


def peak_mb(run: Callable[[], object]) -> float:
    """The most that is allocated at once."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


# ---- classes -------------------------------------------------------------------------------------------------


class _AnswersLie(blank.Instant):
    """A network of so many classes."""

    def __init__(self, num_classes: int) -> None:
        self._logits = echo.some_logits(self.batch_rows, num_classes)


def server_of(num_classes: int, pictures: Pictures) -> Server:
    """The real service; pictures are blank, and answers lie ready."""
    server = Server(Config(model="echo", address="127.0.0.1:0", device="cpu"))
    server.bind()
    report = Report(num_images=0, finite=True, max_difference=0, mean_kl=0, agreement_top1=1, batch_invariant=True)
    server.serve(
        Loaded(
            description=echo.description(num_classes), pictures=pictures,
            teacher=cast(Teacher, _AnswersLie(num_classes)), report=report,
        )
    )  # fmt: skip
    return server


def some_rows() -> Rows:
    """Of one request."""
    height, width = np.full(echo.NUM_SAMPLES, echo.HEIGHT, np.int32), np.full(echo.NUM_SAMPLES, echo.WIDTH, np.int32)
    samples = range(echo.NUM_SAMPLES)
    plan = Plan(seed=0, batch_size=_REQUEST, law=ViewLaw(), samples=samples, height=height, width=width)
    return plan.rows(3)


def by_classes(rounds: int) -> Iterator[Curve]:
    """A request, from the call to the numbers, and the loss of a rank's share."""
    request = ask_by_reference(some_rows(), echo.DIGEST)
    request.fingerprint = echo.FINGERPRINT
    curve = partial(Curve, by="classes", sizes=_CLASSES, goal=LINEAR, fitted=2)  # fewer cost what a call costs
    pictures = blank.Blank(blank.imagenet_sized())
    servers = {size: server_of(size, pictures) for size in _CLASSES}
    try:
        options = [("grpc.max_receive_message_length", 2**26)]
        channels = {size: grpc.insecure_channel(server.address, options=options) for size, server in servers.items()}
        stubs = {size: pb_grpc.TeacherStub(channel) for size, channel in channels.items()}  # type: ignore[no-untyped-call]
        replies = {size: stub.Predict(request) for size, stub in stubs.items()}
        for size, reply in replies.items():
            _check(reply, size)
        calls = {size: partial(stub.Predict, request) for size, stub in stubs.items()}
        yield curve(
            name=f"request of {_REQUEST} rows", unit="ms", values=in_turns(calls, rounds, time.perf_counter),
            note="client and server in one process",
        )  # fmt: skip
        kilobytes = [reply.ByteSize() / 1000 for reply in replies.values()]
        yield curve(name=f"reply to {_REQUEST} rows", unit="kB", values=kilobytes)
        for channel in channels.values():
            channel.close()
    finally:
        for server in servers.values():
            server.drain()
    losses = {size: _loss_of(size) for size in _CLASSES}
    yield curve(name=f"loss of {_SHARE} rows", unit="ms", values=in_turns(losses, rounds, time.perf_counter))


def _check(reply: pb.PredictReply, num_classes: int) -> None:
    right = echo.some_logits(blank.Instant.batch_rows, num_classes)[:_REQUEST].astype(np.float16)
    if reply.logits.data != right.tobytes():
        raise RuntimeError(f"the service of {num_classes} classes answered other logits than its model")


def _loss_of(num_classes: int) -> Callable[[], None]:
    student = torch.randn(_SHARE, num_classes, requires_grad=True)
    teacher = torch.randn(1, _SHARE, num_classes)

    def run() -> None:
        student.grad = None
        distillation_loss(student, teacher, 1.0).backward()  # type: ignore[no-untyped-call]

    return run


# ---- replicas ------------------------------------------------------------------------------------------------


def by_replicas(sizes: tuple[int, ...], seconds: float) -> Curve:
    """Rows a second of our fleet."""
    values = []
    for size in sizes:
        with fleet.teachers(*[_RATE] * size) as addresses, fleet.fleet_of(addresses) as ours:
            fleet.keep_asking(ours, seconds / 2)  # windows find their size
            before, began = ours.state().rows, time.monotonic()
            fleet.keep_asking(ours, seconds)
            values.append((ours.state().rows - before) / (time.monotonic() - began))
    return Curve(
        name=f"a fleet of {_RATE:.0f} rows/s each", by="replicas", unit="rows/s", sizes=sizes, values=values,
        goal=AS_MUCH_MORE, beside="its sum", alternative=sizes[-1] * _RATE,
        note="teachers that pause share these cores with the fleet",
    )  # fmt: skip


# ---- ranks ---------------------------------------------------------------------------------------------------


def by_ranks(sizes: tuple[int, ...], rounds: int, num_gradients: int = ranks.NUM_GRADIENTS) -> Curve:
    """Milliseconds of the loop's own collective, and of the gradients'."""
    own, gradients = zip(*(ranks.milliseconds(size, rounds, num_gradients) for size in sizes), strict=True)
    return Curve(
        name="the loop's collective of a step", by="ranks", unit="ms", sizes=sizes, values=own, goal=LINEAR,
        fitted=min(1, len(sizes) - 2), beside="the gradients' of a ResNet-50", alternative=gradients[-1],
        note="gloo on one machine; one rank waits for nobody; "
        f"of {len(os.sched_getaffinity(0))} cores: ranks beyond them wait for a core, which is most of their time",
    )  # fmt: skip


def main() -> None:
    """Print the figures, and draw them if asked to."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    asked, rest = parser.parse_known_args()
    drawn: list[Curve] = []

    def measured(quick: bool) -> Iterator[Figure]:
        for curve in curves(quick):
            drawn.append(curve)
            yield curve.figure()

    figure.present(measured, __doc__, rest)
    if asked.plot:
        draw(drawn, asked.plot)


if __name__ == "__main__":
    main()
