"""One run as a picture, RUN/report.png: curves against steps, and the first batch below them.

Drawn at a run's end and by `funmatch report`, of whatever is on record by then. Several runs in one picture are
curves.py's. Rejected: the page's curves here too. These show what one run did step by step, with its speed and waits;
those compare runs by what was evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from student_trainer import metrics
from student_trainer.record import Series, series

# Okabe and Ito's palette, distinguishable in all common kinds of colour blindness. One colour, one meaning.
_STUDENT, _TEACHER, _CLOSENESS = "#0072B2", "#D55E00", "#009E73"
_SPEED, _PLAIN, _FAINT = "#CC79A7", "#333333", "#767676"
_LEAST_WAIT_SCALE_S = 0.01
_DPI = 130  # the sheet of the first batch at about its own size

# What a panel says that has no curve.
_NOT_YET, _NO_LABELS = "not evaluated yet", "these pictures have no labels: accuracy is not known"


def draw(run_dir: Path) -> Path:
    """Draw RUN_DIR/report.png and return its path.

    Raises:
        ValueError: there is no record of a run in that folder.
    """
    lines = metrics.read(run_dir)
    if not lines:
        raise ValueError(f"no {metrics.FILE} with a line in {run_dir}: is it the folder of a run?")
    sheet = run_dir / "first_batch.png"
    pixels = imread(sheet) if sheet.exists() else None
    with_teacher = any(series(lines, name) for name in ("teacher_entropy", "eval/teacher_top1", "eval/kl"))
    panels = [_draw_loss, _draw_accuracy]
    panels += [_draw_closeness, _draw_entropy, _draw_schedule, _draw_speed] if with_teacher else [
        _draw_schedule, _draw_speed,
    ]  # fmt: skip

    columns = 3 if with_teacher else 2
    width, plots_height = 5.0 * columns, 0.5 + 3.1 * (len(panels) // columns)
    sheet_height = 0.0 if pixels is None else width * pixels.shape[0] / pixels.shape[1]
    figure = Figure(figsize=(width, plots_height + sheet_height), layout=ConstrainedLayoutEngine(h_pad=0.1))
    heights = [plots_height, sheet_height] if pixels is not None else [plots_height]
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    upper = parts[0]
    if pixels is not None:
        picture = parts[1].add_axes((0.0, 0.0, 1.0, 1.0))
        picture.imshow(pixels)
        picture.axis("off")
    for axes, panel in zip(upper.subplots(len(panels) // columns, columns).flat, panels, strict=True):
        panel(axes, lines)
    upper.suptitle(_headline(run_dir, lines), fontsize=13, x=0.01, ha="left")
    path = run_dir / "report.png"
    figure.savefig(path, dpi=_DPI)
    return path


def _headline(run_dir: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    text = f"{run_dir.resolve().name}   {max(line['step'] for line in lines):,} steps"
    student, teacher = series(lines, "eval/student_top1"), series(lines, "eval/teacher_top1")
    if student:
        text += f"   student {student.value[-1]:.2%}"
    if teacher:
        text += f"   teacher {teacher.value[-1]:.2%}"
    agreement = series(lines, "eval/agreement_top1")
    if agreement and not student:
        text += f"   agreement {agreement.value[-1]:.2%}"
    return text


def _draw_loss(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    loss = series(lines, "loss")
    _style(axes, "training loss")
    _noisy(axes, loss, _STUDENT)
    if loss and loss.value.min() > 0 and loss.value.max() > 20 * loss.value.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _draw_accuracy(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    _style(axes, "top-1 on the evaluation split")
    student, teacher = series(lines, "eval/student_top1"), series(lines, "eval/teacher_top1")
    _measured(axes, student, _STUDENT, "student")
    if teacher:
        # The teacher is frozen, and measured only as often as convenient.
        axes.axhline(teacher.value[-1], color=_TEACHER, linestyle="--", linewidth=1.6, label="teacher")
    _percent(axes, student, _NO_LABELS if series(lines, "eval/kl") else _NOT_YET)


def _draw_closeness(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    agreement, kl = series(lines, "eval/agreement_top1"), series(lines, "eval/kl")
    _style(axes, "student against teacher")
    _measured(axes, agreement, _CLOSENESS, "agreement, top-1")
    _measured(axes, series(lines, "eval/agreement_top5"), _CLOSENESS, "agreement, top-5", linestyle=":")
    _percent(axes, agreement, _NOT_YET)
    if kl:
        right = _second_scale(axes, "KL(teacher || student), nats")
        _measured(right, kl, _PLAIN, "KL (right)", linestyle="--")
        right.set_ylim(bottom=0)
        _one_legend(axes, right, "center right")  # agreement ends high, KL low


def _draw_entropy(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    _style(axes, "entropy of the training views' predictions, nats")
    _noisy(axes, series(lines, "student_entropy"), _STUDENT, "student")
    _noisy(axes, series(lines, "teacher_entropy"), _TEACHER, "teacher")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _draw_schedule(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    _style(axes, "learning rate")
    lr = series(lines, "lr")
    axes.plot(lr.step, lr.value, color=_PLAIN, linewidth=1.6)
    axes.set_ylim(bottom=0)


def _draw_speed(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    speed, wait = series(lines, "images_per_s"), series(lines, "teacher_wait_s")
    _style(axes, "images/s, and waiting for the teacher" if wait else "images/s")
    _noisy(axes, speed, _SPEED, "images/s")
    axes.set_ylim(0, _roof(speed, 1.4))
    if wait:
        right = _second_scale(axes, "seconds a step")
        _noisy(right, wait, _TEACHER, "wait (right)")
        # Low in the panel, apart from the speed; and what is nothing to a step of any length does not fill the scale.
        right.set_ylim(0, max(_LEAST_WAIT_SCALE_S, _roof(wait, 2.5)))
        _one_legend(axes, right, "upper right")


def _roof(points: Series, factor: float) -> float:
    """Where a scale ends: the first steps compile, connect and fill caches, and must not set it."""
    return factor * float(np.quantile(points.value, 0.95)) if points else 1.0


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, color=_FAINT)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.set_xlabel("step", fontsize=9, color=_FAINT)


def _noisy(axes: Axes, points: Series, color: str, label: str = "") -> None:
    """A quantity measured at every step: the median as a line, four fifths of the values as a band."""
    if points:
        step, low, middle, high = bands(points)
        axes.fill_between(step, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(step, middle, color=color, linewidth=1.6, label=label)


def bands(points: Series, num_bins: int = 100) -> NDArray[np.float64]:
    """Consecutive points in at most `num_bins` bins; float64 [4, bins]: middle step, 10 %, 50 %, 90 % of values.

    A median stays where it is when one step waits two seconds, and a million steps cost as little to draw
    as a hundred.
    """
    bins = np.array_split(np.arange(len(points.step)), min(num_bins, len(points.step)))
    columns = [(points.step[b].mean(), *np.quantile(points.value[b], (0.1, 0.5, 0.9))) for b in bins]
    return np.asarray(columns, dtype=np.float64).T


def _measured(axes: Axes, points: Series, color: str, label: str, linestyle: str = "-") -> None:
    """A quantity measured now and then: a line, with its points marked while they are few."""
    if points:
        marker = "o" if len(points.step) <= 40 else ""
        axes.plot(
            points.step, points.value, color=color, label=label, linestyle=linestyle, marker=marker, markersize=3.5,
            linewidth=1.6,
        )  # fmt: skip


def _percent(axes: Axes, points: Series, instead: str) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, 1.03)
    if not points:
        axes.text(0.5, 0.5, instead, transform=axes.transAxes, ha="center", color=_FAINT)
        axes.set_xticks([])
        return
    axes.legend(loc="lower right", fontsize=9, frameon=False)


def _second_scale(axes: Axes, label: str) -> Axes:
    right = axes.twinx()
    right.spines[["top", "left"]].set_visible(False)
    right.tick_params(labelsize=9, color=_FAINT)
    right.set_ylabel(label, fontsize=9, color=_FAINT)
    return right


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9, frameon=False)


def _one_legend(left: Axes, right: Axes, place: Literal["upper right", "center right"]) -> None:
    """One legend for both scales, on the upper layer and on paper of its own: a curve passes behind it."""
    if old := left.get_legend():
        old.remove()
    (handles, labels), (more, their_labels) = (axes.get_legend_handles_labels() for axes in (left, right))
    right.legend([*handles, *more], [*labels, *their_labels], loc=place, fontsize=9, edgecolor="none", framealpha=0.85)


def _short(step: float, _: int | None = None) -> str:
    """12000 as 12k, 2000000 as 2M: the paper's runs have millions of steps."""
    if abs(step) >= 1e6:
        return f"{step / 1e6:g}M"
    return f"{step / 1e3:g}k" if abs(step) >= 1e4 else f"{step:,g}"
