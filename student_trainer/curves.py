"""Several runs in one picture: accuracy, KL and agreement against epochs on a log axis, as in the paper's figure 3.

A group of runs that differ in their seed alone is one curve: their mean, and a band from the least to the greatest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator, PercentFormatter

from student_trainer.record import Run, Series
from views.setting import SETTINGS

# Okabe and Ito's colours, which all common kinds of colour blindness can tell apart, and a grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#999999")
_FAINT = "#767676"
_DPI = 130

# The study: one colour a crop, one line a way of showing it. Fixed dotted, independent dashed, the same solid.
_STUDY_STYLES = {
    "fix/rs": ("#999999", ":"),
    "fix/cc": ("#0072B2", ":"),
    "fix/ic_ens": ("#D55E00", ":"),
    "ind/rc": ("#0072B2", "--"),
    "ind/ic": ("#D55E00", "--"),
    "same/rc": ("#0072B2", "-"),
    "same/ic": ("#D55E00", "-"),
    "same/ic+mix": ("#009E73", "-"),
}


def draw_curves(groups: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Accuracy, agreement and KL on the evaluation split, one curve a group."""
    figure = Figure(figsize=(15.0, 4.6), layout="constrained")
    styles = {name: (_COLOURS[i % len(_COLOURS)], "-") for i, name in enumerate(groups)}
    left, middle, right = figure.subplots(1, 3)
    _panel(left, groups, "eval/student_top1", "top-1 on the evaluation split", styles)
    _teacher_line(left, groups)
    _panel(middle, groups, "eval/agreement_top1", "top-1 agreement with the teacher", styles)
    _panel(right, groups, "eval/kl", "KL(teacher || student), nats", styles)
    for axes in (left, middle):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    figure.savefig(path, dpi=_DPI)


def draw_study(groups: Mapping[str, Sequence[Run]], path: Path) -> None:
    """The consistency study: view setting -> its runs, one a seed."""
    known = {setting: groups[setting] for setting in SETTINGS if setting in groups}
    by_final = dict(sorted(known.items(), key=lambda item: -_final(item[1], "eval/student_top1")))
    figure = Figure(figsize=(15.0, 5.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1.0, 0.85))
    _panel(left, by_final, "eval/student_top1", "top-1 on the test pictures", _STUDY_STYLES)
    _teacher_line(left, by_final)
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.94))  # below the teacher's line
    _draw_fit(middle, by_final)
    _draw_finals(right, by_final)
    figure.savefig(path, dpi=_DPI)


def together(runs: Sequence[Run], name: str) -> tuple[Series, Series, Series]:
    """Mean, least and greatest of a quantity over runs, at the epochs that all of them have."""
    measured = [run.over_epochs(name) for run in runs]
    shared = sorted(set.intersection(*(set(one.step.round(9).tolist()) for one in measured)))
    at = np.asarray(shared, dtype=np.float64)
    values = np.stack([one.value[np.isin(one.step.round(9), at)] for one in measured])
    return Series(at, values.mean(0)), Series(at, values.min(0)), Series(at, values.max(0))


def _panel(
    axes: Axes, groups: Mapping[str, Sequence[Run]], name: str, title: str, styles: Mapping[str, tuple[str, str]]
) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.tick_params(labelsize=9, color=_FAINT)
    unit = "epoch" if all(run.facts for runs in groups.values() for run in runs) else "step"
    axes.set_xlabel(f"{unit}, log scale", fontsize=9, color=_FAINT)
    for label, runs in groups.items():
        mean, least, greatest = together(runs, name)
        if not mean:
            continue
        colour, line = styles[label]
        marker = "o" if len(mean.step) <= 20 else ""
        axes.plot(mean.step, mean.value, color=colour, linestyle=line, marker=marker, markersize=3.5, label=label)
        if len(runs) > 1:
            axes.fill_between(mean.step, least.value, greatest.value, color=colour, alpha=0.15, linewidth=0)
    if axes.lines:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.xaxis.set_minor_locator(NullLocator())
        _few_ticks(axes)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_FAINT)


def _few_ticks(axes: Axes) -> None:
    """A log axis of less than two decades has one tick of its own, or none."""
    low, high = axes.get_xlim()
    ticks = [m * 10.0**e for e in range(-3, 8) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    if len(ticks) >= 2:
        axes.set_xticks(ticks)


def _teacher_line(axes: Axes, groups: Mapping[str, Sequence[Run]]) -> None:
    found = {run.last("eval/teacher_top1") for runs in groups.values() for run in runs} - {None}
    for i, top1 in enumerate(sorted(one for one in found if one is not None)):
        axes.axhline(top1, color="#555555", linestyle=(0, (6, 3)), linewidth=1.2, label="teacher" if i == 0 else None)


def _draw_fit(axes: Axes, groups: Mapping[str, Sequence[Run]]) -> None:
    """How well the student fits the teacher on the views that it trains on, and how well it does on new pictures."""
    axes.set_title("fit on training views, and accuracy", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.tick_params(labelsize=9, color=_FAINT)
    axes.set_xlabel("KL on training views, mean of the last tenth, nats (log scale)", fontsize=9, color=_FAINT)
    for setting, runs in groups.items():
        points = [(train_kl(run), run.last("eval/student_top1")) for run in runs]
        xs = [x for x, y in points if x is not None and y is not None]
        ys = [y for x, y in points if x is not None and y is not None]
        if xs:
            axes.plot(xs, ys, "o", color=_STUDY_STYLES[setting][0], markersize=7,
                      fillstyle={":": "none", "--": "bottom"}.get(_STUDY_STYLES[setting][1], "full"))  # fmt: skip
            # Settings of one crop lie close together: above, below and beside keeps their names apart.
            x, y, text_at, align = float(np.mean(xs)), float(np.mean(ys)), (9, -3), "left"
            if setting.startswith("same/"):
                y, text_at, align = max(ys), (0, 7), "center"
            elif setting.startswith("ind/"):
                y, text_at, align = min(ys), (0, -14), "center"
            axes.annotate(setting, (x, y), textcoords="offset points", xytext=text_at, ha=align, fontsize=8.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.margins(x=0.18, y=0.12)


def train_kl(run: Run) -> float | None:
    """Mean KL on training views over the last tenth of a run, nats."""
    measured = run.over_epochs("kl")
    if not measured:
        return None
    return float(measured.value[-max(1, len(measured.value) // 10) :].mean())


def _draw_finals(axes: Axes, groups: Mapping[str, Sequence[Run]]) -> None:
    axes.set_title("final top-1, each seed", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.tick_params(labelsize=9, color=_FAINT)
    for place, (setting, runs) in enumerate(groups.items()):
        finals = [top1 for run in runs if (top1 := run.last("eval/student_top1")) is not None]
        colour = _STUDY_STYLES[setting][0]
        axes.plot([np.mean(finals)] * 2, [place - 0.25, place + 0.25], color=colour, linewidth=2.5)
        axes.plot(finals, [place] * len(finals), "o", color=colour, markersize=6)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _final(runs: Sequence[Run], name: str) -> float:
    return float(np.mean([run.last(name) or 0.0 for run in runs]))


def _short(epoch: float, _: int | None = None) -> str:
    """12000 as 12k: the paper's longest run has a million epochs."""
    if epoch >= 1e6:
        return f"{epoch / 1e6:g}M"
    return f"{epoch / 1e3:g}k" if epoch >= 1e3 else f"{epoch:g}"
