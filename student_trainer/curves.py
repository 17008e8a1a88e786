"""Several runs in one picture: accuracy, KL and agreement against epochs on a log axis, as in the paper's figure 3.

Runs that differ in their seed alone are one curve: their mean, and a band from the least to the greatest. Those that
are not as far as the longest of them are thin lines of their own, and no part of the mean.

Rejected: letting the mean go on over the runs that are left. It jumps where one ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter
from numpy.typing import NDArray

from student_trainer.record import Run, Series, evaluated, unit_of
from views.setting import SETTINGS

# Okabe and Ito's colours, which all common kinds of colour blindness can tell apart, and a grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#999999")
_LINES = ("-", "--", ":", "-.")
_FAINT = "#767676"
_DPI = 130
_MAX_MARKERS = 12


@dataclass(frozen=True)
class _Style:
    colour: str
    line: str
    marker: str = "o"


# The eight settings: one colour a crop; a line and a marker for fixed, independent, and the same views.
_OF_SETTING = {
    "fix/rs": _Style("#999999", ":", "s"),
    "fix/cc": _Style("#0072B2", ":", "s"),
    "fix/ic_ens": _Style("#D55E00", ":", "s"),
    "ind/rc": _Style("#0072B2", "--", "^"),
    "ind/ic": _Style("#D55E00", "--", "^"),
    "same/rc": _Style("#0072B2", "-", "o"),
    "same/ic": _Style("#D55E00", "-", "o"),
    "same/ic+mix": _Style("#009E73", "-", "o"),
}


def draw_curves(groups: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Accuracy, agreement and KL on the evaluation split, one curve a group."""
    groups = best_first(groups)
    styles = {name: _Style(_COLOURS[i % 8], _LINES[i // 8 % 4]) for i, name in enumerate(groups)}
    if groups.keys() <= _OF_SETTING.keys():
        styles = _OF_SETTING
    figure = Figure(figsize=(12.8, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _panel(left, groups, "eval/student_top1", "top-1, evaluation split", styles)
    _teacher_lines(left, groups, styles)
    _panel(middle, groups, "eval/agreement_top1", "top-1 agreement with the teacher", styles)
    _panel(right, groups, "eval/kl", "KL(teacher || student), nats", styles)
    for axes in (left, middle):
        _percent(axes.yaxis)
    _legend_below(figure, left)
    figure.savefig(path, dpi=_DPI)


def draw_study(groups: Mapping[str, Sequence[Run]], path: Path) -> None:
    """The consistency study: view setting -> its runs, one a seed."""
    groups = best_first({setting: groups[setting] for setting in SETTINGS if setting in groups})
    figure = Figure(figsize=(15.0, 5.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1.0, 0.85))
    _panel(left, groups, "eval/student_top1", "top-1 on the test pictures", _OF_SETTING)
    _teacher_lines(left, groups, _OF_SETTING)
    _percent(left.yaxis)
    _draw_fit(middle, groups)
    _draw_finals(right, groups)
    _legend_below(figure, left)
    figure.savefig(path, dpi=_DPI)


def best_first(groups: Mapping[str, Sequence[Run]]) -> dict[str, Sequence[Run]]:
    """Groups by their final accuracy; before a run has finished, by the best there is."""
    return dict(sorted(groups.items(), key=lambda item: -_rank(item[1])))


def final_top1(runs: Sequence[Run]) -> float | None:
    """Mean accuracy of the runs that have finished; None if none has."""
    found = [top1 for run in runs if run.finished and (top1 := run.last("eval/student_top1")) is not None]
    return float(np.mean(found)) if found else None


def train_kl(run: Run) -> float | None:
    """Mean KL on training views over the last tenth of a finished run, nats; None for any other."""
    measured = run.over("step", "kl")
    if not measured or not run.finished:
        return None
    return float(measured.value[-max(1, len(measured.value) // 10) :].mean())


def together(measured: Sequence[Series]) -> tuple[Series, Series, Series]:
    """Mean, least and greatest of a quantity over runs, wherever one of them was measured and all had begun.

    Between its own points a run is taken as straight: runs need not have been evaluated at the same epochs.
    """
    begin, end = max(one.step[0] for one in measured), min(one.step[-1] for one in measured)
    at = np.unique(np.concatenate([one.step for one in measured]))
    at = at[(at >= begin) & (at <= end)]
    values: NDArray[np.float64] = np.stack([np.interp(at, one.step, one.value) for one in measured])
    return Series(at, values.mean(0)), Series(at, values.min(0)), Series(at, values.max(0))


def whole_and_short(measured: Iterable[Series]) -> tuple[list[Series], list[Series]]:
    """The series that go as far as the longest one, and the others; empty ones are in neither."""
    some = [one for one in measured if one]
    end = max((one.step[-1] for one in some), default=0.0) * (1 - 1e-6)
    return [one for one in some if one.step[-1] >= end], [one for one in some if one.step[-1] < end]


def _rank(runs: Sequence[Run]) -> float:
    final = final_top1(runs)
    return final if final is not None else max((run.last("eval/student_top1") or 0.0 for run in runs), default=0.0)


def _panel(
    axes: Axes, groups: Mapping[str, Sequence[Run]], name: str, title: str, styles: Mapping[str, _Style]
) -> None:
    runs = [run for members in groups.values() for run in members]
    unit = unit_of(runs)
    _furnish(axes, title, f"{unit}, log scale")
    for label, members in groups.items():
        _curve(axes, [run.over(unit, name) for run in members], label, styles[label])
    if axes.lines:
        _log_ticks(axes)
    else:
        axes.text(0.5, 0.5, _instead(name, evaluated(runs)), transform=axes.transAxes, ha="center", color=_FAINT)
        axes.set(xticks=[], yticks=[])


def _instead(name: str, measured: Sequence[Run]) -> str:
    """What a panel without a curve says: evaluated runs that lack accuracy lack labels, others lack a teacher."""
    if not measured:
        return "not evaluated yet"
    return "no labels: accuracy is not known" if name == "eval/student_top1" else "no teacher to compare with"


def _curve(axes: Axes, measured: Sequence[Series], label: str, style: _Style) -> None:
    whole, short = whole_and_short(measured)
    if not whole:
        return
    mean, least, greatest = together(whole)
    axes.plot(
        mean.step, mean.value, color=style.colour, linestyle=style.line, marker=style.marker, markersize=4.5,
        markevery=_marked(mean.step), label=label,
    )  # fmt: skip
    if len(whole) > 1:
        axes.fill_between(mean.step, least.value, greatest.value, color=style.colour, alpha=0.15, linewidth=0)
    for one in short:
        marker = style.marker if len(one.step) == 1 else ""
        axes.plot(
            one.step, one.value, color=style.colour, linestyle=style.line, linewidth=0.8, marker=marker, markersize=3
        )


def _marked(epochs: NDArray[np.float64]) -> list[int]:
    """Which points of a curve have a marker: few, at about even distances on the log axis, and the last."""
    wanted = np.geomspace(epochs[0], epochs[-1], _MAX_MARKERS)
    return sorted({int(np.abs(epochs - epoch).argmin()) for epoch in wanted})


def _teacher_lines(axes: Axes, groups: Mapping[str, Sequence[Run]], styles: Mapping[str, _Style]) -> None:
    """One line a teacher; where there are several, in the colour of the first group that it taught."""
    taught: dict[float, str] = {}
    for label, runs in groups.items():
        for run in runs:
            if (top1 := run.last("eval/teacher_top1")) is not None:
                taught.setdefault(round(top1, 4), styles[label].colour)
    for i, (top1, colour) in enumerate(taught.items()):
        axes.axhline(
            top1, color=colour if len(taught) > 1 else "#555555", linestyle=(0, (6, 3)), linewidth=1.2,
            label="teacher" if i == 0 else None,
        )  # fmt: skip


def _draw_fit(axes: Axes, groups: Mapping[str, Sequence[Run]]) -> None:
    """How well the student fits the teacher on the views that it trains on, and how well it does on new pictures."""
    _furnish(
        axes, "fit on training views, and accuracy", "KL on training views, mean of the last tenth, nats, log scale"
    )
    axes.grid(color="#e6e6e6", linewidth=0.8)
    for setting, runs in groups.items():
        points = [(train_kl(run), run.last("eval/student_top1")) for run in runs]
        known = [(kl, top1) for kl, top1 in points if kl is not None and top1 is not None]
        if known:
            style = _OF_SETTING[setting]
            axes.plot(*zip(*known, strict=True), style.marker, color=style.colour, markersize=8, alpha=0.85)
    if axes.lines:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        _percent(axes.yaxis)
        axes.margins(x=0.1, y=0.1)
    else:
        axes.text(0.5, 0.5, "no run has finished", transform=axes.transAxes, ha="center", color=_FAINT)
        axes.set(xticks=[], yticks=[])


def _draw_finals(axes: Axes, groups: Mapping[str, Sequence[Run]]) -> None:
    going_on = any(not run.finished for runs in groups.values() for run in runs)
    _furnish(axes, "top-1 in the end, each seed", "hollow: not finished" if going_on else "bar: mean of the seeds")
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    for place, (setting, runs) in enumerate(groups.items()):
        style = _OF_SETTING[setting]
        if (mean := final_top1(runs)) is not None:
            axes.plot([mean, mean], [place - 0.25, place + 0.25], color=style.colour, linewidth=2.5)
        for run in runs:
            if (top1 := run.last("eval/student_top1")) is not None:
                axes.plot(
                    top1, place, style.marker, color=style.colour, markersize=6.5,
                    fillstyle="full" if run.finished else "none",
                )  # fmt: skip
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    _percent(axes.xaxis)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _furnish(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, color=_FAINT)
    axes.set_xlabel(x_label, fontsize=9, color=_FAINT)


def _percent(axis: XAxis | YAxis) -> None:
    axis.set_major_formatter(PercentFormatter(1.0))


def _log_ticks(axes: Axes) -> None:
    """Ticks at 1, 2 and 5 of a decade; over more than three decades the locator's own, one a decade."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high / low < 1e3:
        axes.set_xticks([m * 10.0**e for e in range(-4, 9) for m in (1, 2, 5) if low <= m * 10.0**e <= high])
        axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_minor_locator(NullLocator())


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        longest = max(map(len, labels))
        columns = max(1, min(len(labels), 9, 190 // (longest + 8)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _short(epoch: float, _: int | None = None) -> str:
    """12000 as 12k: the paper's longest run has a million epochs."""
    if epoch >= 1e6:
        return f"{epoch / 1e6:g}M"
    return f"{epoch / 1e3:g}k" if epoch >= 1e3 else f"{epoch:g}"
