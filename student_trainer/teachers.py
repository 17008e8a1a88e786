"""Who teaches a run: live teachers, asked at every step, or fixed ones, whose answers are computed once and kept.

    LiveTeacher    a fleet, and how pictures reach it
    FixedTeacher   a live one, the views that never change, and a store of its logits for them

Both answer `ask(step, rows, pictures)`. A run has one, or several: an ensemble, whose answers become one target in
loss.py. Only a FixedTeacher knows a store, it takes `FixedViews` and nothing else, and only the settings fix/* have
those (views/setting.py): a run of FunMatch cannot reach a stored logit.

Rejected: a cache inside the fleet, keyed by view. With new views at every step it could only miss; and a key that
could ever hit by mistake would be a wrong target that no curve shows.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.index import Index
from protos import teacher_pb2 as pb
from student_trainer.config import Config
from student_trainer.fleet import Answer, Audit, Credentials, Fleet, TeacherRefusedError, Token
from student_trainer.local_teacher import teacher_beside
from student_trainer.logit_store import LogitStore, StoreGoneError, StoreKey, absent, open_store
from student_trainer.pictures import Pictures
from student_trainer.world import World
from views.render import Renderer
from views.setting import FixedViews
from views.view import Rows

log = logging.getLogger(__name__)

_STORE_REST_S = 30.0  # a store that failed is left alone for so long, where the teacher is asked instead


class Target(Protocol):
    """One teacher's logits for a batch, perhaps still under way."""

    def result(self) -> NDArray[np.float32]:
        """Wait for the logits [R, num_classes].

        Raises:
            TeacherError: the teachers cannot answer.
            StoreGoneError: a fixed teacher's store cannot be reached.
        """

    def audit(self) -> Audit | None:
        """What the teacher vouched for, where it was asked to."""

    recomputed: int
    """Rows for which a fixed teacher had to be asked again."""


class Teacher(Protocol):
    """Who can be asked about rows."""

    def ask(self, step: int, rows: Rows, pictures: Pictures) -> Target:
        """Ask, and do not wait."""


class LiveTeacher:
    """A fleet of equal replicas, asked whenever there is something to look at."""

    def __init__(self, fleet: Fleet, renderer: Renderer | None, num_audits: Callable[[int], int] | None = None) -> None:
        """Name the parts.

        Args:
            fleet: the replicas.
            renderer: renders at the teacher's size where pixels travel; not to be used by anybody else.
            num_audits: how many views of a step the teacher shall vouch for.
        """
        self.fleet = fleet
        self._renderer = renderer
        self._num_audits = num_audits or (lambda _step: 0)

    def ask(self, step: int, rows: Rows, pictures: Pictures, views: FixedViews | None = None) -> Answer:
        """Logits for the rows; with `views`, for each picture, averaged over its num_views rows.

        Raises:
            PictureError: where pixels travel, and a picture cannot be rendered.
        """
        pixels = None
        if self.fleet.transport == "pixels":
            assert self._renderer is not None
            pixels = pictures.render(self._renderer, rows).cpu().numpy()
        return self.fleet.ask(
            rows,
            picture=pictures.file,
            pixels=pixels,
            num_audits=self._num_audits(step),
            mean_of=views.num_views if views else 1,
            average=views.average if views else "probabilities",
        )


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


@contextlib.contextmanager
def services(config: Config, world: World) -> Iterator[tuple[tuple[str, ...], ...]]:
    """The addresses of each teacher's replicas; teachers of our own are started where none is given.

    Raises:
        ValueError: neither addresses nor models.
        TeacherDiedError: a teacher that was started ended.
    """
    with contextlib.ExitStack() as cleanup:
        addresses = tuple(tuple(entry.split(",")) for entry in config.teacher.addresses)
        if not addresses:
            if not config.teacher.model:
                raise ValueError(
                    "no teacher: give the addresses of running ones (--teacher HOST:PORT), or a model to start one "
                    "beside this run (--teacher.model NAME_OR_FILE)"
                )
            if world.local_size < world.size:
                raise ValueError(
                    f"{world.size} processes on several machines, and a teacher beside one of them would be out of the "
                    "others' reach: start teachers, and give their addresses (--teacher HOST:PORT)"
                )
            started: list[str] = []
            if world.is_main:
                for number, model in enumerate(config.teacher.model):
                    world.say(f"starting a teacher beside this run: {model}")
                    started.append(cleanup.enter_context(teacher_beside(config, world, number)))
            addresses = tuple((address,) for address in world.broadcast_object(started))
        yield addresses


@contextlib.contextmanager
def fleets(
    config: Config, addresses: Sequence[Sequence[str]], data_digest: str, client: str = ""
) -> Iterator[tuple[Fleet, ...]]:
    """One fleet a teacher, connected; `client` is what this run is called there.

    Raises:
        ValueError: addresses or files of credentials that are none.
        TeacherError: nobody answers.
        TeacherRefusedError: teachers with different classes, or one teacher given twice.
    """
    with contextlib.ExitStack() as cleanup:
        wanted = config.teacher.transport
        credentials = Credentials(
            ca=config.teacher.tls_ca,
            cert=config.teacher.tls_cert,
            key=config.teacher.tls_key,
            name=config.teacher.tls_name,
            token=Token(config.teacher.token_file) if config.teacher.token_file else None,
        )
        met = tuple(
            cleanup.enter_context(
                Fleet(
                    replicas,
                    data_digest=data_digest,
                    client=client,
                    credentials=credentials,
                    transport=None if wanted == "auto" else wanted,
                    rows_per_request=config.teacher.rows_per_request,
                    window=config.teacher.window,
                    hedge=config.teacher.hedge,
                    deadline_s=config.teacher.deadline_s,
                    patience_s=config.teacher.patience_s,
                )
            )
            for replicas in addresses
        )
        _check_ensemble([fleet.description for fleet in met], config.teacher.addresses or config.teacher.model)
        yield met


def _check_ensemble(who: Sequence[pb.Description], names: Sequence[str | Path]) -> None:
    for i, one in enumerate(who):
        for j, other in enumerate(who[:i]):
            if one.fingerprint == other.fingerprint:
                raise TeacherRefusedError(
                    f"teachers {names[j]} and {names[i]} are one and the same ({one.model}, fingerprint "
                    f"{one.fingerprint[:12]}): the replicas of one teacher are given with commas between, "
                    f"--teacher {names[j]},{names[i]}"
                )
            if one.num_classes != other.num_classes:
                raise TeacherRefusedError(
                    f"teacher {names[j]} has {other.num_classes} classes, {names[i]} {one.num_classes}: no ensemble"
                )
