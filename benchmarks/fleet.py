"""`python -m benchmarks.fleet`: what a fleet delivers, by how many replicas it has, and how soon a new one is used.

The teachers are real gRPC servers in processes of their own that answer one request after the other, each for as many
rows in as much time; a pause stands for the model. Beside our fleet, gRPC's own round_robin over the same servers.
Exit code 1 where 3 replicas deliver less than 2.9 times one's rows, 8 less than 7.6 times, an uneven fleet less than
9 tenths of its sum, or a replica that was added has answered nothing after 15 s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from protos.arrays import to_message
from student_trainer.fleet import Fleet
from student_trainer.fleet.addresses import look_up
from views.draw import Plan, ViewLaw
from views.view import Rows
from views.wire import ask_by_reference

_ROOT = Path(__file__).resolve().parents[1]
_DIGEST, _CLASSES, _ROWS = "d" * 64, 10, 16
_PER_PROCESS = 8  # servers, at most
_WARM_S, _MEASURED_S = 3.0, 10.0


class FixedRate(pb_grpc.TeacherServicer):
    """A teacher that needs the same time for every row, and does one request at a time."""

    def __init__(self, rows_per_s: float, line_s: float) -> None:
        self._row_s = 1 / rows_per_s
        self._line_s = line_s
        self._lock = threading.Lock()
        self._free = 0.0

    def Describe(self, _request: pb.DescribeRequest, _context: grpc.ServicerContext) -> pb.Description:  # noqa: D102
        return pb.Description(
            fingerprint="f", model="a pause", num_classes=_CLASSES, precision="float32", max_rows=1024, renders=True,
            rendering=pb.Rendering(size=8), data_sets=[pb.DataSet(name="none", digest=_DIGEST)],
        )  # fmt: skip

    def Predict(self, request: pb.PredictRequest, _context: grpc.ServicerContext) -> pb.PredictReply:  # noqa: D102
        rows = request.partner.shape[0]
        with self._lock:  # a timetable, and not a pause under the lock: waking up late must cost no capacity
            self._free = max(self._free, time.monotonic()) + rows * self._row_s
            ready = self._free
        time.sleep(max(0.0, ready + self._line_s - time.monotonic()))
        return pb.PredictReply(
            request_id=request.request_id, fingerprint="f", logits=to_message(np.zeros((rows, _CLASSES), np.float32))
        )


def serve(rates: Sequence[float], line_s: float) -> None:
    """Serve on free ports, print them, and end with standard input."""
    addresses = []
    servers = []
    for rate in rates:
        server = grpc.server(ThreadPoolExecutor(20), options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_TeacherServicer_to_server(FixedRate(rate, line_s), server)  # type: ignore[no-untyped-call]
        addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        server.start()
        servers.append(server)
    print(json.dumps(addresses), flush=True)
    sys.stdin.read()


@contextlib.contextmanager
def teachers(*rates: float, line_s: float = 0.0) -> Iterator[list[str]]:
    """The addresses of one teacher a rate, in rows a second; `line_s` more pass before each answer is back."""
    with contextlib.ExitStack() as cleanup:
        processes = []
        per_process = 1 if len(rates) <= _PER_PROCESS else _PER_PROCESS
        for start in range(0, len(rates), per_process):
            command = [sys.executable, "-m", "benchmarks.fleet", "--line-s", str(line_s), "--serve"]
            command += [str(rate) for rate in rates[start : start + per_process]]
            processes.append(cleanup.enter_context(
                subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            ))  # fmt: skip
        addresses: list[str] = []
        for process in processes:
            assert process.stdout is not None and process.stdin is not None
            addresses += json.loads(process.stdout.readline())
        yield addresses
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()


def some_rows(num_rows: int = 4 * _ROWS) -> Rows:
    """Anything to ask about."""
    sizes = np.full(500, 90, np.int32)
    plan = Plan(seed=1, batch_size=num_rows, law=ViewLaw(), samples=range(500), height=sizes, width=sizes)
    return plan.rows(0, 0, num_rows)


def fleet_of(addresses: Sequence[str], look_up: Callable[[str, str], frozenset[str]] = look_up) -> Fleet:
    """A fleet as a run makes it, with small requests."""
    return Fleet(addresses, data_digest=_DIGEST, rows_per_request=_ROWS, look_up=look_up)


def keep_asking(fleet: Fleet, seconds: float, watch: Callable[[float], bool] | None = None) -> float:
    """Keep a queue in front of the fleet for so long, or until `watch` says so; the rows it answered a second."""
    rows = some_rows()
    asked = deque(fleet.ask(rows) for _ in range(4))
    began, answered = time.monotonic(), 0
    while (now := time.monotonic()) - began < seconds and not (watch and watch(now - began)):
        while fleet.state().waiting < fleet.num_slots:
            asked.append(fleet.ask(rows))
        asked.popleft().result()
        answered += len(rows)
    return answered / (time.monotonic() - began)


def rate_of_fleet(addresses: Sequence[str]) -> tuple[float, str]:
    """Rows a second, and what each replica's window was at the end."""
    with fleet_of(addresses) as fleet:
        keep_asking(fleet, _WARM_S)
        before, began = fleet.state().rows, time.monotonic()
        keep_asking(fleet, _MEASURED_S)
        after, now = fleet.state(), time.monotonic()
        return (after.rows - before) / (now - began), "/".join(str(one.window) for one in after.replicas[:8])


