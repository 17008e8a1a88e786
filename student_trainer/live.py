"""How a run does while it goes on: what the loop tells, made into one picture of now.

    a terminal         a view that stays in its place and is drawn anew every second (screen.py)
    none, or a dumb    a log line of key=value pairs every ten seconds
    one (TERM=dumb)    and after evaluations: step=120 steps=1500 loss=0.412 ... eta_s=340 replicas=2/2
    --log-format json  the same line, as the message of a JSON object

The loop hands over numbers that it has anyway: microseconds a step. Drawing and asking the fleets happen elsewhere, and
nothing that goes wrong there reaches the loop. The record of a run is metrics.jsonl (metrics.py).

Rejected: a bar of tqdm. It has one line, and says nothing while the loop waits for a teacher that hangs.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from student_trainer.config import Config
from student_trainer.fleet import Fleet, FleetState
from student_trainer.world import World

log = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0
_LATELY_S = 20.0  # rates and shares are of so many seconds
_FORECAST_S = 300.0  # the time that is left follows from so many: evaluations and checkpoints count too
_SMOOTHED = 50  # steps over which noisy numbers are averaged
_NOISY = ("loss", "kl", "agreement_top1", "student_entropy", "teacher_entropy", "grad_norm")


class Rate:
    """How fast something grew lately: a total, told now and then."""

    def __init__(self, over_s: float) -> None:
        self._over_s = over_s
        self._told: deque[tuple[float, float]] = deque()

    def tell(self, now: float, total: float) -> None:
        """It has come to this total."""
        if len(self._told) > 1 and now - self._told[-2][0] < self._over_s / 100:
            self._told.pop()  # a thousand steps a second are no more points than one
        self._told.append((now, total))
        while len(self._told) > 2 and self._told[1][0] <= now - self._over_s:
            self._told.popleft()

    def per_s(self, now: float) -> float | None:
        """Growth a second up to now; None before there is any to speak of."""
        if len(self._told) < 2 or now <= self._told[0][0]:
            return None
        return (self._told[-1][1] - self._told[0][1]) / (now - self._told[0][0])


@dataclass(frozen=True, slots=True)
class TeacherNow:
    """One teacher's fleet now."""

    name: str
    state: FleetState
    rows_per_s: Mapping[str, float | None]
    """Of each replica, by its target."""


@dataclass(frozen=True, slots=True)
class Now:
    """One moment of a run."""

    title: str
    doing: str
    """Training, evaluating, saving, or how it ended."""
    step: int
    total: int
    elapsed_s: float
    """Since this start."""
    left_s: float | None
    idle_s: float
    """Since the last step."""
    images_per_s: float | None
    teacher_wait: float | None
    """Share of the time that the loop waits for logits."""
    data_wait: float | None
    """Likewise for pictures."""
    numbers: Mapping[str, float]
    """Of the last steps, the noisy ones averaged."""
    worst_mismatch: float | None
    """Largest difference between the two sides' views since this start, grey levels."""
    evaluated: tuple[int, Mapping[str, float]] | None
    """The last evaluation: after which step, and its numbers."""
    teachers: tuple[TeacherNow, ...]


