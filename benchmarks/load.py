"""Does a teacher hold under load? `python -m benchmarks.load [--minutes 10]`: 8 clients at full speed, 2 replicas.

Real server processes with a network that costs little, and client processes that never pause: each keeps --window
requests under way, half of them at each replica, comes back when it is told to, and has a name of its own. Every answer
must be the one that was asked for. Printed each minute: rows/s of all, the refusals, how equal the clients' shares are,
and the servers' resident memory.

A minute's throughput is also given as what it would be on a machine as the first minute's: divided by how fast a
fixed piece of work went meanwhile (in CPU time, so that it feels shared caches and clocks, and not our own load) and by
the share of the cores that processes other than ours left to us. On a virtual machine both change by a fifth within
minutes.

Held, if there was no error but RESOURCE_EXHAUSTED, no replica's memory after any minute is more than 5 % above that
after the first, and no minute's throughput, on equal terms, is more than 10 % away from the first one's. Otherwise it
exits with 1.

Clients are plain gRPC, and not the student's: what they ask is what any caller may ask.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import grpc
import numpy as np

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from views.view import Rows
from views.wire import ask_pixels

_ROOT = Path(__file__).resolve().parents[1]
_SIZE, _CLASSES = 32, 10
_WARM_UP_S = 20.0  # connections, allocator, caches: before the first minute
_DIFFERENT_REQUESTS = 8
_MEMORY, _THROUGHPUT = 1.05, 0.10

_YARD_EVERY_S = 0.5

_News = tuple[str, Counter[str], list[str]]  # a client's name, what it counted since the last time, what was wrong


def make_model(folder: Path) -> Path:
    """A small network; what it says does not matter, but that it always says the same."""
    import torch  # here, and not in every client process

    import models

    torch.manual_seed(0)
    model = models.create("resnetv2_14x05_bit", _CLASSES)
    half = (0.5, 0.5, 0.5)
    card = models.ModelCard(architecture="resnetv2_14x05_bit", num_classes=_CLASSES, size=_SIZE, mean=half, std=half)
    models.save(folder / "small.safetensors", model, card)
    return folder / "small.safetensors"


@contextlib.contextmanager
def servers(folder: Path, num: int) -> Iterator[list[tuple[subprocess.Popen[bytes], str]]]:
    """Server processes and their addresses."""
    model, environment = make_model(folder), {**os.environ, "OMP_NUM_THREADS": "1"}
    processes, files = [], [folder / f"address{number}" for number in range(num)]
    for number, file in enumerate(files):
        command = [
            sys.executable, "-m", "teacher_server.main", f"--model={model}", "--address=127.0.0.1:0", "--device=cpu",
            "--threads=1", "--gate-images=8", f"--address-file={file}",
        ]  # fmt: skip
        with (folder / f"log{number}").open("wb") as log:
            processes.append(subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=log, stderr=log))
    try:
        while not all(file.exists() for file in files):
            if any(process.poll() is not None for process in processes):
                sys.exit((folder / "log0").read_text())
            time.sleep(0.1)
        yield [(process, file.read_text().strip()) for process, file in zip(processes, files, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Client:
    """One client process: so many threads, each with one request under way."""

    def __init__(self, name: str, addresses: list[str], num_rows: int, over: Event) -> None:
        self._name, self._num_rows, self._over = name, num_rows, over
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._stubs = [
            pb_grpc.TeacherStub(grpc.insecure_channel(address, options=options))  # type: ignore[no-untyped-call]
            for address in addresses
        ]
        fingerprint = self._stubs[0].Describe(pb.DescribeRequest(), timeout=60).fingerprint
        self._requests = [_request(seed, num_rows, fingerprint, name) for seed in range(_DIFFERENT_REQUESTS)]
        self._right: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._wrong: list[str] = []

    def run(self, window: int, news: Queue[_News]) -> None:
        """Ask until it is over, and send news every second."""
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(window)]
        for thread in threads:
            thread.start()
        while not self._over.wait(1.0):
            with self._lock:
                counts, self._counts = self._counts, Counter()
                wrong, self._wrong = self._wrong, []
            news.put((self._name, counts, wrong))
        for thread in threads:
            thread.join()

    def _ask(self, number: int) -> None:
        stub = self._stubs[number % len(self._stubs)]
        turn = number
        while not self._over.is_set():
            seed, turn = turn % _DIFFERENT_REQUESTS, turn + 1
            request = pb.PredictRequest()
            request.CopyFrom(self._requests[seed])
            request.request_id = f"{self._name} {number} {turn}"
            try:
                reply = stub.Predict(request, timeout=60)
            except grpc.RpcError as error:
                self._note_error(error)
            else:
                self._note_answer(seed, request, reply)

    def _note_error(self, error: grpc.RpcError) -> None:
        code, words = error.code(), error.details()
        with self._lock:
            self._counts[code.name] += 1
            if code != grpc.StatusCode.RESOURCE_EXHAUSTED:
                self._wrong.append(f"{code.name}: {words}")
        metadata = error.trailing_metadata() or ()
        hints = [float(entry.value) for entry in metadata if entry.key == "grpc-retry-pushback-ms"]
        if not hints and code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            with self._lock:
                self._counts["without a hint"] += 1
        self._over.wait(hints[0] / 1000 if hints else 0.1)

    def _note_answer(self, seed: int, request: pb.PredictRequest, reply: pb.PredictReply) -> None:
        with self._lock:
            self._counts["rows"] += self._num_rows
            right = self._right.setdefault(seed, reply.logits.data)
            if reply.request_id != request.request_id or reply.logits.data != right:
                self._wrong.append(f"asked {request.request_id}, got a wrong answer named {reply.request_id}")


def _request(seed: int, num_rows: int, fingerprint: str, client: str) -> pb.PredictRequest:
    rng = np.random.default_rng((8, seed))
    rows = Rows(
        sample=np.arange(num_rows), box=np.tile(np.array([0, 0, 9, 9], np.int32), (num_rows, 1)),
        flip=np.zeros(num_rows, np.bool_), partner=np.roll(np.arange(num_rows, dtype=np.int32), 1),
        lam=rng.random(num_rows, dtype=np.float32),
    )  # fmt: skip
    request = ask_pixels(rows, rng.integers(0, 256, (num_rows, _SIZE, _SIZE, 3), dtype=np.uint8))
    request.fingerprint, request.client = fingerprint, client
    return request


def run_client(name: str, addresses: list[str], num_rows: int, window: int, over: Event, news: Queue[_News]) -> None:
    """What a client process does."""
    Client(name, addresses, num_rows, over).run(window, news)


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def gather(news: Queue[_News], until: float) -> tuple[dict[str, Counter[str]], list[str]]:
    """What the clients counted until a time, by client; and what was wrong."""
    counts: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    while (left_s := until - time.monotonic()) > 0:
        with contextlib.suppress(queue.Empty):
            name, counted, said = news.get(timeout=left_s)
            counts.setdefault(name, Counter()).update(counted)
            wrong += said
    return counts, wrong


class Yardstick:
    """How much machine there was: how fast its cores were, and what share of them others left to us."""

    def __init__(self, pids: Sequence[int]) -> None:
        """Take our own processes, this one aside, and begin to look."""
        self._numbers = np.random.default_rng(0).random(
            2**18, dtype=np.float32
        )  # 1 MB: the cache's and the core's work
        self._pids = [*pids, os.getpid()]
        self._speeds: list[float] = []
        self._since = self._seconds()
        threading.Thread(target=self._work, daemon=True).start()

    def read(self) -> float:
        """Of the time since the last reading: work done in a CPU second, times the share of the cores that was ours."""
        speeds, self._speeds = self._speeds, []
        before, self._since = self._since, self._seconds()
        elapsed, busy, ours = (now - then for now, then in zip(self._since, before, strict=True))
        cores = len(os.sched_getaffinity(0))
        return statistics.median(speeds) * (1 - max(0.0, busy - ours) / (elapsed * cores))

    def _work(self) -> None:
        while True:
            began = time.thread_time()
            for _ in range(3):
                np.sort(self._numbers)
            self._speeds.append(1 / (time.thread_time() - began))
            time.sleep(_YARD_EVERY_S)

    def _seconds(self) -> tuple[float, float, float]:
        """By the clock, of all processes, and of ours."""
        user, nice, system, _idle, _wait, interrupt, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        tick = os.sysconf("SC_CLK_TCK")
        ours = 0
        for pid in self._pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ours += int(fields[11]) + int(fields[12])
        return time.monotonic(), (user + nice + system + interrupt + soft + steal) / tick, ours / tick


def measure(
    pids: list[int], clients: list[int], news: Queue[_News], minutes: float
) -> tuple[list[float], list[list[float]], list[str]]:
    """Print a line a minute. Rows/s on equal terms and the servers' MiB by minute, and what was wrong."""
    _, wrong = gather(news, time.monotonic() + _WARM_UP_S)
    yardstick = Yardstick([*pids, *clients])
    print(
        "minute    rows/s   on equal terms   refused   without a hint   smallest : largest share   "
        "memory of each replica, MiB"
    )
    speeds, memory = [], []
    first_machine = 0.0
    for minute in range(1, max(1, round(minutes)) + 1):
        counts, said = gather(news, time.monotonic() + 60)
        wrong += said
        machine = yardstick.read()
        first_machine = first_machine or machine
        total = sum(counts.values(), Counter())
        rows = [one["rows"] for one in counts.values()]
        speeds.append(total["rows"] / 60 * first_machine / machine)
        memory.append([resident_mib(pid) for pid in pids])
        print(
            f"{minute:6}{total['rows'] / 60:10.0f}{speeds[-1]:17.0f}{total['RESOURCE_EXHAUSTED']:10}"
            f"{total['without a hint']:17}{min(rows) / max(rows):27.2f}   "
            f"{'  '.join(f'{mib:.0f}' for mib in memory[-1])}",
            flush=True,
        )
    return speeds, memory, wrong


