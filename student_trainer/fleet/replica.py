"""One teacher server of a fleet: its connection, what it has under way, and how it did so far.

Which part it gets is the dispatcher's business (dispatch.py), and so is its lock; here a part is sent, and what went
wrong with it is told apart: another replica may answer, or the request itself is wrong.

Parts are sent by gRPC's futures. Rejected: a thread for each part under way. It cost the client the same (0.4 to 0.5 ms
of CPU a call of 20 kB up, 256 kB down, over 1, 8 and 64 replicas; two cores), but was 257 threads for 64 replicas in
place of one a replica, and a call that blocks a thread cannot be cancelled.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import grpc

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from student_trainer.fleet.addresses import Place
from student_trainer.fleet.answer import Part
from student_trainer.fleet.credentials import Credentials
from student_trainer.fleet.window import SMALLEST, Window

_BACK_OFF_S = 0.2, 5.0  # first and longest rest of a failed replica
_SMOOTH = 0.25  # weight of the newest answer
_jitter = random.Random()  # a hundred ranks must not come back at once; no number of a run depends on it


class Verdict(Enum):
    """What an error of a call means."""

    BUSY = auto()
    """It is well, and has too much to do."""
    ELSEWHERE = auto()
    """Another replica may answer, and this one later."""
    BROKE = auto()
    """An error inside: the replica's, or of what it was asked."""
    STRANGER = auto()
    """It says it is not whom we asked."""
    LOCKED_OUT = auto()
    """It does not know us."""
    REFUSED = auto()
    """The request itself is wrong."""


_VERDICTS = {
    grpc.StatusCode.UNAVAILABLE: Verdict.ELSEWHERE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Verdict.ELSEWHERE,
    grpc.StatusCode.CANCELLED: Verdict.ELSEWHERE,
    grpc.StatusCode.ABORTED: Verdict.ELSEWHERE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Verdict.BUSY,
    grpc.StatusCode.INTERNAL: Verdict.BROKE,
    grpc.StatusCode.UNKNOWN: Verdict.BROKE,
    grpc.StatusCode.FAILED_PRECONDITION: Verdict.STRANGER,
    grpc.StatusCode.UNAUTHENTICATED: Verdict.LOCKED_OUT,
    grpc.StatusCode.PERMISSION_DENIED: Verdict.LOCKED_OUT,
}


def judge(error: grpc.RpcError) -> Verdict:
    """What an error means."""
    verdict = _VERDICTS.get(error.code(), Verdict.REFUSED)
    # Busy, or larger than a message may be: only the first passes by waiting.
    if verdict is Verdict.BUSY and "larger than max" in (error.details() or ""):
        return Verdict.REFUSED
    return verdict


def push_back_s(error: grpc.RpcError) -> float | None:
    """How long the server asks us to wait, if it says so."""
    for entry in error.trailing_metadata() or ():
        if entry.key == "grpc-retry-pushback-ms" and str(entry.value).isdigit():
            return int(entry.value) / 1000
    return None


@dataclass(slots=True, eq=False)
class Flight:
    """One part on its way to one replica and back."""

    replica: Replica
    part: Part
    sent: float
    num_under_way: int
    """Of the replica when this one was sent, itself included."""
    call: Any = None
    """gRPC's, once it is sent."""


