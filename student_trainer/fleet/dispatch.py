"""Which part of a batch goes to which replica, and when.

All parts wait in one queue, oldest first, and not at the replicas: whoever has room takes the next, and of several the
one that is expected to be done first. How much room a replica has, its latency says (window.py). One thread decides
and sends; answers are read and checked in gRPC's threads.

What bounds the trouble that failures make:

* A replica that failed gets nothing for 0.2 s, twice as long each time in a row, up to 5 s; then it is asked who it is,
  and gets one part. One that is busy is left alone for as long as it says.
* A part goes back under its old number, and to a replica that it did not fail at, as long as one serves. It is given
  up when it met five errors inside of teachers, or five answers that are none from more than one of them; when one
  replica says twice that it is not whom we asked, and is; and after patience_s since it was first sent.
* Hedging, where asked for: a part that takes `hedge` times the usual time is sent to one more replica, once, if nothing
  else waits for that one. The first answer is taken, the other call cancelled.

Rejected: a queue a replica, with stealing. What waits in one queue need not be stolen.
"""

from __future__ import annotations

import bisect
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from protos import teacher_pb2 as pb
from student_trainer.fleet import addresses
from student_trainer.fleet.addresses import Addresses
from student_trainer.fleet.answer import Part, Reading, TeacherError, TeacherRefusedError, TeachersGoneError, read
from student_trainer.fleet.credentials import Credentials
from student_trainer.fleet.replica import Flight, Replica, Verdict, judge, push_back_s
from student_trainer.fleet.roster import Roster

log = logging.getLogger(__name__)

_MANY = 5  # failures of one part
_TICK_S = 0.5  # longest sleep of the thread that decides
_SAY_AFTER_S, _SAY_EVERY_S = 3.0, 30.0  # when nobody answers
_FEW_LATENCIES, _LATENCIES = 8, 64  # of the usual time


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """How one replica does."""

    target: str
    serves: bool
    in_flight: int
    """Requests under way."""
    window: int
    """Requests that may be under way."""
    rows: int
    """Rows taken of its answers."""
    latency_s: float
    """Of its last answer."""
    words: str
    """What it said last."""


@dataclass(frozen=True, slots=True)
class FleetState:
    """How a fleet does."""

    waiting: int
    """Requests that wait for a replica with room."""
    retries: int
    """Requests that had to be sent again."""
    hedges: int
    """Requests that were sent to a second replica."""
    rows: int
    """Rows answered, also by replicas that are gone."""
    replicas: tuple[ReplicaState, ...]