def verdict(speeds: list[float], memory: list[list[float]], wrong: list[str]) -> list[str]:
    """What did not hold."""
    broken = [f"{number} x {words}" for words, number in Counter(wrong).most_common(10)]
    for replica, (first, *later) in enumerate(zip(*memory, strict=True), 1):
        if max(later, default=first) > _MEMORY * first:
            broken.append(f"replica {replica} grew from {first:.0f} to {max(later):.0f} MiB")
    for minute, speed in enumerate(speeds, 1):
        if abs(speed / speeds[0] - 1) > _THROUGHPUT:
            broken.append(f"minute {minute}: {speed:.0f} rows/s on equal terms, the first {speeds[0]:.0f}")
    return broken


def main() -> None:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--window", type=int, default=6, help="requests that a client keeps under way")
    parser.add_argument("--rows", type=int, default=32, help="rows of a request")
    asked = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    news, over = spawn.Queue(), spawn.Event()
    with tempfile.TemporaryDirectory() as folder, servers(Path(folder), asked.replicas) as running:
        addresses = [address for _, address in running]
        clients = [
            spawn.Process(target=run_client, args=(f"run {i}", addresses, asked.rows, asked.window, over, news))
            for i in range(asked.clients)
        ]
        for client in clients:
            client.start()
        try:
            speeds, memory, wrong = measure(
                [process.pid for process, _ in running],
                [int(client.pid or 0) for client in clients],
                news,
                asked.minutes,
            )
        finally:
            over.set()
            for client in clients:
                client.join(70)
        logs = [(Path(folder) / f"log{number}").read_text() for number in range(asked.replicas)]
    broken = verdict(speeds, memory, wrong)
    print(f"\nlines in the servers' logs: {', '.join(str(log.count(chr(10))) for log in logs)}")
    print("held" if not broken else "not held:\n  " + "\n  ".join(broken))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
