"""A run as it lies in its folder, read back: settings, facts, lines, summary; and which runs differ by seed alone.

Only reading lives here. A run that is still going, was killed, or lost a file, is read as far as it goes, and
`missing` says what it lacks. Rejected: loading into pandas; a few columns of one file need no tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from student_trainer import metrics
from student_trainer.config import FREE_ON_RESUME

# Settings that say where and how, and not what, do not tell two runs apart. These may change on resume, and do.
_NOT_WHAT = FREE_ON_RESUME - {"data.evaluate", "data.eval_crop", "data.eval_keep", "student.weights", "teacher.size"}


Unit = Literal["epoch", "step"]


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
        if not self.lines and not self.settings:
            raise ValueError(
                f"no {metrics.FILE} with a line and no config.json in {self.folder}: is it the folder of a run?"
            )

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
        """What makes this run another one than others: settings, not its seed, not where it ran; and its teachers, by
        their weights and not by the name of a file.
        """
        told = {name: value for name, value in self.settings.items() if name not in _NOT_WHAT and name != "seed"}
        if teachers := self.facts.get("teacher"):
            told["teachers"] = " + ".join(f"{each['model']} ({each['weights_digest'][:8]})" for each in teachers)
        return told

    @property
    def finished(self) -> bool:
        """Whether it came to its end: the loop writes summary.json last."""
        return bool(self.summary)

    @property
    def steps(self) -> int:
        """Steps done so far, as far as they were logged."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def missing(self) -> list[str]:
        """Files that a finished run has and this one has not."""
        expected = ("config.json", "run.json", metrics.FILE, "first_batch.png", "summary.json")
        return [file for file in expected if not (self.folder / file).exists()]

    @property
    def epochs_per_step(self) -> float | None:
        """What one step is in epochs: counted in pictures or, without run.json, the settings' epochs over all steps.

        None where neither is on record.
        """
        num_train, batch = self.facts.get("num_train"), self.settings.get("optim.batch_size")
        if num_train and batch:
            return float(batch / num_train)
        epochs, steps = self.settings.get("optim.epochs"), self.summary.get("steps")
        return float(epochs / steps) if epochs and steps else None

    def over(self, unit: Unit, name: str) -> Series:
        """A quantity over epochs or over steps."""
        measured = series(self.lines, name)
        if unit == "step" or not measured:
            return measured
        if self.epochs_per_step is None:
            raise ValueError(f"{self.folder} has no number of pictures (run.json): it can be drawn over steps only")
        return Series(measured.step * self.epochs_per_step, measured.value)

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
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged ({error}); a report can do without it: move it away") from error


def evaluated(runs: Sequence[Run]) -> list[Run]:
    """Those that have been evaluated at least once: only these have curves."""
    return [run for run in runs if any(run.last(name) is not None for name in ("eval/student_top1", "eval/kl"))]


def unit_of(runs: Sequence[Run]) -> Unit:
    """What the curves of these runs can be drawn over: epochs, or steps if one does not say what its epochs are."""
    return "epoch" if all(run.epochs_per_step is not None for run in evaluated(runs)) else "step"


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs: name -> one value a run."""
    told = [{**run.what, "seed": run.settings.get("seed")} for run in runs]
    names = dict.fromkeys(name for each in told for name in each)
    found = {name: [each.get(name) for each in told] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone belong together: a name for each group -> its runs."""
    told = _telling([run for run in runs if run.settings])
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        label = ", ".join(_say(name, run.what.get(name)) for name in told)
        grouped.setdefault(label if run.settings else str(run.folder), []).append(run)
    return grouped


def _telling(runs: Sequence[Run]) -> list[str]:
    """The recipe and the fewest other settings, the first of them, that tell apart what all settings tell apart."""
    names = [name for name in differing(runs) if name != "seed"]
    others = [name for name in names if name != "recipe"]
    recipe = ["recipe"] if "recipe" in names or not names else []
    for num in range(4):
        for few in combinations(others, num):
            if _num_kinds(runs, [*recipe, *few]) == _num_kinds(runs, names):
                return [*recipe, *few]
    return names


def _num_kinds(runs: Sequence[Run], names: Sequence[str]) -> int:
    return len({json.dumps([run.what.get(name) for name in names]) for run in runs})


def _say(name: str, value: Any) -> str:
    return str(value) if name in ("recipe", "views.setting", "teachers") else f"{name.removeprefix('optim.')} {value}"
