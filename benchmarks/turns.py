"""Contenders that are timed in turns, A B A B ..., so that a machine that slows down slows all of them.

Times are by the clock, from the first call to the end of the last one's work on the device. Rejected: CUDA events. They
leave out what the CPU does between two kernels, which is a difference between contenders.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that is timed."""

    num_rows: int
    """Of one call."""
    call: Callable[[], object]
    settings: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """Entered around calls."""


def in_turns(
    contenders: Mapping[str, Contender], device: torch.device, *, rounds: int, burst_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds a call of each, by round: A B A B ..., each for about burst_s before the next has its turn."""
    calls = dict.fromkeys(contenders, 1)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-2, rounds):  # one to warm up, one to see how long a call takes
        for name, one in contenders.items():
            with one.settings():
                _wait(device)
                began = clock()
                for _ in range(calls[name]):
                    one.call()
                _wait(device)
                seconds = (clock() - began) / calls[name]
            if number == -1:
                calls[name] = max(1, math.ceil(burst_s / max(seconds, 1e-9)))
            elif number >= 0:
                times[name].append(seconds)
    return times


def rates(contenders: Mapping[str, Contender], times: Mapping[str, list[float]]) -> dict[str, float]:
    """Rows a second, at the median time."""
    return {name: one.num_rows / statistics.median(times[name]) for name, one in contenders.items()}


def paired(contenders: Mapping[str, Contender], times: Mapping[str, list[float]], ours: str, theirs: str) -> float:
    """How many times faster ours is: the median over the rounds."""
    rows = contenders[ours].num_rows / contenders[theirs].num_rows
    return statistics.median(rows * b / a for a, b in zip(times[ours], times[theirs], strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
