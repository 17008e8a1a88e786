"""How a cost grows with the work: points, the slope of a straight line through their logarithms, and a picture.

A slope of 0 is a cost that does not grow, 1 one that doubles with the work. Rejected: fitting a + b x. Where costs span
four decades it sees the largest point alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.figure import Figure, Goal

# The house look of student_trainer/curves.py.
_BLUE, _FAINT, _GRID = "#0072B2", "#767676", "#e6e6e6"
_DPI = 130

FLAT: Goal = ("<=", 0.1)
"""Of a slope: a thousand times the work costs twice as much at most."""
LINEAR: Goal = ("<=", 1.1)
AS_MUCH_MORE: Goal = (">=", 0.95)
"""Of what is delivered: a replica more is a replica's worth more."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What was measured of one thing."""

    name: str
    """Of what costs: "drawing 4096 rows"."""
    by: str
    """What grows: "pictures"."""
    unit: str
    sizes: Sequence[float]
    values: Sequence[float]
    goal: Goal
    fitted: int = 0
    """The slope is fitted from this point on."""
    beside: str = ""
    alternative: float | None = None
    note: str = ""

    @property
    def slope(self) -> float:
        """In log-log, by least squares."""
        x, y = np.log(self.sizes[self.fitted :]), np.log(self.values[self.fitted :])
        return float(np.polyfit(x, y, 1)[0])

    def figure(self) -> Figure:
        """As a row of the table: the last point, and the slope is judged."""
        points = ", ".join(
            f"{short(size)}: {value:,.3g}" for size, value in zip(self.sizes, self.values, strict=True)
        )  # fmt: skip
        since = f" from {short(self.sizes[self.fitted])} on" if self.fitted else ""
        return Figure(
            row="12", name=f"{self.name}, {short(self.sizes[-1])} {self.by}; how it grows from {short(self.sizes[0])}",
            value=self.values[-1], unit=self.unit, goal=self.goal, judged=self.slope, beside=self.beside,
            alternative=self.alternative,
            note=f"judged: slope in log-log{since}; {points}{self.note and '; '}{self.note}",
        )  # fmt: skip


def draw(curves: Sequence[Curve], path: Path) -> None:
    """One panel a curve, both axes logarithmic, and a thin line with slope 1 to compare with."""
    columns = 4
    rows = -(-len(curves) // columns)
    picture = Picture(figsize=(3.9 * columns, 3.3 * rows), layout="constrained")
    panels = picture.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    for axes, curve in zip(panels, curves, strict=False):
        _panel(axes, curve)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=_DPI)


def short(number: float) -> str:
    """1000000 as 1M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _panel(axes: Axes, curve: Curve) -> None:
    sizes, values = np.asarray(curve.sizes, float), np.asarray(curve.values, float)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot(sizes, values[-1] * sizes / sizes[-1], color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.plot(sizes, values, color=_BLUE, marker="o", markersize=4.5)
    axes.set_ylim(values.min() / 4, values.max() * 4)
    axes.set_title(f"{curve.name}, {curve.unit}", loc="left", fontsize=10)
    axes.text(0.03, 0.94, f"slope {curve.slope:.2f}", transform=axes.transAxes, va="top", fontsize=9, color=_BLUE)
    axes.set_xlabel(curve.by, fontsize=9, color=_FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, color=_FAINT)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axis.set_minor_formatter(NullFormatter())