class Progress:
    """What the loop has told so far. Any thread may ask for `now`."""

    def __init__(
        self,
        title: str,
        first_step: int,
        total_steps: int,
        batch_size: int,
        fleets: Sequence[Fleet] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        Args:
            title: what the run is called.
            first_step: updates done before this start.
            total_steps: updates of the whole run.
            batch_size: rows of an update.
            fleets: one a teacher.
            clock: seconds.
        """
        self.title, self.total, self._batch_size, self._fleets, self._clock = (
            title, total_steps, batch_size, fleets, clock,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._step, self._doing = first_step, "training"
        self._began = self._stepped = clock()
        self._line: dict[str, float] = {}
        self._noisy = {name: deque[float](maxlen=_SMOOTHED) for name in _NOISY}
        self._waited = {"teacher_wait_s": 0.0, "data_wait_s": 0.0}
        self._lately = {name: Rate(_LATELY_S) for name in ("steps", *self._waited)}
        self._forecast = Rate(_FORECAST_S)
        self._rows: dict[tuple[int, str], Rate] = {}
        self._worst: float | None = None
        self._evaluated: tuple[int, Mapping[str, float]] | None = None

    def step(self, done: int, line: Mapping[str, float]) -> None:
        """An update is done; its numbers."""
        now = self._clock()
        with self._lock:
            self._step, self._line, self._doing, self._stepped = done, dict(line), "training", now
            for name, values in self._noisy.items():
                if name in line:
                    values.append(line[name])
            for name in self._waited:
                self._waited[name] += line.get(name, 0.0)
                self._lately[name].tell(now, self._waited[name])
            self._lately["steps"].tell(now, done)
            self._forecast.tell(now, done)
            if "view_mismatch" in line:
                self._worst = max(self._worst or 0.0, line["view_mismatch"])

    def evaluated(self, done: int, line: Mapping[str, float]) -> None:
        """An evaluation is done: the numbers that begin with eval/."""
        scores = {name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")}
        with self._lock:
            self._evaluated = (done, scores)

    def doing(self, what: str) -> None:
        """Until the next step, this."""
        with self._lock:
            self._doing = what

    def ended(self, error: BaseException | None) -> None:
        """The loop is left, by an error perhaps."""
        with self._lock:
            self._doing = "ended by an error" if error else "done" if self._step == self.total else "stopped"

    def say(self, text: str) -> None:
        """Print a line for people; a reader that has gone away is no reason to stop."""
        with contextlib.suppress(OSError):
            print(text, flush=True)

    def now(self) -> Now:
        """Everything, as it is at this moment."""
        states = [(fleet.description.model, fleet.state()) for fleet in self._fleets]  # has a lock of its own
        now = self._clock()
        with self._lock:
            steps_per_s, forecast = self._lately["steps"].per_s(now), self._forecast.per_s(now)
            means = {name: sum(values) / len(values) for name, values in self._noisy.items() if values}
            return Now(
                title=self.title, doing=self._doing, step=self._step, total=self.total,
                elapsed_s=now - self._began, idle_s=now - self._stepped,
                left_s=(self.total - self._step) / forecast if forecast else None,
                images_per_s=steps_per_s * self._batch_size if steps_per_s is not None else None,
                teacher_wait=self._lately["teacher_wait_s"].per_s(now),
                data_wait=self._lately["data_wait_s"].per_s(now),
                numbers={**self._line, **means}, worst_mismatch=self._worst, evaluated=self._evaluated,
                teachers=tuple(self._teacher(number, *told, now) for number, told in enumerate(states)),
            )  # fmt: skip

    def _teacher(self, number: int, name: str, state: FleetState, now: float) -> TeacherNow:
        rates = {}
        for replica in state.replicas:
            rate = self._rows.setdefault((number, replica.target), Rate(_LATELY_S))
            rate.tell(now, replica.rows)
            rates[replica.target] = rate.per_s(now)
        return TeacherNow(name, state, rates)


class _Lines(Progress):
    """Says a line now and then, as one of the log."""

    _said: float | None = None

    def step(self, done: int, line: Mapping[str, float]) -> None:
        """An update is done; a line, if it is time for one."""
        super().step(done, line)
        now = self._clock()
        if self._said is None:
            self.now()  # replicas' rates begin here
            self._said = now
        if now - self._said >= _LINE_EVERY_S:
            self._say()

    def evaluated(self, done: int, line: Mapping[str, float]) -> None:
        """An evaluation is done; a line, so that the last one tells of the end."""
        super().evaluated(done, line)
        self._say()

    def _say(self) -> None:
        self._said = self._clock()
        log.info(as_line(self.now()))


class _Silent(Progress):
    """Of a rank that nobody watches."""

    def step(self, done: int, line: Mapping[str, float]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


def as_line(now: Now) -> str:
    """For machines and for logs: key=value pairs, without what is not known yet."""
    values: dict[str, float | str | None] = {"step": now.step, "steps": now.total}
    values |= {name: now.numbers.get(name) for name in ("loss", "kl", "agreement_top1", "lr")}
    values |= {
        "images_per_s": now.images_per_s, "teacher_wait": _share(now.teacher_wait), "data_wait": _share(now.data_wait),
        "eta_s": None if now.left_s is None else round(now.left_s), "view_mismatch": now.worst_mismatch,
    }  # fmt: skip
    if now.evaluated:
        values |= {"eval_step": now.evaluated[0], "eval_top1": now.evaluated[1].get("student_top1")}
    if now.teachers:
        replicas = [replica for teacher in now.teachers for replica in teacher.state.replicas]
        values["replicas"] = f"{sum(replica.serves for replica in replicas)}/{len(replicas)}"
        values["retries"] = sum(teacher.state.retries for teacher in now.teachers)
    return " ".join(f"{name}={_short(value)}" for name, value in values.items() if value is not None)


def _share(value: float | None) -> float | None:
    return None if value is None else round(value, 4)  # finer is noise, and reads as 1.9e-05


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def follow(
    config: Config, world: World, first_step: int, total_steps: int, fleets: Sequence[Fleet]
) -> Iterator[Progress]:
    """Where the loop tells how it does; shown in the way that fits whoever looks."""
    about = (f"{config.recipe}   {config.run_dir}", first_step, total_steps, config.optim.batch_size, fleets)
    if not world.is_main:
        yield _Silent(*about)
        return
    if config.log_format == "json" or not sys.stderr.isatty():
        yield _Lines(*about)
        return
    from student_trainer import screen  # whoever has no terminal needs no rich

    if not screen.can_draw():
        yield _Lines(*about)
        return
    progress = Progress(*about)
    with screen.Screen(progress):
        yield progress
