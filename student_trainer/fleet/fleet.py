"""Asks teachers for logits ahead of need, and never takes an answer that is not the one asked for.

    Fleet    the replicas of one teacher, as one; ask(rows) returns at once
    Answer   of one batch; result() waits for its logits (answer.py, and the errors)

A batch is cut into parts, each closed under its mixup partners; which replica gets which is dispatch.py's business. A
part whose replica fails is asked again under its old number: nothing is skipped, and a row's logits are the same
whoever answers (the fingerprint says so). A teacher with another fingerprint is refused.

Rejected: gRPC's retries (they switch off above 256 KiB a request) and round_robin (it waits for the slowest).
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from protos import teacher_pb2 as pb
from protos.arrays import to_message
from student_trainer.fleet import addresses
from student_trainer.fleet.addresses import Addresses
from student_trainer.fleet.answer import Answer, Part, TeacherError, TeacherRefusedError
from student_trainer.fleet.credentials import Credentials
from student_trainer.fleet.dispatch import Dispatcher, FleetState
from views.setting import Average
from views.view import Rows
from views.wire import Transport, ask_by_reference, ask_encoded, ask_for_mean, ask_pixels

_FEWEST_ROWS = 16  # of a part that was cut smaller only so that every replica has one


class Fleet:
    """The replicas of one teacher, as one."""

    def __init__(
        self,
        replicas: Sequence[str],
        *,
        data_digest: str,
        client: str = "",
        credentials: Credentials | None = None,
        transport: Transport | None = None,
        rows_per_request: int = 64,
        window: int = 0,
        hedge: float = 0.0,
        deadline_s: float = 120.0,
        patience_s: float = 600.0,
        look_up: Callable[[str, str], frozenset[str]] = addresses.look_up,
    ) -> None:
        """Connect, and wait until one teacher has said who it is.

        Args:
            replicas: "host:port", "unix:/path"; "dns:///name:port" or "host:first-last", looked up again and again.
            data_digest: of the data set that samples point into.
            client: names this run, the same on all its ranks: a busy teacher is shared fairly between names.
            credentials: TLS and token; by default neither.
            transport: how pictures travel; None chooses by what the first teacher offers.
            rows_per_request: largest part of a batch, in rows.
            window: requests in flight per replica; 0: by measured latency.
            hedge: a request that takes so many times the usual time is sent to an idle replica too; 0: never.
            deadline_s: seconds after which a request of rows_per_request rows goes to another replica; a larger one
                (ask: mean_of) gets as many times more.
            patience_s: seconds without any answer after which the run gives up.
            look_up: finds the addresses of (name, port).

        Raises:
            ValueError: no address, or one that is none; credentials that do not fit them.
            TeachersGoneError: nobody could be described within patience_s.
            TeacherRefusedError: the teacher does not offer the transport, or does not know our token.
        """
        self._numbers = itertools.count()
        self._deadline_s = deadline_s
        self._data_digest = data_digest
        self._client = client
        self._dispatcher = Dispatcher(
            Addresses(replicas), credentials or Credentials(), window=window, hedge=hedge, deadline_s=deadline_s,
            patience_s=patience_s, look_up=look_up,
        )  # fmt: skip
        try:
            self.description = self._dispatcher.wait_for_description()
            """Of the first teacher that answered; all others must have its fingerprint."""
            self.transport = _choose_transport(self.description, transport, data_digest)
            """How pictures travel."""
        except TeacherError:
            self.close()
            raise
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
        # Averages travel whole: what is cut are groups of mean_of rows.
        at_once = max(1, self._rows_per_request // mean_of)
        num_groups = len(rows) // mean_of
        each_one = math.ceil(num_groups / max(1, self._dispatcher.num_serving))
        num_parts = math.ceil(num_groups / min(at_once, max(each_one, math.ceil(_FEWEST_ROWS / mean_of))))
        size = max(math.ceil(num_groups / num_parts), min(at_once, num_audits))  # what is audited is in the first
        starts = range(0, num_groups, size)
        more = max(1.0, at_once * mean_of / self._rows_per_request)
        answer = Answer(num_groups, self.description.num_classes, len(starts), self._patience(more))
        for first in starts:
            last = min(first + size, num_groups)
            request = self._request(rows, first * mean_of, last * mean_of, picture, pixels)
            if mean_of > 1:
                ask_for_mean(request, mean_of, average)
            audits = min(num_audits, (last - first) * mean_of) if first == 0 else 0
            if audits:
                request.audit.CopyFrom(to_message(np.arange(audits, dtype=np.int32)))
                request.audit_pixels = audit_pixels
            self._dispatcher.put(Part(
                number=next(self._numbers), request=request, answer=answer, start=first, num_answers=last - first,
                num_rows=(last - first) * mean_of, num_audits=audits, deadline_s=self._deadline_s * more,
            ))  # fmt: skip
        return answer

    def _patience(self, more: float) -> Callable[[float], None]:
        return lambda asked: self._dispatcher.check_patience(asked, self._deadline_s * (more - 1))

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
        request.client = self._client
        return request

    @property
    def num_slots(self) -> int:
        """Requests worth having under way at once, over all replicas: more only wait here."""
        return self._dispatcher.num_slots

    @property
    def rows_per_request(self) -> int:
        """Largest part of a batch, in rows."""
        return self._rows_per_request

    def state(self) -> FleetState:
        """How the replicas do now, for whoever watches."""
        return self._dispatcher.state()

    def hurry(self, patience_s: float) -> None:
        """Have no more patience than this from now on, with answers under way too: the run was told to stop."""
        self._dispatcher.hurry(patience_s)

    def close(self) -> None:
        """Stop asking; requests under way are abandoned."""
        self._dispatcher.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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
