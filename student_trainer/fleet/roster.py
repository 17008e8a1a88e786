"""The replicas of one teacher: who is known, who is one of us, and what each said last.

A replica is first asked who it is (Describe). One with another fingerprint than the first that answered is refused,
and asked again later: it may be restarted as the right one. Replicas whose address vanishes from a looked-up name get
nothing new, and go when their last part is back.

What they are asked, and when, is not here (dispatch.py). Rejected: gRPC's health service beside Describe. A teacher
that does not serve says so to Describe too, and one that leaves says so to the next part, which then goes elsewhere.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc

from protos import teacher_pb2 as pb
from student_trainer.fleet.addresses import Addresses, Place
from student_trainer.fleet.answer import Part, TeacherError, TeacherRefusedError
from student_trainer.fleet.credentials import Credentials
from student_trainer.fleet.replica import Replica, Verdict, judge

log = logging.getLogger(__name__)

_DESCRIBE_S = 10.0


class Roster:
    """Who is there. All of it belongs to the lock `changed`, and whoever changes something notifies."""

    def __init__(
        self,
        where: Addresses,
        credentials: Credentials,
        changed: threading.Condition,
        *,
        window: int,
        deadline_s: float,
    ) -> None:
        """Connect to the fixed addresses.

        Raises:
            ValueError: the credentials do not allow to connect to one of them.
        """
        self.replicas: dict[str, Replica] = {}
        """By target."""
        self.description: pb.Description | None = None
        """Of the first that answered."""
        self.refusal: TeacherError | None = None
        """Before anybody answered, one said that it does not know us."""
        self._where = where
        self._credentials = credentials
        self._changed = changed
        self._window = window
        self._deadline_s = deadline_s
        self._closed = False
        self._words = dict.fromkeys(where.names, "not looked up yet")
        self._kinds: dict[str, str] = {}
        for place in where.fixed:
            self._add(place)

    def watch(self, look_up: Callable[[str, str], frozenset[str]]) -> None:
        """Look names up from now on."""
        self._where.watch(self._come_and_go, lambda entry, words: self.hear(entry, words, words), look_up)

    def serving(self) -> list[Replica]:
        """Those to whom parts may be sent, now or when they have room."""
        return [replica for replica in self.replicas.values() if replica.serves()]

    def strangers(self, now: float) -> list[Replica]:
        """Those whom it is time to ask who they are (introduce)."""
        found = [replica for replica in self.replicas.values() if replica.may_be_asked_who(now)]
        for replica in found:
            replica.is_asked_who = True
        return found

    def close(self) -> None:
        """Look nothing up and ask nobody any more."""
        self._where.close()
        with self._changed:
            self._closed = True
        for replica in self.replicas.values():
            replica.close()

    def _come_and_go(self, places: frozenset[Place]) -> None:
        with self._changed:
            wanted = {place.target: place for place in places}
            for target, replica in self.replicas.items():
                replica.leaves = target not in wanted
            for target in sorted(wanted.keys() - self.replicas.keys()):
                try:
                    self._add(wanted[target])
                except ValueError as error:
                    self.hear(target, "cannot be asked", str(error))
            self._changed.notify_all()

    def _add(self, place: Place) -> None:
        self.replicas[place.target] = Replica(place, self._credentials, self._window)
        self._words[place.target] = "not asked yet"

    def those_who_left(self) -> list[Replica]:
        """Those whose name is gone and whose last part is back."""
        gone = [one for one in self.replicas.values() if one.leaves and not one.under_way and not one.is_asked_who]
        for replica in gone:
            del self.replicas[replica.target]
            self._words.pop(replica.target)
            self._kinds.pop(replica.target, None)
            log.info("teacher %s: left; it answered %d rows", replica.target, replica.num_rows)
        return gone

    def introduce(self, replica: Replica) -> None:
        """Ask a replica who it is. Not to be called under the lock."""
        sent = time.monotonic()
        try:
            replica.describe(min(_DESCRIBE_S, self._deadline_s), partial(self._described, replica, sent))
        except ValueError as error:
            with self._changed:
                replica.is_asked_who = False
                replica.failed(sent, time.monotonic())
                self.hear(replica.target, "cannot be asked", str(error))

    def _described(self, replica: Replica, sent: float, call: Any) -> None:
        with self._changed:
            if self._closed:
                return
            replica.is_asked_who = False
            now = time.monotonic()
            try:
                description = call.result()
            except grpc.FutureCancelledError:
                replica.failed(sent, now)
            except grpc.RpcError as error:
                replica.failed(sent, now)
                words = replica.words(error)
                self.hear(replica.target, error.code().name, words)
                if judge(error) is Verdict.LOCKED_OUT and self.description is None:
                    self.refusal = TeacherRefusedError(f"teacher {replica.target} does not know us: {words}")
            else:
                self._meet(replica, description, now)
            self._changed.notify_all()

    def _meet(self, replica: Replica, description: pb.Description, now: float) -> None:
        """Take note of who a replica is, and whether it is one of us."""
        if self.description is None:
            self.description = description
        ours = self.description
        same = ours.fingerprint == description.fingerprint
        replica.met(same, now)
        if same:
            self.hear(replica.target, "serves", "serves")
        else:
            self.hear(
                replica.target, "refused",
                f"refused: its fingerprint is {description.fingerprint} ({description.model}, "
                f"{description.precision}), this run's teacher is {ours.fingerprint} ({ours.model}, {ours.precision})",
            )  # fmt: skip

    def last_words(self, between: str) -> str:
        """What everybody said last."""
        return "".join(f"{between}{target}: {words}" for target, words in sorted(self._words.items()))

    def words_of(self, target: str) -> str:
        """What a replica said last."""
        return self._words.get(target, "")

    def hear(self, target: str, kind: str, words: str, about: Part | None = None) -> None:
        """Remember what a replica said last; log it when it is of another kind than what it said before."""
        with self._changed:
            before = self._kinds.get(target)
            if kind == "serves" and before is not None:  # that it works again, only an answer shows
                return
            self._words[target] = words
            if kind == before:
                return
            self._kinds[target] = kind
            if (before, kind) == ("serves", "answered"):
                return
            well = kind in ("answered", "serves") or kind.startswith("stands for")
            request = f" (request {about.request.request_id})" if about else ""
            log.log(
                logging.INFO if well else logging.WARNING, "teacher %s: %s%s", target, words, request,
                extra={"request_id": about.request.request_id} if about else None,
            )  # fmt: skip
