"""A replica on a GPU, end to end, beside its bare forward pass (row 3).

`python -m benchmarks.gpu.service NETWORK SIZE` prints a figure as JSON. A real server in a process of its own is asked
by reference, 256 rows at a time, with so many requests under way that it always has work; it decodes, mixes and answers
on the device that runs the network. Beside it, in turns, the same network in the same precision and batch shape is
given rows that are ready. An answer that is not the same bytes each time ends the benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import torch

import models
from benchmarks import photographs
from benchmarks.figure import Figure
from benchmarks.gpu.forward import random_bit
from benchmarks.turns import Contender, in_turns
from data_prep.index import Index
from models import ModelCard
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from teacher_server.model import Teacher, be_reproducible, choose_batch_rows, choose_precision
from views.draw import Plan, ViewLaw
from views.wire import ask_by_reference

_ROOT = Path(__file__).resolve().parents[2]
_ROWS = 256  # of a request
_WINDOW = 10  # requests under way: half of what a server holds at most, by its own default
_DIFFERENT = 4  # requests
_HALF = (0.5, 0.5, 0.5)
_GOAL = 0.97


def measure(
    architecture: str, size: int, device: torch.device, *, rounds: int = 4, seconds: float = 5.0, num_rows: int = _ROWS,
    num_pictures: int = 256,
) -> Iterator[Figure]:  # fmt: skip
    """The figure, from a server that is started for it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = photographs.prepared(folder, num_pictures)
        card = ModelCard(architecture=architecture, num_classes=1000, size=size, mean=_HALF, std=_HALF)
        module = random_bit(architecture)
        models.save(folder / "teacher.safetensors", module, card)
        be_reproducible(len(os.sched_getaffinity(0)))
        teacher = Teacher(
            module, card, device=device, precision=choose_precision("auto", device),
            batch_rows=choose_batch_rows(None, device),
        )  # fmt: skip
        rows = torch.randn(teacher.batch_rows, 3, size, size, device=device)
        bare = {"bare": Contender(len(rows), lambda: teacher.logits(rows))}
        with _server(folder, index, device) as address:
            requests = _requests(address, index, num_rows)
            speeds = []
            for _ in range(rounds):
                times = in_turns(bare, device, rounds=1, burst_s=seconds / 2)
                speeds.append((_rows_per_s(address, requests, seconds), len(rows) / times["bare"][0]))
    served, ready = zip(*speeds, strict=True)
    yield dataclasses.replace(
        unmeasured(architecture, size, ""), value=statistics.median(served), alternative=statistics.median(ready),
        judged=statistics.median(a / b for a, b in speeds),
        note=f"{rounds} times {seconds:.0f} s each, in turns; JPEGs of {photographs.WIDTH} x {photographs.HEIGHT}; the "
        "server passed its gate, and every answer was the same bytes each time",
    )  # fmt: skip


def unmeasured(architecture: str, size: int, why: str) -> Figure:
    """The row of the table without its numbers."""
    return Figure(
        row="3", name=f"replica end to end on the GPU, {architecture} at {size}, {_ROWS}-row requests by reference",
        value=None, unit="rows/s", beside="bare forward", goal=(">=", _GOAL), note=why,
    )  # fmt: skip


@contextlib.contextmanager
def _server(folder: Path, index: Index, device: torch.device) -> Iterator[str]:
    """The address of a server process, which ends with its standard input."""
    address_file = folder / "address"
    command = [
        sys.executable, "-m", "teacher_server.main", f"--model={folder / 'teacher.safetensors'}", "--data",
        str(index.root), "--address=127.0.0.1:0", f"--device={device.type}", f"--address-file={address_file}",
        "--exit-when-stdin-closes", "--drain-s=5",
    ]  # fmt: skip
    log = folder / "log"
    with (
        log.open("wb") as out,
        subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=out, stderr=out) as process,
    ):
        while not address_file.exists():
            if process.poll() is not None:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield address_file.read_text().strip()
        assert process.stdin is not None
        process.stdin.close()


def _requests(address: str, index: Index, num_rows: int) -> list[pb.PredictRequest]:
    plan = Plan(
        seed=0, batch_size=_DIFFERENT * num_rows, law=ViewLaw(), samples=range(len(index)), height=index.height,
        width=index.width,
    )  # fmt: skip
    with grpc.insecure_channel(address) as channel:
        who = pb_grpc.TeacherStub(channel).Describe(pb.DescribeRequest(), timeout=60)  # type: ignore[no-untyped-call]
    requests = []
    for number in range(_DIFFERENT):
        request = ask_by_reference(plan.rows(0, number * num_rows, (number + 1) * num_rows), index.digest)
        request.fingerprint = who.fingerprint
        requests.append(request)
    return requests


class _Client:
    """Keeps requests under way, and notes when each was answered."""

    def __init__(self, address: str, requests: list[pb.PredictRequest]) -> None:
        self._requests = requests
        self._right: dict[int, bytes] = {}
        self._over = threading.Event()
        self.answered: list[float] = []
        self.errors: list[Exception] = []
        self._channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
        self._predict = pb_grpc.TeacherStub(self._channel).Predict  # type: ignore[no-untyped-call]
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(_WINDOW)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Wait for what is under way."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._channel.close()

    def _ask(self, turn: int) -> None:
        while not self._over.is_set():
            which = turn % len(self._requests)
            turn += 1
            try:
                logits = self._predict(self._requests[which], timeout=120).logits.data
                if logits != self._right.setdefault(which, logits):
                    raise AssertionError(f"request {which} was answered otherwise than before")
            except Exception as error:  # whatever it is, the figure is none
                self.errors.append(error)
                self._over.set()
            self.answered.append(time.perf_counter())


def _rows_per_s(address: str, requests: list[pb.PredictRequest], seconds: float) -> float:
    """Between the first answer after a while and the last one."""
    client = _Client(address, requests)
    time.sleep(seconds / 3)
    start = time.perf_counter()
    time.sleep(seconds)
    end = time.perf_counter()
    client.stop()
    if client.errors:
        raise client.errors[0]
    within = [at for at in sorted(client.answered) if start <= at <= end]
    if len(within) < 2:
        raise RuntimeError(f"{len(within)} requests were answered in {seconds:.0f} s: measure for longer")
    num_rows = int(requests[0].lam.shape[0])
    return num_rows * (len(within) - 1) / (within[-1] - within[0])


def main() -> None:
    """Print a figure a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="resnetv2_152x2_bit, resnetv2_50x1_bit")
    parser.add_argument("size", type=int, help="pixels a side")
    parser.add_argument("--quick", action="store_true", help="one round of two seconds")
    asked = parser.parse_args()
    rounds, seconds = (1, 2.0) if asked.quick else (4, 5.0)
    for one in measure(asked.network, asked.size, torch.device("cuda", 0), rounds=rounds, seconds=seconds):
        print(json.dumps(dataclasses.asdict(one)), flush=True)


if __name__ == "__main__":
    main()