class Replica:
    """One teacher server."""

    def __init__(self, place: Place, credentials: Credentials, fixed_window: int) -> None:
        """Open the connection; nothing is sent yet.

        Raises:
            ValueError: the credentials do not allow it (credentials.py).
        """
        self.place = place
        self.window = Window(fixed_window)
        self.under_way: set[Flight] = set()
        self.is_one_of_us = False
        """It was described, has the run's fingerprint, and has not failed since."""
        self.is_asked_who = False
        """A Describe is under way."""
        self.leaves = False
        """Its name is gone from the addresses: it gets nothing new."""
        self.num_rows = 0
        """Taken of its answers."""
        self.latency_s = 0.0
        """Of its last answer."""
        self._fixed_window = fixed_window
        self._pace_s = 0.0
        self._back_off_s = _BACK_OFF_S[0]
        self._rests_until = 0.0
        self._rested_at = 0.0
        self._credentials = credentials
        self._channel = credentials.channel(place)
        self._stub = pb_grpc.TeacherStub(self._channel)  # type: ignore[no-untyped-call]

    @property
    def target(self) -> str:
        """How it is called."""
        return self.place.target

    def close(self) -> None:
        """Abandon what is under way."""
        self._channel.close()

    def describe(self, timeout_s: float, then: Callable[[Any], None]) -> None:
        """Ask who it is; `then` gets gRPC's future once it is done.

        Raises:
            ValueError: nothing can be sent: the connection is closed, or the token cannot be read.
        """
        metadata = self._credentials.metadata()
        call = self._stub.Describe.future(pb.DescribeRequest(), timeout=timeout_s, metadata=metadata)
        call.add_done_callback(then)

    def predict(self, part: Part, then: Callable[[Any], None]) -> Any:
        """Send a part; `then` gets gRPC's future, which is also returned, once it is done.

        Raises:
            ValueError: nothing can be sent: the connection is closed, or the token cannot be read.
        """
        metadata = self._credentials.metadata()
        call = self._stub.Predict.future(part.request, timeout=part.deadline_s, metadata=metadata)
        call.add_done_callback(then)
        return call

    def words(self, error: grpc.RpcError) -> str:
        """What an error says, and what it may mean."""
        details = error.details() or ""
        verdict = judge(error)
        if verdict is Verdict.LOCKED_OUT:
            return f"{error.code().name}: {details} (our token: --teacher.token-file)"
        hint = self._credentials.hint(details) if error.code() is grpc.StatusCode.UNAVAILABLE else ""
        return f"{error.code().name}: {details}{hint}"

    def rests(self, now: float) -> bool:
        """Whether it is left alone for now."""
        return now < self._rests_until

    def may_be_asked_who(self, now: float) -> bool:
        """Whether it is time to find out who it is."""
        return not (self.is_one_of_us or self.is_asked_who or self.leaves or self.rests(now))

    def serves(self) -> bool:
        """Whether parts may be sent to it, now or when it has room."""
        return self.is_one_of_us and not self.leaves

    def has_room(self, now: float) -> bool:
        """Whether it may have one more part now."""
        return self.serves() and not self.rests(now) and len(self.under_way) < self.window.size

    def expected_s(self) -> float:
        """How long one more part would take; 0 for one that has not shown it yet."""
        return self._pace_s * (len(self.under_way) + 1)

    def waits_until(self) -> float:
        """When it may be asked again."""
        return self._rests_until

    def answered(self, flight: Flight, now: float) -> None:
        """It works."""
        self.latency_s = now - flight.sent
        pace_s = self.latency_s / flight.num_under_way
        self._pace_s += (pace_s - self._pace_s) * (_SMOOTH if self._pace_s else 1.0)
        self.window.answered(self.latency_s, flight.part.num_rows, flight.num_under_way, now)
        self._back_off_s = _BACK_OFF_S[0]

    def failed(self, sent: float, now: float) -> None:
        """Leave it alone for a while, longer each time in a row, and then ask it anew who it is.

        What was sent before an earlier failure and failed as well is no other failure.
        """
        self.is_one_of_us = False
        if sent < self._rested_at:
            return
        self._rest(now, self._back_off_s * _jitter.uniform(0.5, 1.0))
        self._back_off_s = min(2 * self._back_off_s, _BACK_OFF_S[1])
        self.window = Window(self._fixed_window, first=SMALLEST)

    def busy(self, sent: float, now: float, push_back_s: float | None) -> None:
        """Leave it alone for as long as it says; it need not be asked who it is."""
        if sent < self._rested_at:
            return
        self._rest(now, push_back_s if push_back_s is not None else self._back_off_s * _jitter.uniform(0.5, 1.0))
        if push_back_s is None:
            self._back_off_s = min(2 * self._back_off_s, _BACK_OFF_S[1])
        self.window.refused()

    def met(self, same: bool, now: float) -> None:
        """It has said who it is."""
        self.is_one_of_us = same
        if not same:
            self.failed(now, now)

    def _rest(self, now: float, seconds: float) -> None:
        self._rested_at = now
        self._rests_until = now + seconds
