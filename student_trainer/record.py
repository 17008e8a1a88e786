"""A run as it lies in its folder, read back: settings, facts, lines, summary; and which runs differ by seed alone.

Only reading lives here. A run that is still going, was killed, or lost a file, is read as far as it goes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student_trainer import metrics

# Settings that say where and how, and not what: they do not tell two runs apart.
_NOT_WHAT = (
    "run_dir", "device", "prefetch", "decode_threads", "log_every", "checkpoint_every", "evaluate_every", "eval_batch",
    "data.root", "data.evaluate_root", "teacher.addresses", "teacher.model", "teacher.store", "teacher.store_failure",
    "teacher.rows_per_request", "teacher.window", "teacher.deadline_s", "teacher.patience_s", "teacher.audit_every",
    "teacher.audit_views", "teacher.transport",
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One measured quantity over a run: where (steps or epochs) and how much, both [P]; P may be 0."""

    step: NDArray[np.float64]
    value: NDArray[np.float64]

    def __bool__(self) -> bool:
        return len(self.step) > 0


def series(lines: Sequence[Mapping[str, Any]], name: str) -> Series:
    """The points at which `name` was measured and finite (metrics.jsonl has null where it was not)."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return Series(array[:, 0], array[:, 1])


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    folder: Path

    def __post_init__(self) -> None:
        if not self.lines:
            raise ValueError(f"no {metrics.FILE} with a line in {self.folder}: is it the folder of a run?")

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The record, a line a logged step."""
        return metrics.read(self.folder)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved config by dotted names; empty if it is missing."""
        return self._json("config.json")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """run.json: pictures, parameters, teachers; empty if it is missing."""
        return self._json("run.json")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The last numbers; empty while the run goes on."""
        return self._json("summary.json")

    @property
    def what(self) -> dict[str, Any]:
        """The settings that make this run another one than others: not its seed, not where it ran."""
        return {name: value for name, value in self.settings.items() if name not in (*_NOT_WHAT, "seed")}

    def over_epochs(self, name: str) -> Series:
        """A quantity over epochs; over steps if the record does not say how many pictures there were."""
        measured = series(self.lines, name)
        return Series(measured.step * self.epochs_per_step, measured.value)

    @property
    def epochs_per_step(self) -> float:
        """1 where it is not known."""
        num_train, batch = self.facts.get("num_train"), self.settings.get("optim.batch_size")
        return batch / num_train if num_train and batch else 1.0

    def last(self, name: str) -> float | None:
        """The last value of a quantity."""
        measured = series(self.lines, name)
        return float(measured.value[-1]) if measured else None

    def median(self, name: str) -> float | None:
        """The middle value of a quantity."""
        measured = series(self.lines, name)
        return float(np.median(measured.value)) if measured else None

    def _json(self, file: str) -> dict[str, Any]:
        path = self.folder / file
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs: name -> one value a run."""
    names = dict.fromkeys(name for run in runs for name in (*run.what, "seed"))
    found = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone belong together: a name for each group -> its runs."""
    names = [name for name in differing(runs) if name != "seed"]
    # A recipe's name says what its settings are; else the settings say it.
    told = ["recipe"] if "recipe" in names and _tells_apart(runs, ["recipe"], names) else names
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        label = ", ".join(_say(name, run.settings.get(name)) for name in told) or run.folder.resolve().name
        grouped.setdefault(label, []).append(run)
    return grouped


def _tells_apart(runs: Sequence[Run], few: Sequence[str], many: Sequence[str]) -> bool:
    def distinct(names: Sequence[str]) -> int:
        return len({json.dumps([run.settings.get(name) for name in names]) for run in runs})

    return distinct(few) == distinct(many)


def _say(name: str, value: Any) -> str:
    return str(value) if name in ("recipe", "views.setting") else f"{name.rpartition('.')[2]} {value}"
