"""What a benchmark says: figures, each beside its alternative and its floor, and whether its goal is met.

Every row of the table in docs/performance.md is a module here with a `measure(quick)` that yields figures, and a
command of its own, `python -m benchmarks.NAME [--quick] [--json FILE]`; `python -m benchmarks.bench` runs them all.
Rejected: pytest-benchmark. It compares a function with its own past; we compare it with what a user would do instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

Goal = tuple[Literal[">=", "<="], float]
_NONE = "-"
_BAR = r"\|"  # inside a cell


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured number. A None is a number that could not be measured here, and `note` says why."""

    row: str
    """Of the table: "1" to "12"."""
    name: str
    """What was measured, with its size: "loader, 224 px, JPEGs of 500 x 375"."""
    value: float | None
    unit: str
    beside: str = ""
    """The alternative, measured in the same run; empty: there is none."""
    alternative: float | None = None
    """In the same unit."""
    floor: float | None = None
    """What the machine's limits allow, in the same unit; `note` says how it was computed."""
    goal: Goal | None = None
    """What `judged` must reach."""
    judged: float | None = None
    """The number that the goal is about, mostly a ratio."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal or without a number."""
        if self.goal is None or self.judged is None:
            return None
        relation, bound = self.goal
        return self.judged >= bound if relation == ">=" else self.judged <= bound


Measure = Callable[[bool], Iterable[Figure]]


def table(figures: Iterable[Figure]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield "| # | figure | measured | beside it | floor | goal | reached |"
    yield "|---|---|---|---|---|---|---|"
    for one in figures:
        beside = f"{_say(one.alternative)} ({one.beside})" if one.beside else ""
        goal = f"{one.goal[0]} {_say(one.goal[1])}" if one.goal else ""
        reached = {True: f"yes: {_say(one.judged)}", False: f"**no**: {_say(one.judged)}", None: ""}[one.met]
        value = f"{_say(one.value)} {one.unit}" if one.value is not None else f"not measured: {one.note}"
        floor = _say(one.floor) if one.floor is not None else ""
        cells = one.row, one.name, value, beside, floor, goal, reached
        yield f"| {' | '.join(cell.replace('|', _BAR) for cell in cells)} |"


def notes(figures: Iterable[Figure]) -> Iterator[str]:
    """A line for each figure that has something to add: how its floor was computed, what was tried where it misses."""
    for one in figures:
        if one.note and one.value is not None:
            yield f"* {one.row}, {one.name}: {one.note}"


def machine() -> dict[str, Any]:
    """Where and with what the figures were measured."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "gpu": _gpu(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "timm", "grpcio", "nvidia-dali-cuda130", "numpy")},
    }


def present(measure: Measure, description: str | None, args: Sequence[str] | None = None) -> None:
    """The command of one benchmark: print its figures, and write them as JSON if asked to, before an error too."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs; the figures mean little")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    asked = parser.parse_args(args)
    figures: list[Figure] = []
    try:
        for figure in measure(asked.quick):
            figures.append(figure)
            print(f"{figure.name}: {_say(figure.value)} {figure.unit}", file=sys.stderr, flush=True)
    finally:
        if asked.json:
            asked.json.write_text(json.dumps([dataclasses.asdict(one) for one in figures], indent=1) + "\n")
    print("\n".join([*table(figures), "", *notes(figures)]))


def read(file: Path) -> Sequence[Figure]:
    """The figures that `present` wrote."""
    return [Figure(**{**one, "goal": one["goal"] and tuple(one["goal"])}) for one in json.loads(file.read_text())]


def _say(number: float | None) -> str:
    if number is None:
        return _NONE
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