def rate_of_round_robin(addresses: Sequence[str]) -> float:
    """Rows a second of gRPC's own balancer, with 3 requests a replica under way."""
    config = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
    target = "ipv4:" + ",".join(addresses)
    with grpc.insecure_channel(target, options=[("grpc.service_config", config)]) as channel:
        stub = pb_grpc.TeacherStub(channel)  # type: ignore[no-untyped-call]
        stub.Describe(pb.DescribeRequest(), wait_for_ready=True)
        request = ask_by_reference(some_rows(_ROWS), _DIGEST)
        end = time.monotonic() + _WARM_S + _MEASURED_S
        counts = []

        def work() -> None:
            while (now := time.monotonic()) < end:
                stub.Predict(request)
                counts.append(now)

        threads = [threading.Thread(target=work) for _ in range(3 * len(addresses))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(when > end - _MEASURED_S for when in counts) * _ROWS / _MEASURED_S


def seconds_until_an_added_replica_answers() -> float:
    """From the moment the name stands for it too."""
    with teachers(200, 200) as addresses:
        known = {addresses[0]}
        with fleet_of(["dns:///teachers:1"], lambda _name, _port: frozenset(known)) as fleet:
            keep_asking(fleet, 4)
            known.add(addresses[1])
            began = time.monotonic()
            keep_asking(
                fleet, 30, lambda _: any(one.target == addresses[1] and one.rows for one in fleet.state().replicas)
            )
            return time.monotonic() - began


def main() -> None:
    """Measure all of it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", nargs="+", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--line-s", type=float, default=0.0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve, asked.line_s)
        return
    held = True
    print("| teachers, rows/s | fleet, rows/s | of | share | windows | round_robin |\n|---|---|---|---|---|---|")
    one = 0.0
    for name, rates, line_s, least in (
        ("1 x 400", [400.0], 0.0, 0.0),
        ("3 x 400", [400.0] * 3, 0.0, 2.9 / 3),
        ("8 x 400", [400.0] * 8, 0.0, 7.6 / 8),
        ("64 x 40", [40.0] * 64, 0.0, 0.9),
        ("100 + 100 + 20", [100.0, 100.0, 20.0], 0.0, 0.9),
        ("400 + 400 + 800", [400.0, 400.0, 800.0], 0.0, 0.9),
        ("1 x 400, 200 ms away", [400.0], 0.2, 0.9),
    ):
        with teachers(*rates, line_s=line_s) as addresses:
            rate, windows = rate_of_fleet(addresses)
            one = one or rate
            full = len(rates) * one if set(rates) == {400.0} else sum(rates)
            held = held and rate >= least * full
            other = rate_of_round_robin(addresses)
        print(f"| {name} | {rate:.0f} | {full:.0f} | {rate / full:.3f} | {windows} | {other:.0f} |", flush=True)
    seconds = seconds_until_an_added_replica_answers()
    held = held and seconds < 15
    print(f"\nan added replica answers after {seconds:.1f} s\n{'held' if held else 'NOT held'}")
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
