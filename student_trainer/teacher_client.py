"""Asks teachers for logits ahead of need, and never takes an answer that is not the one asked for.

    Fleet    knows the replicas; ask(rows) returns at once
    Answer   of one batch; result() waits for its logits

A batch is cut into parts, each closed under its mixup partners. All parts wait in one queue, oldest first; each
replica takes as many as its window allows, so the fast one gets more. A part whose replica fails goes back into
the queue under its old number and another replica takes it: nothing is skipped, and a row's logits are the same
whoever answers (the fingerprint says so). A teacher with another fingerprint is refused.

Errors, all of them TeacherError:

    TeacherError
      TeachersGoneError      nobody answered for patience_s; says what each replica said last
      TeacherRefusedError    a teacher says the request is wrong: a bug or a wrong setting, never retried

Rejected: gRPC's retries (they switch off above 256 KiB a request) and round_robin (it waits for the slowest).
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from protos import teacher_pb2 as pb
from protos.arrays import from_message, to_message
from student_trainer.replica import Replica
from views.setting import Average
from views.view import Rows
from views.wire import Transport, ask_by_reference, ask_encoded, ask_for_mean, ask_pixels

log = logging.getLogger(__name__)


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


@dataclass(order=True, slots=True)
class Part:
    """A piece of a batch on its way; ordered by age."""

    number: int
    request: pb.PredictRequest = field(compare=False)
    answer: Answer = field(compare=False)
    start: int = field(compare=False)  # of its answers among the batch's
    num_answers: int = field(compare=False)
    num_audits: int = field(compare=False)
    deadline_s: float = field(compare=False)
    failures: int = field(compare=False, default=0)


class Answer:
    """The logits of one batch, perhaps still under way."""

    recomputed = 0
    """Rows that a store should have had (teachers.py): a live answer has none."""

    def __init__(self, fleet: Fleet, num_answers: int, num_parts: int, more_patience_s: float) -> None:
        self._fleet = fleet
        self._more_patience_s = more_patience_s
        self._logits = np.empty((num_answers, fleet.description.num_classes), dtype=np.float32)
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
        with self._changed:
            while self._missing and self._error is None:
                self._changed.wait(timeout=1.0)
                if self._missing and self._error is None:
                    self._fleet.check_patience(self._asked, self._more_patience_s)
            if self._error is not None:
                raise self._error
            return self._logits

    def audit(self) -> Audit | None:
        """What the teacher vouched for, where the batch was audited; after result()."""
        return self._audit

    def fill(self, start: int, logits: NDArray[np.float32], audit: Audit | None) -> None:
        """Take the logits of one part."""
        with self._changed:
            self._logits[start : start + len(logits)] = logits
            self._audit = audit or self._audit
            self._missing -= 1
            self._changed.notify_all()

    def fail(self, error: TeacherError) -> None:
        """Make result() raise."""
        with self._changed:
            self._error = error
            self._changed.notify_all()


class Fleet:
    """The teachers of a run, as one."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        data_digest: str,
        transport: Transport | None = None,
        rows_per_request: int = 64,
        window: int = 2,
        deadline_s: float = 120.0,
        patience_s: float = 600.0,
    ) -> None:
        """Connect, and wait until one teacher has said who it is.

        Args:
            addresses: "host:port" or "unix:/path".
            data_digest: of the data set that samples point into.
            transport: how pictures travel; None chooses by what the first teacher offers.
            rows_per_request: largest part of a batch, in rows.
            window: requests in flight per replica.
            deadline_s: seconds after which a request of rows_per_request rows goes to another replica; a larger one
                (ask: mean_of) gets as many times more.
            patience_s: seconds without any answer after which the run gives up.

        Raises:
            TeachersGoneError: nobody could be described within patience_s.
            TeacherRefusedError: the teacher does not offer the transport.
        """
        if not addresses:
            raise ValueError("a fleet needs at least one address")
        self._queue: queue.PriorityQueue[Part] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._deadline_s = deadline_s
        self._window = window
        self._patience_s = patience_s
        self._last_answer = time.monotonic()
        self._last_words = dict.fromkeys(addresses, "not asked yet")
        self._closed = threading.Event()
        self._described = threading.Condition()
        self._description: pb.Description | None = None
        self.retries = 0
        """Parts that had to be sent again."""
        self._replicas = [Replica(self, address, window) for address in addresses]
        self.description = self._wait_for_description()
        """Of the first teacher that answered; all others must have its fingerprint."""
        self.transport = _choose_transport(self.description, transport, data_digest)
        """How pictures travel."""
        self._data_digest = data_digest
        self._rows_per_request = min(rows_per_request, self.description.max_rows)

    def ask(
        self,
        rows: Rows,
        *,
        picture: Callable[[int], bytes] | None = None,
        pixels: NDArray[np.uint8] | None = None,
        num_audits: int = 0,
        audit_pixels: bool = False,
        mean_of: int = 1,
        average: Average = "probabilities",
    ) -> Answer:
        """Send a batch on its way.

        Args:
            rows: what to look at, R rows.
            picture: the file of a sample, for the encoded transport.
            pixels: uint8 [V, size, size, 3], the views rendered at the teacher's size, for the pixels transport.
            num_audits: so many of the first views the teacher shall vouch for.
            audit_pixels: with their pixels.
            mean_of: the teacher averages so many consecutive rows into one answer; they travel together.
            average: what it averages.

        Raises:
            TeacherRefusedError: the teacher takes fewer rows a request than are to be averaged.
        """
        if mean_of > self.description.max_rows:
            raise TeacherRefusedError(
                f"averages over {mean_of} views need requests of as many rows; this teacher takes "
                f"{self.description.max_rows}: start it with --max-rows {mean_of} or more"
            )
        at_once = max(1, self._rows_per_request // mean_of) * mean_of
        deadline_s = self._deadline_s * max(1.0, at_once / self._rows_per_request)
        starts = range(0, len(rows), at_once)
        answer = Answer(self, len(rows) // mean_of, len(starts), more_patience_s=deadline_s - self._deadline_s)
        for start in starts:
            stop = min(start + at_once, len(rows))
            request = self._request(rows, start, stop, picture, pixels)
            if mean_of > 1:
                ask_for_mean(request, mean_of, average)
            audits = min(num_audits, stop - start) if start == 0 else 0
            if audits:
                request.audit.CopyFrom(to_message(np.arange(audits, dtype=np.int32)))
                request.audit_pixels = audit_pixels
            first, num_answers = start // mean_of, (stop - start) // mean_of
            self._queue.put(Part(next(self._numbers), request, answer, first, num_answers, audits, deadline_s))
        return answer

    def _request(
        self,
        rows: Rows,
        start: int,
        stop: int,
        picture: Callable[[int], bytes] | None,
        pixels: NDArray[np.uint8] | None,
    ) -> pb.PredictRequest:
        part = rows.take(start, stop)
        if self.transport == "reference":
            request = ask_by_reference(part, self._data_digest)
        elif self.transport == "encoded":
            assert picture is not None, "the encoded transport needs the pictures"
            request = ask_encoded(part, [picture(int(sample)) for sample in np.unique(part.sample)])
        else:
            assert pixels is not None, "the pixels transport needs rendered views"
            request = ask_pixels(part, pixels[rows.views_of(start, stop)])
        request.request_id = uuid.uuid4().hex
        request.fingerprint = self.description.fingerprint
        return request

    @property
    def num_slots(self) -> int:
        """Requests that can be in flight at once, over all replicas: more only wait here."""
        return len(self._replicas) * self._window

    @property
    def rows_per_request(self) -> int:
        """Largest part of a batch, in rows."""
        return self._rows_per_request

    def check_patience(self, asked: float = 0.0, more_s: float = 0.0) -> None:
        """Raise TeachersGoneError when nobody has answered for too long.

        Args:
            asked: time.monotonic() of the question, before which there may have been nothing to answer.
            more_s: patience beyond patience_s, for a question that is larger than most.
        """
        silent_s = time.monotonic() - max(self._last_answer, asked)
        if silent_s > self._patience_s + more_s:
            raise TeachersGoneError(
                f"no teacher has answered for {silent_s:.0f} s (--teacher.patience_s). Last words:\n"
                + "\n".join(f"  {address}: {words}" for address, words in self._last_words.items())
            )

    def close(self) -> None:
        """Stop asking; requests under way are abandoned."""
        self._closed.set()
        for replica in self._replicas:
            replica.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wait_for_description(self) -> pb.Description:
        with self._described:
            while self._description is None:
                self._described.wait(timeout=0.5)
                if self._description is None:
                    try:
                        self.check_patience()
                    except TeachersGoneError:
                        self.close()
                        raise
            return self._description

    # What the replicas' threads (replica.py) call.

    def meet(self, address: str, description: pb.Description) -> bool:
        """Take note of who a replica is; whether it is one of us."""
        with self._described:
            if self._description is None:
                self._description = description
                self._described.notify_all()
            same = self._description.fingerprint == description.fingerprint
        if not same:
            self.hear(
                address,
                f"refused: its fingerprint is {description.fingerprint} ({description.model}, "
                f"{description.precision}), this run's teacher is {self._description.fingerprint} "
                f"({self._description.model}, {self._description.precision})",
            )
        return same

    def hear(self, address: str, words: str) -> None:
        """Remember and log what went wrong with a replica; repeated words are logged once."""
        if self._last_words[address] != words:
            log.warning("teacher %s: %s", address, words)
        self._last_words[address] = words

    def next_part(self) -> Part | None:
        """The oldest waiting part, or None for now."""
        try:
            return self._queue.get(timeout=0.2)
        except queue.Empty:
            return None

    def put_back(self, part: Part) -> None:
        """Let another replica, or this one later, take the part."""
        self.retries += 1
        self._queue.put(part)

    def refuse(self, address: str, part: Part, words: str) -> None:
        """Give a part up: a teacher says that the request itself is wrong."""
        part.answer.fail(TeacherRefusedError(f"teacher {address} refused: {words}"))

    def deliver(self, address: str, part: Part, reply: pb.PredictReply) -> None:
        """Check an answer and hand it over.

        Raises:
            ValueError: the answer is not the one asked for.
        """
        sent, num_classes = part.request, self.description.num_classes
        if reply.request_id != sent.request_id:
            raise ValueError(f"answered request {reply.request_id}, asked {sent.request_id}")
        if reply.fingerprint != sent.fingerprint:
            raise ValueError(f"answered with fingerprint {reply.fingerprint}, asked {sent.fingerprint}")
        dtype = np.float16 if reply.logits.dtype == pb.Array.FLOAT16 else np.float32
        logits = from_message(reply.logits, "logits", dtype, (part.num_answers, num_classes))
        audit = None
        if part.num_audits:
            digests = from_message(reply.audit_digest, "audit_digest", np.uint8, (part.num_audits, 16))
            pixels = None
            if sent.audit_pixels:
                size = self.description.rendering.size
                shape = (part.num_audits, size, size, 3)
                pixels = from_message(reply.audit_pixels, "audit_pixels", np.uint8, shape)
            audit = Audit(digests, pixels)
        part.answer.fill(part.start, logits.astype(np.float32), audit)
        self._last_answer = time.monotonic()
        self._last_words[address] = "answered"

    @property
    def is_closed(self) -> bool:
        """Whether close() was called."""
        return self._closed.is_set()

    def pause(self, seconds: float) -> None:
        """Sleep, unless the fleet closes."""
        self._closed.wait(seconds)

    @property
    def deadline_s(self) -> float:
        """Of an ordinary call, in seconds."""
        return self._deadline_s


def _choose_transport(description: pb.Description, wanted: Transport | None, data_digest: str) -> Transport:
    sees_data = any(data.digest == data_digest for data in description.data_sets)
    offered: dict[Transport, bool] = {
        "reference": description.renders and sees_data,
        "encoded": description.renders,
        "pixels": True,
    }
    chosen = wanted if wanted is not None else next(name for name, offer in offered.items() if offer)
    if not offered[chosen]:
        raise TeacherRefusedError(
            f"the teacher does not offer --teacher.transport {chosen}: it "
            + ("renders nothing itself" if not description.renders else "does not see this data set")
            + f" (digest {data_digest}; it has {[data.digest for data in description.data_sets]}). "
            "Start it with --data on the same prepared folder, or choose another transport."
        )
    return chosen