class Dispatcher:
    """The replicas of one teacher, and the parts on their way to them."""

    def __init__(
        self,
        where: Addresses,
        credentials: Credentials,
        *,
        window: int,
        hedge: float,
        deadline_s: float,
        patience_s: float,
        look_up: Callable[[str, str], frozenset[str]] = addresses.look_up,
    ) -> None:
        """Connect to whoever is there; returns at once.

        Args:
            where: the replicas; watched from now on.
            credentials: how they are spoken to.
            window: requests under way at each; 0: by measured latency.
            hedge: a request that takes so many times the usual time goes to another one too; 0: never.
            deadline_s: of an ordinary request.
            patience_s: seconds without any answer after which `check_patience` raises.
            look_up: finds the addresses of a name.

        Raises:
            ValueError: the credentials do not allow to connect to one of the addresses.
        """
        self._hedge = hedge
        self._deadline_s = deadline_s
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._waiting: list[Part] = []  # sorted, oldest first
        self._flights: set[Flight] = set()
        self._roster = Roster(where, credentials, self._changed, window=window, deadline_s=deadline_s)
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self._last_answer = self._asked = time.monotonic()
        self._said = 0.0
        self._retries = self._hedges = self._rows = 0
        self._closed = self._hurries = False
        self._no_room = False  # nobody may have one more part until something else changes
        self._thread = threading.Thread(target=self._run, name="dispatch", daemon=True)
        self._thread.start()
        self._roster.watch(look_up)

    # What the fleet calls.

    def wait_for_description(self) -> pb.Description:
        """Who the first replica that answers is.

        Raises:
            TeachersGoneError: none does within patience_s.
            TeacherRefusedError: one does not know us.
        """
        with self._changed:
            while self._roster.description is None:
                if self._roster.refusal is not None:
                    raise self._roster.refusal
                self.check_patience()
                self._changed.wait(timeout=_TICK_S)
            return self._roster.description

    def put(self, part: Part) -> None:
        """Take a part to be answered."""
        with self._changed:
            if not self._waiting and not self._flights:
                self._asked = time.monotonic()  # until now there was nothing to answer
            bisect.insort(self._waiting, part)
            if not self._no_room:
                self._changed.notify_all()

    def check_patience(self, asked: float = 0.0, more_s: float = 0.0) -> None:
        """Raise TeachersGoneError when nobody has answered for too long.

        Args:
            asked: time.monotonic() of the question, before which there may have been nothing to answer.
            more_s: patience beyond patience_s, for a question that is larger than most.
        """
        silent_s = time.monotonic() - max(self._last_answer, asked)
        if silent_s > self._patience_s + (0.0 if self._hurries else more_s):
            with self._changed:
                words = self._roster.last_words("\n  ")
            raise TeachersGoneError(
                f"no teacher has answered for {silent_s:.0f} s (--teacher.patience-s). Last words:{words}"
            )

    def hurry(self, patience_s: float) -> None:
        """Have no more patience than this from now on. May be called by a signal handler: it takes no lock."""
        self._patience_s = min(self._patience_s, patience_s)
        self._hurries = True

    @property
    def num_serving(self) -> int:
        """Replicas that answer at present."""
        with self._changed:
            return len(self._roster.serving())

    @property
    def num_slots(self) -> int:
        """Requests that can be under way at once, and one more a replica, or no window would ever grow."""
        with self._changed:
            return sum(replica.window.size + 1 for replica in self._roster.replicas.values())

    def state(self) -> FleetState:
        """How everybody does now."""
        with self._changed:
            replicas = tuple(
                ReplicaState(
                    target=replica.target, serves=replica.serves(), in_flight=len(replica.under_way),
                    window=replica.window.size, rows=replica.num_rows, latency_s=replica.latency_s,
                    words=self._roster.words_of(replica.target),
                )
                for replica in self._roster.replicas.values()
            )  # fmt: skip
            return FleetState(len(self._waiting), self._retries, self._hedges, self._rows, replicas)

    def close(self) -> None:
        """Send nothing more; what is under way is abandoned."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._roster.close()

    # The thread that decides.

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                gone = self._roster.those_who_left()
                strangers = self._roster.strangers(now)
                flights = self._assign(now) + self._assign_hedges(now)
                self._say_that_nobody_answers(now)
                if not (gone or strangers or flights):
                    self._changed.wait(self._pause_s(now))
            # Sending takes the time to serialise, and closing may call back: not under the lock.
            for replica in gone:
                replica.close()
            for replica in strangers:
                self._roster.introduce(replica)
            for flight in flights:
                self._send(flight)

    def _assign(self, now: float) -> list[Flight]:
        flights: list[Flight] = []
        while free := [replica for replica in self._roster.serving() if replica.has_room(now)]:
            for part in self._waiting:
                if able := [replica for replica in free if self._may_try(part, replica)]:
                    break
            else:
                break
            self._waiting.remove(part)
            flights.append(self._start(part, min(able, key=Replica.expected_s), now))
        self._no_room = not free
        return flights

    def _may_try(self, part: Part, replica: Replica) -> bool:
        """Where a part failed it is sent again only if nobody else serves."""
        return replica.target not in part.failed_at or all(
            other.target in part.failed_at for other in self._roster.serving()
        )

    def _assign_hedges(self, now: float) -> list[Flight]:
        if not self._hedge or self._waiting or len(self._latencies) < _FEW_LATENCIES:
            return []
        late_s = self._hedge * statistics.median(self._latencies)
        flights = []
        for flight in sorted(self._flights, key=lambda one: one.sent):
            part = flight.part
            if part.done or part.hedged or now - flight.sent < late_s:
                continue
            able = [
                one for one in self._roster.serving()
                if one.has_room(now) and one is not flight.replica and one.target not in part.failed_at
            ]  # fmt: skip
            if able:
                part.hedged = True
                self._hedges += 1
                flights.append(self._start(part, min(able, key=Replica.expected_s), now))
        return flights

    def _start(self, part: Part, replica: Replica, now: float) -> Flight:
        flight = Flight(replica, part, now, len(replica.under_way) + 1)
        part.tries += 1
        part.under_way += 1
        part.first_sent = part.first_sent or now
        replica.under_way.add(flight)
        self._flights.add(flight)
        return flight

    def _send(self, flight: Flight) -> None:
        try:
            call = flight.replica.predict(flight.part, partial(self._ended, flight))
        except ValueError as error:  # the token's file is gone
            with self._changed:
                self._end(flight)
                self._fail(flight, "cannot be asked", str(error))
            return
        with self._changed:
            flight.call = call
            too_late = flight.part.done
        if too_late:
            call.cancel()

    def _pause_s(self, now: float) -> float:
        times = [one.waits_until() - now for one in self._roster.replicas.values() if one.rests(now)]
        if self._hedge and self._flights and not self._waiting:
            times.append(0.02)
        return max(0.001, min([_TICK_S, *times]))

    def _say_that_nobody_answers(self, now: float) -> None:
        if self._roster.description is not None and not self._waiting and not self._flights:
            return
        silent_s = now - max(self._last_answer, self._asked)
        if silent_s > (_SAY_EVERY_S if self._roster.serving() else _SAY_AFTER_S) and now - self._said > _SAY_EVERY_S:
            self._said = now
            log.warning(
                "no teacher has answered for %.0f s; waiting up to %.0f s (--teacher.patience-s). Last words:%s",
                silent_s, self._patience_s, self._roster.last_words("\n  "),
            )  # fmt: skip

    # What gRPC's threads call.

    def _ended(self, flight: Flight, call: Any) -> None:
        assert self._roster.description is not None, "nothing is asked before"
        try:
            reading = read(flight.part, call.result(), self._roster.description)
        except grpc.FutureCancelledError:
            with self._changed:
                self._end(flight)
        except grpc.RpcError as error:
            self._judge(flight, error)
        except ValueError as error:
            with self._changed:
                self._end(flight)
                flight.part.broke.append(flight.replica.target)
                self._fail(flight, "a wrong answer", f"a wrong answer, not taken: {error}")
        else:
            self._take(flight, reading)

    def _take(self, flight: Flight, reading: Reading) -> None:
        part, replica = flight.part, flight.replica
        with self._changed:
            now = time.monotonic()
            self._end(flight)
            if self._said:
                log.info("teacher %s: answers; the run goes on", replica.target)
                self._said = 0.0
            replica.answered(flight, now)
            self._last_answer = now
            self._latencies.append(now - flight.sent)
            self._roster.hear(replica.target, "answered", "answered")
            if part.done:
                return
            part.done = True
            replica.num_rows += part.num_rows
            self._rows += part.num_rows
            late = [one.call for one in self._flights if one.part is part and one.call is not None]
        part.answer.fill(part.start, reading.logits, reading.audit)
        for call in late:
            call.cancel()

    def _judge(self, flight: Flight, error: grpc.RpcError) -> None:
        part, replica = flight.part, flight.replica
        verdict, words = judge(error), replica.words(error)
        with self._changed:
            self._end(flight)
            if self._closed:
                return
            if verdict is Verdict.BUSY:
                replica.busy(flight.sent, time.monotonic(), push_back_s(error))
                self._roster.hear(replica.target, error.code().name, words, part)
                self._put_back(part)
                return
            if verdict is Verdict.REFUSED or (verdict is Verdict.STRANGER and replica.target in part.unfit_at):
                self._give_up(part, TeacherRefusedError(f"teacher {replica.target} refused: {words}"))
                return
            if verdict is Verdict.STRANGER:  # restarted as another one? Then it will be refused as such
                part.unfit_at.add(replica.target)
            if verdict is Verdict.BROKE:
                part.broke.append(replica.target)
                if len(part.broke) >= _MANY:
                    self._give_up(part, TeacherRefusedError(f"teacher {replica.target} refused: {words}"))
            self._fail(flight, error.code().name, words)

    def _end(self, flight: Flight) -> None:
        flight.replica.under_way.discard(flight)
        self._flights.discard(flight)
        flight.part.under_way -= 1
        self._changed.notify_all()

    def _fail(self, flight: Flight, kind: str, words: str) -> None:
        """A replica failed: it rests, and its part goes back."""
        part, replica = flight.part, flight.replica
        if self._closed:
            return
        replica.failed(flight.sent, time.monotonic())
        part.failed_at.add(replica.target)
        self._roster.hear(replica.target, kind, words, part)
        if len(part.broke) >= _MANY and len(set(part.broke)) > 1:
            self._give_up(part, TeacherRefusedError(f"no teacher can answer; the last said {words}"))
        self._put_back(part)

    def _put_back(self, part: Part) -> None:
        """Let another replica, or this one later, take the part; unless it is answered or still under way."""
        if part.done or part.under_way:
            return
        patience_s = self._patience_s + part.deadline_s - self._deadline_s
        if part.tries >= _MANY and time.monotonic() - part.first_sent > patience_s:
            words = self._roster.last_words("\n  ")
            self._give_up(part, TeachersGoneError(
                f"no teacher has answered in {part.tries} tries and {patience_s:.0f} s (--teacher.patience-s). "
                f"Last words:{words}"
            ))  # fmt: skip
            return
        self._retries += 1
        bisect.insort(self._waiting, part)

    def _give_up(self, part: Part, error: TeacherError) -> None:
        if part.done:
            return
        part.done = True
        request_id = part.request.request_id
        log.error("request %s is given up: %s", request_id, error, extra={"request_id": request_id})
        part.answer.fail(type(error)(f"{error} (request {request_id})"))
