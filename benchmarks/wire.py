"""Rows 8 and 9: what a row weighs on the wire, and what the wire costs: `python -m benchmarks.wire`.

Row 8 counts the messages of a run of 1000 classes, and the bytes that cross a loopback connection, HTTP/2 and all.

Row 9 asks the real service, through the real fleet, about 64 rows at a time by reference. Pictures are blank and the
model's answers lie ready (benchmarks/blank.py), so what is left is the wire: cutting a batch, requests, their checks,
admission, fairness, batching, half precision, replies, their checks, and the batch's logits in float32. Beside it gRPC
alone, with handlers that do nothing: the same bytes up and down, as many calls under way, a process each side.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np

from benchmarks import echo, figure
from benchmarks.figure import Figure
from benchmarks.relay import relay
from protos import teacher_pb2 as pb
from protos.arrays import to_message
from student_trainer.fleet import Fleet
from views.draw import Plan, ViewLaw
from views.view import Rows
from views.wire import ask_by_reference, ask_pixels

_ROWS = 64  # of a request
_REQUESTS = 8  # of a batch
_UNDER_WAY = 4  # calls at once
_PAIRS = 9
_CLIENT = "imagenet/funmatch/r152x2:runs:0123456789abcdef"  # as long as a run's name at its teachers


def measure(quick: bool) -> Iterator[Figure]:
    """Count bytes, then time both."""
    rows = _plan().rows(5, 0, _ROWS * _REQUESTS)
    request, reply = _messages(rows.take(0, _ROWS))
    yield from _bytes_of_messages(request, reply)
    seconds, pairs = (0.3, 1) if quick else (2.0, _PAIRS)
    with echo.serving("blank") as teacher, echo.serving("echo", "bare", str(len(reply))) as bare:
        yield from _bytes_of_a_connection(teacher, rows)
        with Fleet([teacher], data_digest=echo.DIGEST, client=_CLIENT, window=_UNDER_WAY) as fleet:
            _check_answer(fleet, rows)
            ours, theirs = [], []
            for _ in range(pairs):
                ours.append(_rate_of_fleet(fleet, rows, seconds))
                theirs.append(_rate_of_grpc(bare, request, len(reply), seconds))
    yield Figure(
        row="9", name=f"wire alone, requests of {_ROWS} rows by reference, {echo.NUM_CLASSES} classes, "
        f"{_UNDER_WAY} calls under way", value=statistics.median(ours), unit="rows/s",
        beside="bare gRPC, the same bytes", alternative=statistics.median(theirs), goal=(">=", 0.7),
        judged=statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        note=f"real service and fleet, blank pictures, answers that lie ready; {len(request)} bytes up, {len(reply)} "
        f"down a call; {pairs} pairs of {seconds:g} s",
    )  # fmt: skip


def _plan() -> Plan:
    """ImageNet's."""
    num = echo.NUM_SAMPLES
    height, width = np.full(num, echo.HEIGHT, np.int32), np.full(num, echo.WIDTH, np.int32)
    return Plan(seed=0, batch_size=4096, law=ViewLaw(), samples=range(num), height=height, width=width)


def _messages(rows: Rows) -> tuple[bytes, bytes]:
    """A request and its reply, as they are sent."""
    request = ask_by_reference(rows, echo.DIGEST)
    request.request_id, request.fingerprint, request.client = "0" * 32, echo.FINGERPRINT, _CLIENT
    logits = echo.some_logits(len(rows), echo.NUM_CLASSES).astype(np.float16)
    reply = pb.PredictReply(request_id="0" * 32, fingerprint=echo.FINGERPRINT, logits=to_message(logits))
    return request.SerializeToString(), reply.SerializeToString()


def _bytes_of_messages(request: bytes, reply: bytes) -> Iterator[Figure]:
    rows = _plan().rows(5, 0, _ROWS)
    pixels = ask_pixels(rows, np.zeros((rows.num_views, echo.SIZE, echo.SIZE, 3), np.uint8)).SerializeToString()
    per_view = 8 + 4 + 16 + 1  # sample, picture, box, flip
    floor = (per_view * rows.num_views + (4 + 4) * _ROWS) / _ROWS
    yield Figure(
        row="8", name=f"message up, a row by reference, {_ROWS} a request", value=len(request) / _ROWS, unit="bytes",
        beside="as pixels at 224", alternative=len(pixels) / _ROWS, floor=floor, goal=("<=", 80.0),
        judged=len(request) / _ROWS,
        note="floor: the arrays alone; the rest is fingerprint, digest, request id and name, once a request",
    )  # fmt: skip
    yield Figure(
        row="8", name=f"message down, a row, {echo.NUM_CLASSES} classes, float16", value=len(reply) / _ROWS,
        unit="bytes", beside="float32", alternative=4.0 * echo.NUM_CLASSES, floor=2.0 * echo.NUM_CLASSES,
        goal=("<=", 2048.0), judged=len(reply) / _ROWS, note="floor: the logits alone",
    )  # fmt: skip


def _bytes_of_a_connection(teacher: str, rows: Rows) -> Iterator[Figure]:
    """What a connection carries while we ask, counted on its way."""
    num_batches = 16
    with relay(teacher) as counted, Fleet([counted.address], data_digest=echo.DIGEST, client=_CLIENT) as fleet:
        fleet.ask(rows).result()
        up, down = counted.up, counted.down
        for _ in range(num_batches):
            fleet.ask(rows).result()
        num_rows = num_batches * len(rows)
        up, down = counted.up - up, counted.down - down
    request, reply = _messages(rows.take(0, _ROWS))
    for name, num_bytes, message, goal in (("up", up, request, 80.0), ("down", down, reply, 2048.0)):
        yield Figure(
            row="8", name=f"a row on a connection, {name}", value=num_bytes / num_rows, unit="bytes",
            floor=len(message) / _ROWS, goal=("<=", goal), judged=num_bytes / num_rows,
            note="TCP's payload, with HTTP/2's headers, frames and flow control; floor: the message",
        )  # fmt: skip


def _check_answer(fleet: Fleet, rows: Rows) -> None:
    """The logits are those that the model has, row for row: it answers each request from its first row on."""
    logits = fleet.ask(rows.take(0, _ROWS)).result()
    right = echo.some_logits(_ROWS, echo.NUM_CLASSES).astype(np.float16).astype(np.float32)
    assert np.array_equal(logits, right), "the answer is not the model's"


def _rate_of_fleet(fleet: Fleet, rows: Rows, seconds: float) -> float:
    """Rows answered a second, with a queue in front of the fleet at all times."""
    began, answered, asked = time.perf_counter(), 0, deque([fleet.ask(rows)])
    while time.perf_counter() - began < seconds:
        asked.append(fleet.ask(rows))
        asked.popleft().result()
        answered += len(rows)
    asked.popleft().result()
    return (answered + len(rows)) / (time.perf_counter() - began)


def _rate_of_grpc(address: str, request: bytes, num_down: int, seconds: float) -> float:
    """The same of gRPC alone: as many futures under way."""
    free = threading.Semaphore(_UNDER_WAY)

    def done(call: Any) -> None:
        free.release()
        assert len(call.result()) == num_down

    with echo.bare_channel(address) as channel:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(echo.BARE_METHOD)
        method(request, wait_for_ready=True)
        began, calls = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            free.acquire()
            method.future(request).add_done_callback(done)
            calls += 1
        for _ in range(_UNDER_WAY):
            free.acquire()
        return calls * _ROWS / (time.perf_counter() - began)


if __name__ == "__main__":
    figure.present(measure, __doc__)
