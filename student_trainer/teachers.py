"""Who teaches a run: live teachers, each a fleet that is asked at every step.

A teacher answers `ask(step, rows, pictures)`. A run has one, or several: an ensemble, whose answers become one target
in loss.py. Not here: teachers whose answers never change (fixed_teacher.py), and how a fleet asks (fleet/).

Rejected: a cache inside the fleet, keyed by view. With new views at every step it could only miss; and a key that
could ever hit by mistake would be a wrong target that no curve shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from protos import teacher_pb2 as pb
from student_trainer.config import Config
from student_trainer.fleet import Answer, Audit, Credentials, Fleet, TeacherRefusedError, Token
from student_trainer.local_teacher import teacher_beside
from student_trainer.pictures import Pictures
from student_trainer.world import World
from views.render import Renderer
from views.setting import FixedViews
from views.view import Rows


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
