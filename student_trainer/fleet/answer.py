"""A question on its way and what comes back: errors, parts of a batch, and what is taken for an answer.

    Part       a piece of a batch: one request, wherever it may be sent
    Answer     of a whole batch; result() waits for its logits
    read       an answer, checked: the one asked for, whole, and finite

Which replica is asked, and when, is not here (dispatch.py).

Errors, all of them TeacherError:

    TeacherError
      TeachersGoneError      nobody answered for patience_s; says what each replica said last
      TeacherRefusedError    a teacher says the request is wrong: a bug or a wrong setting, never retried

Rejected: a numpy error state for what is not finite. A teacher's own overflow in half precision is answered with
status OK, and would train the student towards it until its loss says so steps later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from protos import teacher_pb2 as pb
from protos.arrays import all_finite, from_message

_ONE_THREAD = 2**15  # elements: from twice as many on, torch converts them on several


class TeacherError(RuntimeError):
    """The teachers cannot answer."""


class TeachersGoneError(TeacherError):
    """Nobody answered for too long."""


class TeacherRefusedError(TeacherError):
    """A teacher says the request itself is wrong."""


@dataclass(frozen=True, slots=True, eq=False)
class Audit:
    """What a teacher vouches for: digests of the views it rendered, and their pixels if asked for."""

    digests: NDArray[np.uint8]
    """[A, 16]."""
    pixels: NDArray[np.uint8] | None
    """[A, size, size, 3]."""


class Answer:
    """The logits of one batch, perhaps still under way."""

    recomputed = 0
    """Rows that a store should have had (fixed_teacher.py): a live answer has none."""

    def __init__(
        self, num_answers: int, num_classes: int, num_parts: int, check_patience: Callable[[float], None]
    ) -> None:
        """Prepare the room for the logits.

        Args:
            num_answers: rows of logits.
            num_classes: columns of logits.
            num_parts: how many calls of `fill` make it whole.
            check_patience: called about every second of waiting with time.monotonic() of the question; raises
                TeachersGoneError when it has been too long.
        """
        self._check_patience = check_patience
        self._logits = np.empty((num_answers, num_classes), dtype=np.float32)
        self._audit: Audit | None = None
        self._missing = num_parts
        self._error: TeacherError | None = None
        self._changed = threading.Condition()
        self._asked = time.monotonic()

    def result(self) -> NDArray[np.float32]:
        """Wait for the logits [R, num_classes], or [R / mean_of, num_classes] where rows are averaged.

        Raises:
            TeacherRefusedError: at once, when a teacher refused the request.
            TeachersGoneError: when no teacher has answered anything for patience_s.
        """
        while not self._ended(within_s=1.0):
            self._check_patience(self._asked)
        if self._error is not None:
            raise self._error
        return self._logits

    @property
    def is_there(self) -> bool:
        """Whether result() would not wait."""
        return not self._missing or self._error is not None

    def audit(self) -> Audit | None:
        """What the teacher vouched for, where the batch was audited; after result()."""
        return self._audit

    def _ended(self, within_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.is_there, timeout=within_s)

    def fill(self, start: int, logits: NDArray[np.float16] | NDArray[np.float32], audit: Audit | None) -> None:
        """Take the logits of one part. To be called once a part."""
        _copy(logits, self._logits[start : start + len(logits)])  # parts do not overlap: not under the lock
        with self._changed:
            self._audit = audit or self._audit
            self._missing -= 1
            if not self._missing:
                self._changed.notify_all()

    def fail(self, error: TeacherError) -> None:
        """Make result() raise."""
        with self._changed:
            self._error = error
            self._changed.notify_all()


@dataclass(order=True, slots=True)
class Part:
    """A piece of a batch on its way; ordered by age. Its state belongs to the dispatcher's lock."""

    number: int
    request: pb.PredictRequest = field(compare=False)
    answer: Answer = field(compare=False)
    start: int = field(compare=False)  # of its answers among the batch's
    num_rows: int = field(compare=False)  # to be looked at
    num_answers: int = field(compare=False)  # rows of logits
    num_audits: int = field(compare=False)
    deadline_s: float = field(compare=False)
    done: bool = field(compare=False, default=False)
    """Answered or given up: what comes now comes too late."""
    under_way: int = field(compare=False, default=0)
    """Calls that carry it; two while it is hedged."""
    hedged: bool = field(compare=False, default=False)
    tries: int = field(compare=False, default=0)
    first_sent: float = field(compare=False, default=0.0)
    failed_at: set[str] = field(compare=False, default_factory=set)
    """Replicas it failed at; those that were only busy are not among them."""
    unfit_at: set[str] = field(compare=False, default_factory=set)
    """Replicas that said they are not who was asked."""
    broke: list[str] = field(compare=False, default_factory=list)
    """Where it met an error inside of a teacher, or an answer that is none: perhaps by its own doing."""


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What an answer says, once it is known to be one."""

    logits: NDArray[np.float16] | NDArray[np.float32]
    """As they were sent, read-only."""
    audit: Audit | None


def read(part: Part, reply: pb.PredictReply, description: pb.Description) -> Reading:
    """What a reply says about a part.

    Raises:
        ValueError: it is not the answer asked for.
    """
    sent = part.request
    if reply.request_id != sent.request_id:
        raise ValueError(f"it answered request {reply.request_id[:64]!r}, which is another one")
    if reply.fingerprint != sent.fingerprint:
        raise ValueError(f"its fingerprint is {reply.fingerprint[:64]!r}, asked was {sent.fingerprint}")
    dtype = np.float16 if reply.logits.dtype == pb.Array.FLOAT16 else np.float32
    logits = from_message(reply.logits, "logits", dtype, (part.num_answers, description.num_classes))
    if not all_finite(logits):
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        raise ValueError(f"logits of {len(bad)} of {len(logits)} rows are not finite, the first in row {bad[0]}")
    audit = None
    if part.num_audits:
        digests = from_message(reply.audit_digest, "audit_digest", np.uint8, (part.num_audits, 16))
        pixels = None
        if sent.audit_pixels:
            size = description.rendering.size
            pixels = from_message(reply.audit_pixels, "audit_pixels", np.uint8, (part.num_audits, size, size, 3))
        audit = Audit(digests, pixels)
    return Reading(logits, audit)


def _copy(logits: NDArray[np.float16] | NDArray[np.float32], to: NDArray[np.float32]) -> None:
    """Exact, as numpy does it, which takes 140 us for 64,000 numbers in half precision, and torch 14.

    In pieces that torch does not hand to other threads: gRPC's would wait for them, 25 ms where the cores are busy.
    """
    if logits.dtype == np.float32:
        to[:] = logits
        return
    import torch  # here: clients that are no students read this room too, and would wait two seconds for it

    bits = torch.from_numpy(logits.view(np.uint8).copy()).view(torch.float16)
    source, target = torch.split(bits.view(-1), _ONE_THREAD), torch.split(torch.from_numpy(to).view(-1), _ONE_THREAD)
    for piece, where in zip(source, target, strict=True):
        where.copy_(piece)
