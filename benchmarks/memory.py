"""Row 10: does memory grow? `python -m benchmarks.memory [--minutes 60]`: a teacher server and a loader at full speed.

A real server process, and a process with a real loader and its fleet: it plans, reads, asks by reference, renders and
takes the answers, batch after batch, as a run does whose student costs nothing. Resident memory of each is looked at
every second. Flat means: the median of the last fifth of the time is above that of the second fifth by 5 % at most and
by 30 MiB at most; the first fifth warms up. Judged is the growth as a share of what is allowed.

Rejected: tracemalloc. It sees Python's memory, and what would leak here is torch's, DALI's and gRPC's.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import figure
from benchmarks.figure import Figure
from benchmarks.load import make_model, resident_mib
from benchmarks.photographs import prepared
from data_prep.index import Index

_ROOT = Path(__file__).resolve().parents[1]
_MINUTES, _QUICK_MINUTES = 4.0, 1 / 3
_BATCH, _SIZE, _REQUEST = 64, 64, 32
_PICTURES = 120
_ALLOWED_SHARE, _ALLOWED_MIB = 0.05, 30.0
_EVERY_S = 1.0


def measure(quick: bool, minutes: float = _MINUTES) -> Iterator[Figure]:
    """Row 10: the server, and the loader."""
    minutes = _QUICK_MINUTES if quick else minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = prepared(folder, _PICTURES // 4 if quick else _PICTURES)
        memory, rows_per_s = watch(folder, index.root, 60 * minutes)
    for who, mib in memory.items():
        yield judge(who, mib, minutes, rows_per_s)


def judge(who: str, mib: Sequence[float], minutes: float, rows_per_s: float) -> Figure:
    """What its memory did, from MiB at even times."""
    fifth = len(mib) // 5
    fifths = [statistics.median(mib[i * fifth : (i + 1) * fifth]) for i in range(5)]
    second, last = fifths[1], fifths[-1]
    went = ", ".join(f"{one:.0f}" for one in fifths)
    return Figure(
        row="10", name=f"memory of the {who} over {minutes:.3g} min at full speed: last fifth over second",
        value=last / second, unit="x", goal=("<=", 1.0),
        judged=(last - second) / min(_ALLOWED_SHARE * second, _ALLOWED_MIB),
        note=f"MiB by fifths {went}, at most {max(mib):.0f}; {rows_per_s:.0f} rows/s; judged: growth as a share of "
        f"{_ALLOWED_SHARE:.0%} and {_ALLOWED_MIB:.0f} MiB",
    )  # fmt: skip


def watch(folder: Path, data: Path, seconds: float) -> tuple[dict[str, list[float]], float]:
    """MiB of each process as time went, and the rows a second that went through both."""
    address_file = folder / "address"
    teacher = [
        sys.executable, "-m", "teacher_server.main", f"--model={make_model(folder)}", f"--data={data}", "--device=cpu",
        "--address=127.0.0.1:0", f"--address-file={address_file}", "--threads=1", "--gate-images=8",
        "--exit-when-stdin-closes",
    ]  # fmt: skip
    memory: dict[str, list[float]] = {"server": [], "loader": []}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(teacher, cwd=_ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            while not address_file.exists():
                if server.poll() is not None:
                    raise RuntimeError(f"the server ended: {(folder / 'log').read_text()[-2000:]}")
                time.sleep(0.1)
            command = [sys.executable, "-m", "benchmarks.memory", "--load", str(data), address_file.read_text().strip()]
            with subprocess.Popen(
                command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as loader:
                assert loader.stdout is not None and loader.stdin is not None
                if not loader.stdout.readline():
                    raise RuntimeError("the loader ended before its first batch")
                began = time.monotonic()
                while time.monotonic() - began < seconds:
                    time.sleep(_EVERY_S)
                    for who, process in (("server", server), ("loader", loader)):
                        if process.poll() is not None:
                            raise RuntimeError(
                                f"the {who} ended with exit code {process.returncode} while it was watched"
                            )
                        memory[who].append(resident_mib(process.pid))
                loader.stdin.close()
                num_rows = int(loader.stdout.read())
        finally:
            assert server.stdin is not None
            server.stdin.close()
            server.wait()
    return memory, num_rows / (time.monotonic() - began)


def load(data: Path, address: str) -> None:
    """Make batches and take their answers until standard input ends; a line after the first, then how many rows."""
    from student_trainer.fleet import Fleet
    from student_trainer.loader import Lesson, Source, run_ahead
    from student_trainer.teachers import LiveTeacher
    from views.draw import Plan, ViewLaw
    from views.render import Renderer, Rendering

    torch.set_num_threads(1)
    over = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=listen, daemon=True).start()
    index = Index.open(data)
    samples = index.splits["train"]
    plan = Plan(
        seed=0, batch_size=_BATCH, law=ViewLaw(), samples=samples, height=index.height, width=index.width
    )  # fmt: skip
    lessons = (Lesson(step, rows, rows) for step in itertools.count() for rows in [plan.rows(step)])
    renderer = Renderer(Rendering(size=_SIZE), _BATCH + 1, None, 1)
    num_rows = 0
    with Fleet([address], data_digest=index.digest, client="memory", rows_per_request=_REQUEST) as fleet:
        batches = run_ahead(Source(index, renderer, [LiveTeacher(fleet, None, lambda _step: 1)]), lessons, 3)
        for batch in batches:
            if not torch.isfinite(torch.from_numpy(batch.targets[0].result())).all():
                raise RuntimeError(f"step {batch.lesson.step} has an answer that is no number")
            batch.targets[0].audit()
            num_rows += len(batch.rows)
            if num_rows == _BATCH:
                print("first", flush=True)
            if over.is_set():
                break
        batches.close()
    print(num_rows, flush=True)


def main() -> None:
    """Measure, or be the loader."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--load", nargs=2, metavar=("DATA", "ADDRESS"))
    parser.add_argument("--minutes", type=float, default=_MINUTES)
    asked, rest = parser.parse_known_args()
    if asked.load:
        load(Path(asked.load[0]), asked.load[1])
        return
    figure.present(functools.partial(measure, minutes=asked.minutes), __doc__, rest)


if __name__ == "__main__":
    main()
