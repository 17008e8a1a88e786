"""All that needs a GPU, in one go within ten minutes: `python -m benchmarks.gpu --json FILE` (rows 1 to 5).

Each part is a command of its own, in a process of its own: one that fails, hangs or spoils the device costs its own
rows and no other's, and can be run again by itself. Parts have a share of the time each, the most important first; what
does not fit is said to be missing. After every figure all of them are in runs/gpu.json, so that a machine that is taken
away takes little with it.

The teachers have random weights: nothing is downloaded, and no time depends on them. Without a GPU: the rows, and no
numbers. Rows 3 and 4 have their CPU form in benchmarks/service.py and step.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import figure
from benchmarks.figure import Figure

_ROOT = Path(__file__).resolve().parents[2]
_PARTIAL = Path("runs/gpu.json")
_ALL_S = 580.0
_LARGE, _SMALL = "resnetv2_152x2_bit", "resnetv2_50x1_bit"


@dataclass(frozen=True, slots=True)
class Part:
    """One command."""

    command: tuple[str, ...]
    """A module of benchmarks/gpu and its arguments; it prints figures as JSON, one a line."""
    budget_s: float
    expected: tuple[Figure, ...] = ()
    """What it should print, without numbers."""


def parts(quick: bool) -> list[Part]:
    """All there are; the quick ones see that everything runs, with the small network."""
    from benchmarks.gpu import forward, run, service, step

    def passes(network: str, size: int, budget_s: float, *options: str) -> Part:
        command = ("forward", network, str(size), *options)
        return Part(command, budget_s, tuple(forward.unmeasured(network, size, "")))

    if quick:
        return [passes(_SMALL, 64, 120, "--quick")]
    return [
        passes(_LARGE, 224, 140, "--norm"),
        Part(("service", _LARGE, "224"), 90, (service.unmeasured(_LARGE, 224, ""),)),
        passes(_SMALL, 224, 70),
        Part(("run", _LARGE, _SMALL, "224"), 150, (run.unmeasured(_LARGE, _SMALL, 224, ""),)),
        Part(("step", _SMALL, "224"), 60, (step.unmeasured(_SMALL, 224, ""),)),
        passes(_LARGE, 384, 120),
        passes(_LARGE, 128, 90),
    ]


def measure(quick: bool) -> Iterator[Figure]:
    """All parts, one after the other."""
    import torch

    if not torch.cuda.is_available():
        for part in parts(quick=False):
            yield from _missing(part.expected, "no GPU on this machine")
        return
    yield from _kept(run_all(parts(quick), _ALL_S), _PARTIAL)


def run_all(planned: Iterable[Part], seconds: float) -> Iterator[Figure]:
    """The figures of parts that have so many seconds in all."""
    end = time.monotonic() + seconds
    for part in planned:
        left_s = min(part.budget_s, end - time.monotonic())
        seen: set[str] = set()
        why = "no time was left for it"
        if left_s > 0:
            print(f"== {' '.join(part.command)}: {left_s:.0f} s at most", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", f"benchmarks.gpu.{part.command[0]}", *part.command[1:]]
            why = yield from _run(command, left_s, seen)
        yield from _missing((one for one in part.expected if one.name not in seen), why)


def _run(command: list[str], seconds: float, seen: set[str]) -> Generator[Figure, None, str]:
    """The figures that a command prints; returns why there are no more."""
    began = time.monotonic()
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:

        def end() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if (one := _parsed(line)) is not None:
                    seen.add(one.name)
                    yield one
        finally:
            timer.cancel()
            end()
    if time.monotonic() - began >= seconds:
        return f"cut off after {seconds:.0f} s"
    return f"python {' '.join(command[1:])} printed no such figure, and said why"


def _parsed(line: str) -> Figure | None:
    """A figure, or whatever else a library prints."""
    try:
        said = json.loads(line)
        return Figure(**{**said, "goal": said["goal"] and tuple(said["goal"])})
    except (ValueError, TypeError, KeyError):
        print(line, end="", file=sys.stderr, flush=True)
        return None


def _missing(expected: Iterable[Figure], why: str) -> Iterator[Figure]:
    for one in expected:
        yield dataclasses.replace(one, note=why)


def _kept(figures: Iterable[Figure], file: Path) -> Iterator[Figure]:
    """The same; after each, all so far are in the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    machine, so_far = figure.machine(), []
    for one in figures:
        so_far.append(dataclasses.asdict(one) | {"met": one.met})
        file.write_text(json.dumps({"machine": machine, "figures": so_far}, indent=1) + "\n")
        yield one


if __name__ == "__main__":
    figure.present(measure, __doc__)
