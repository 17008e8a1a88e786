"""One teacher server of a fleet: its channel, and the threads that carry parts to it and back.

What a part is, where it waits and what becomes of its answer is the fleet's business (teacher_client.py); here it is
sent, and what went wrong with it is told apart: another replica may answer, or the request itself is wrong.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import grpc

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from student_trainer.teacher_client import Fleet, Part

MAX_MESSAGE_BYTES = 256 * 2**20
"""Largest request or answer: 256 MiB, as the server has it."""

_BACK_OFF_S = 0.2, 5.0  # first and longest pause before a failed replica is asked again
_OTHER_REPLICA_MAY_ANSWER = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
}
_MAX_FAILURES = 5  # of one part, by errors inside of teachers: it is the part's fault then


class Replica:
    """One teacher server: `window` threads, each with at most one request under way."""

    def __init__(self, fleet: Fleet, address: str, window: int) -> None:
        self._fleet = fleet
        self._address = address
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            # A teacher that was killed and started again is found within a second, not after two minutes.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._channel = grpc.insecure_channel(address, options=options)
        self._stub = pb_grpc.TeacherStub(self._channel)  # type: ignore[no-untyped-call]
        self._met = threading.Lock()
        self._is_one_of_us = False
        for i in range(window):
            threading.Thread(target=self._run, name=f"teacher-{address}-{i}", daemon=True).start()

    def close(self) -> None:
        """Abandon what is under way; the threads end by themselves."""
        self._channel.close()

    def _run(self) -> None:
        first_s, longest_s = _BACK_OFF_S
        back_off_s = first_s
        while not self._fleet.is_closed:
            if not self._introduced():
                self._fleet.pause(back_off_s)
                back_off_s = min(2 * back_off_s, longest_s)
                continue
            part = self._fleet.next_part()
            if part is None:
                continue
            pause_s = self._ask(part)
            if pause_s is None:
                back_off_s = first_s
            else:
                self._fleet.pause(pause_s or back_off_s)
                back_off_s = min(2 * back_off_s, longest_s)

    def _introduced(self) -> bool:
        """Whether this replica is known to be one of the fleet; asks it if not."""
        with self._met:
            if self._is_one_of_us:
                return True
            try:
                description = self._stub.Describe(pb.DescribeRequest(), timeout=min(10.0, self._fleet.deadline_s))
            except (grpc.RpcError, ValueError) as error:  # ValueError: the channel was closed
                if not self._fleet.is_closed:
                    self._fleet.hear(self._address, _words(error))
                return False
            self._is_one_of_us = self._fleet.meet(self._address, description)
            return self._is_one_of_us

    def _ask(self, part: Part) -> float | None:
        """Send one part. None: answered; otherwise seconds to pause before the next (0: the usual back-off)."""
        try:
            reply = self._stub.Predict(part.request, timeout=part.deadline_s)
            self._fleet.deliver(self._address, part, reply)
            return None
        except grpc.RpcError as error:
            if self._fleet.is_closed:
                return None
            if not self._may_retry(error, part):
                self._fleet.refuse(self._address, part, _words(error))
                return None
            self._fleet.hear(self._address, _words(error))
            busy_s = _push_back_s(error)
            self._is_one_of_us = busy_s is not None and self._is_one_of_us
            self._fleet.put_back(part)
            return busy_s or 0.0
        except ValueError as error:
            if self._fleet.is_closed:
                return None
            self._fleet.hear(self._address, f"a wrong answer: {error}")
            self._is_one_of_us = False
            self._fleet.put_back(part)
            return 0.0

    def _may_retry(self, error: grpc.RpcError, part: Part) -> bool:
        code = error.code()
        if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
            part.failures += 1
            return part.failures < _MAX_FAILURES
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            # Busy, or larger than a message may be: only the first passes by waiting.
            return "larger than max" not in (error.details() or "")
        if code == grpc.StatusCode.FAILED_PRECONDITION:
            # Restarted as another teacher? Then it is refused as such and another replica answers.
            self._is_one_of_us = False
            return not self._introduced()
        return code in _OTHER_REPLICA_MAY_ANSWER


def _words(error: Exception) -> str:
    if isinstance(error, grpc.RpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)


def _push_back_s(error: grpc.RpcError) -> float | None:
    """How long the server asks us to wait, if it says so."""
    for entry in error.trailing_metadata() or ():
        if entry.key == "grpc-retry-pushback-ms":
            return float(entry.value) / 1000
    return None
