"""The points of a sweep, and who has which: a queue in Optuna's database that several machines may share.

Rejected: Optuna's GridSampler, which hands a point that another machine still works on to whoever is idle, and counts
two runs as two. Here the points wait in a queue, and the first trial of a point is the only one. Rejected: Optuna's
journal files, which know no heartbeat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import TrialState

from student_trainer.config import FREE_ON_RESUME, Config, settings

PAPER_GRID = {
    "lr": (3e-4, 1e-3, 3e-3, 1e-2),
    "wd": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "T": (1.0, 2.0, 5.0, 10.0),
}
"""Section 3.1."""

SETTING_OF = {"lr": "optim.lr", "wd": "optim.weight_decay", "T": "optim.temperature"}
_LIVING = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)  # pruned: its loss became no number
_DATABASE_WAIT_S = 60.0  # a worker waits so long for the others to let go of a sqlite file


class TakenError(RuntimeError):
    """Somebody else has this point."""


@dataclass(frozen=True, order=True)
class Point:
    """One trial's place in the grid; points are ordered by lr, then wd, then T."""

    lr: float
    wd: float
    T: float

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"lr_{self.lr:g}_wd_{self.wd:g}_T_{self.T:g}"

    @property
    def flags(self) -> list[str]:
        """The settings of its run."""
        return [f"--{SETTING_OF[name]}={value!r}" for name, value in dataclasses.asdict(self).items()]


def open_study(config: Config, grid: Sequence[Point], storage: str, heartbeat_s: int) -> optuna.Study:
    """The sweep's record, with every point of the grid in it.

    Args:
        config: the recipe with the settings that all trials share; run_dir is the sweep's folder.
        grid: the points.
        storage: SQLAlchemy's URL of a database, or empty: a sqlite file in run_dir.
        heartbeat_s: a trial is taken over when its worker was silent three times as long.

    Raises:
        ValueError: it is of another sweep, or the database is of no use.
    """
    url = storage or f"sqlite:///{(config.run_dir / 'study.db').resolve()}"
    wait = {"connect_args": {"timeout": _DATABASE_WAIT_S}} if url.startswith("sqlite") else {}
    try:
        database = optuna.storages.RDBStorage(
            url, wait, heartbeat_interval=heartbeat_s, grace_period=3 * heartbeat_s,
            heartbeat_stale_trial_callback=give_back,
        )  # fmt: skip
    except ImportError as error:
        raise ValueError(
            f"--storage {url.partition(':')[0]}: its driver is not installed ({error.__cause__})"
        ) from error
    study = optuna.create_study(storage=database, study_name=config.recipe, direction="maximize", load_if_exists=True)
    _refuse_another_sweep(study, config)
    enqueue(study, grid)
    return study


def give_back(study: optuna.Study, stale: optuna.trial.FrozenTrial) -> None:
    """The worker of a trial is dead: its point waits again."""
    if point := point_of(stale):
        study.enqueue_trial(dataclasses.asdict(point), user_attrs=dataclasses.asdict(point))


def enqueue(study: optuna.Study, points: Sequence[Point]) -> None:
    """Queue the points that have no living trial. When two workers do this at once a point is queued twice, and the
    later trial gives way (`refuse_what_is_taken`).
    """
    there = {point_of(trial) for trial in study.get_trials(deepcopy=False, states=_LIVING)}
    for point in points:
        if point not in there:
            study.enqueue_trial(dataclasses.asdict(point), user_attrs=dataclasses.asdict(point))


def point_of(trial: optuna.trial.FrozenTrial | optuna.Trial) -> Point | None:
    """None: a trial that was begun when nothing waited any more."""
    values = trial.user_attrs
    return Point(values["lr"], values["wd"], values["T"]) if "lr" in values else None


def unfinished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that wait, or are in somebody's hands, or were when that one died."""
    return study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))


def _refuse_another_sweep(study: optuna.Study, config: Config) -> None:
    now = {
        name: value
        for name, value in settings(config).items()
        if name not in SETTING_OF.values() and (name not in FREE_ON_RESUME or name.startswith("data.eval"))
    }
    before = study.user_attrs.get("settings")
    if before is None:
        study.set_user_attr("settings", now)
    elif before != now:
        differing = [
            f"  {name}: {before.get(name)!r} then, {now.get(name)!r} now"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        raise ValueError(
            "this sweep was begun with other settings, and its trials could not be compared:\n"
            + "\n".join(differing)
            + "\nGive it the settings it had, or another --run-dir (or --storage)."
        )


def count(study: optuna.Study) -> int:
    """Points that are in the sweep by now, whoever added them."""
    return len({point_of(trial) for trial in study.get_trials(deepcopy=False, states=_LIVING)} - {None})


def refuse_what_is_taken(study: optuna.Study, own: optuna.Trial, point: Point) -> None:
    """Raises TakenError where an earlier trial has, or had, this point."""
    for other in study.get_trials(deepcopy=False, states=_LIVING):
        if other.number < own.number and point_of(other) == point:
            raise TakenError(f"trial {other.number} is the same point")


def results(study: optuna.Study) -> dict[Point, float | None]:
    """What came out, by point, in the grid's order; None: diverged."""
    done = study.get_trials(deepcopy=False, states=_DONE)
    found = {point: trial.value if trial.state == TrialState.COMPLETE else None
             for trial in done if (point := point_of(trial))}  # fmt: skip
    return dict(sorted(found.items()))


def best_of(results: dict[Point, float | None]) -> Point | None:
    """The highest top-1; of equal ones the first in the grid's order."""
    numbers = {point: value for point, value in sorted(results.items()) if value is not None}
    return max(numbers, key=lambda point: numbers[point], default=None)
