"""A teacher whose answers never change: computed once, kept in a store, and looked up at every step.

The baselines of section 3.1.1 of the paper. Only a FixedTeacher knows a store, it takes `FixedViews` and nothing else,
and only the settings fix/* have those (views/setting.py): a run of FunMatch cannot reach a stored logit.
Not here: where logits lie, and what a value is checked by (logit_store.py).
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.index import Index
from student_trainer.audit import ViewAudit
from student_trainer.fleet import Answer, Audit, TeacherError
from student_trainer.loader import Lesson
from student_trainer.logit_store import LogitStore, StoreGoneError, StoreKey, absent, open_store
from student_trainer.pictures import Pictures
from student_trainer.stop_signal import StopSignal
from student_trainer.teachers import LiveTeacher, Target
from student_trainer.world import World
from views.setting import FixedViews
from views.view import Rows

log = logging.getLogger(__name__)

_STORE_REST_S = 30.0  # a store that failed is left alone for so long, where the teacher is asked instead


class FixedTeacher:
    """A teacher whose answer to a picture never changes: from the store, or computed once and put there."""

    def __init__(
        self,
        live: LiveTeacher,
        index: Index,
        views: FixedViews,
        where: str,
        on_failure: Literal["stop", "ask"] = "stop",
    ) -> None:
        """Open the store.

        Args:
            live: computes what the store lacks.
            index: the data set.
            views: what the teacher looks at.
            where: a folder or URL (logit_store.py).
            on_failure: when the store cannot be reached: raise StoreGoneError, or ask the live teacher.

        Raises:
            StoreGoneError: the store cannot be opened; also with on_failure="ask", for nothing could be kept.
        """
        who = live.fleet.description
        self.key = StoreKey(
            fingerprint=who.fingerprint,
            data_digest=index.digest,
            views=views,
            num_samples=len(index),
            num_classes=who.num_classes,
            dtype="float32" if who.precision == "float32" else "float16",  # as the teacher sends them
        )
        self.store: LogitStore = open_store(where, self.key)
        self._live = live
        self._index = index
        self._views = views
        self._on_failure = on_failure
        self._trust_again = 0.0

    def rows(self, samples: NDArray[np.int64]) -> Rows:
        """The fixed views of samples [N]: N * num_views rows."""
        return self._views.rows(samples, self._index.height, self._index.width)

    def ask(self, step: int, rows: Rows, pictures: Pictures) -> Target:
        """The constants of the rows' own samples. What is absent, damaged or evicted is computed again."""
        samples = rows.sample[: len(rows)]
        try:
            logits, found = self._get(samples)
        except StoreGoneError as error:
            return _Gone(error)
        missing = np.unique(samples[~found])
        answer = None
        if len(missing):
            answer = self._live.ask(step, self.rows(missing), pictures, self._views)
        return _Kept(self, samples, logits, found, missing, answer)

    def fill(
        self, samples: range, world: World, stop: Callable[[], bool], check: Callable[[Rows, Audit], None]
    ) -> Filled:
        """Compute what the store lacks of this rank's share of samples, each once, spread over the replicas.

        A fill that was stopped or killed goes on where it was.

        Args:
            samples: all ranks', the same on each.
            world: who shares the work.
            stop: asked now and then; when true, what was asked is still kept, and nothing new is asked.
            check: called with what the teacher vouched for.
        """
        own = np.asarray(samples[world.rank :: world.size], dtype=np.int64)
        missing = absent(self.store, own)
        fleet = self._live.fleet
        at_once = max(1, fleet.rows_per_request // self._views.num_views)
        todo = deque(missing[i : i + at_once] for i in range(0, len(missing), at_once))
        asked: deque[tuple[NDArray[np.int64], Rows, Answer]] = deque()
        num_computed = 0
        with tqdm(
            desc="logits of the fixed teacher", total=len(own), initial=len(own) - len(missing), unit="picture",
            disable=not world.is_main, mininterval=1.0 if sys.stderr.isatty() else 10.0,
        ) as progress:  # fmt: skip
            while asked or (todo and not stop()):
                while todo and len(asked) <= fleet.num_slots and not stop():
                    part = todo.popleft()
                    rows = self.rows(part)
                    answer = self._live.ask(num_computed, rows, Pictures(self._index, rows), self._views)
                    asked.append((part, rows, answer))
                part, rows, answer = asked.popleft()
                self.put(part, answer.result())
                if audit := answer.audit():
                    check(rows, audit)
                num_computed += len(part)
                progress.update(len(part))
        return Filled(there_already=len(own) - len(missing), computed=num_computed, stopped=bool(todo))

    def _get(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        if time.monotonic() >= self._trust_again:
            try:
                return self.store.get(samples)
            except StoreGoneError as error:
                self._note_failure(error)
        shape = len(samples), self.key.num_classes
        return np.zeros(shape, np.float32), np.zeros(len(samples), np.bool_)

    def put(self, samples: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """Keep logits [N, num_classes] of samples [N], while the store can be reached."""
        if time.monotonic() >= self._trust_again:
            try:
                self.store.put(samples, logits)
            except StoreGoneError as error:
                self._note_failure(error)

    def _note_failure(self, error: StoreGoneError) -> None:
        if self._on_failure == "stop":
            raise error
        log.warning("%s. The teacher is asked instead, for %g s at least (--teacher.store-failure ask)",
                    error, _STORE_REST_S)  # fmt: skip
        self._trust_again = time.monotonic() + _STORE_REST_S


@dataclass(frozen=True, slots=True)
class Filled:
    """What a rank's fill did, in pictures."""

    there_already: int
    computed: int
    stopped: bool
    """Whether it was stopped before its end."""


class _Kept:
    """A fixed teacher's answer: what was found, and what is on its way to be kept."""

    def __init__(
        self,
        teacher: FixedTeacher,
        samples: NDArray[np.int64],
        logits: NDArray[np.float32],
        found: NDArray[np.bool_],
        missing: NDArray[np.int64],
        answer: Answer | None,
    ) -> None:
        self._teacher = teacher
        self._samples = samples
        self._logits = logits
        self._found = found
        self._missing = missing
        self._answer = answer
        self.recomputed = int((~found).sum())

    def result(self) -> NDArray[np.float32]:
        """Wait for the logits [R, num_classes]; what had to be computed is kept."""
        if self._answer is not None:
            computed = self._answer.result()
            self._teacher.put(self._missing, computed)
            empty = ~self._found
            self._logits[empty] = computed[np.searchsorted(self._missing, self._samples[empty])]
            self._answer = None
        return self._logits

    def audit(self) -> Audit | None:
        """None: what is kept was rendered long ago."""
        return None


class _Gone:
    """No answer: whoever waits for it is told why, when it is wanted, as with an answer that does not come."""

    recomputed = 0

    def __init__(self, error: StoreGoneError) -> None:
        self._error = error

    def result(self) -> NDArray[np.float32]:
        """Raise StoreGoneError."""
        raise self._error

    def audit(self) -> Audit | None:
        """None."""
        return None


def fill_together(teacher: FixedTeacher, audit: ViewAudit, samples: range, world: World, stop: StopSignal) -> bool:
    """Compute what the store lacks of samples; whether it came to its end. All ranks must call it, and all raise.

    Raises:
        TeacherError: nobody answers, or the teachers refuse.
        StoreGoneError: the store is gone.
    """
    worst = 0

    def check(rows: Rows, vouched: Audit) -> None:
        nonlocal worst
        worst = max(worst, audit.mismatch(Lesson(0, rows, rows), vouched))

    gone = None
    try:
        filled = teacher.fill(samples, world, lambda: stop.received, check)
    except (TeacherError, StoreGoneError) as error:
        gone = error
    world.raise_together(gone)
    counts = torch.tensor([filled.there_already, filled.computed, int(filled.stopped)], device=world.device)
    there, computed, stopped = world.all_sum(counts).tolist()
    mismatch = int(world.all_max(torch.tensor(worst, device=world.device)))
    damaged = int(world.all_sum(torch.tensor(teacher.store.counts.damaged, device=world.device)))
    world.say(
        f"logits of the fixed teacher: {there} pictures were there, {computed} computed, {damaged} of those because "
        f"what was there was damaged; largest view mismatch {mismatch} (store {teacher.key.digest[:12]})"
    )
    return bool(stopped == 0)
