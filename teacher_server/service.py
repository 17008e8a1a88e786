"""The RPC methods. Status codes live here, and only here.

A request's way: admitted (admission.py) -> its message read and checked without pictures -> rows reserved in the
batcher -> its turn to have its pictures read and rendered, on the handler's thread -> its rows wait for the model ->
logits. At every border it is dropped if nobody waits for it any more. Everything that a request can do wrong ends in
a status and a sentence that names the row; nothing that a request does ends the server.

Predict is unary on the wire. Here it is handled as a stream of one message, because gRPC calls the handler of a unary
method only when the whole message is there, and then a caller who must be refused has sent 256 MiB for nothing; and
it gets bytes, because gRPC would parse them on the one thread that serves all calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import numpy as np
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from protos import teacher_pb2 as pb
from protos.arrays import all_finite, to_message
from protos.outline import check_outline
from teacher_server.admission import MAX_MESSAGE_BYTES, Admission
from teacher_server.batcher import Batcher
from teacher_server.clients import MAX_NAME_BYTES, Clients, host_of
from teacher_server.events import Repeated
from teacher_server.gate import wire_dtype
from teacher_server.metrics import Metrics
from teacher_server.model import Scene, broken_device
from teacher_server.pictures import BadRequestError, NotHereError, Pictures, UnknownSampleError
from teacher_server.shares import FullError
from teacher_server.ticket import ClosedError, ModelError, OverloadedError, Ticket, WithdrawnError
from teacher_server.turns import Turns
from views.setting import Average
from views.view import view_digest
from views.wire import Question, read_question

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Teacher"].full_name

_MAX_ID_CHARACTERS = 128
_OTHER_PARTS = 1000  # of a message, beside a picture for each view; ours have about a hundred
_FAILURES_UNTIL_BROKEN = 3  # in a row: a model that fails every batch does not recover inside this process
_ONE_THREAD = 2**15  # elements: from twice as many on, torch converts them on several
_QUIET_S = 0.04

_STATUS = {
    UnknownSampleError: grpc.StatusCode.OUT_OF_RANGE,
    NotHereError: grpc.StatusCode.FAILED_PRECONDITION,
    BadRequestError: grpc.StatusCode.INVALID_ARGUMENT,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Desk:
    """What answers, once it is loaded, warm and gated."""

    description: pb.Description
    pictures: Pictures
    turns: Turns
    batcher: Batcher[Scene]


class Refusal(Exception):  # noqa: N818 - not an error of ours
    """An answer other than logits."""

    def __init__(self, code: grpc.StatusCode, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _Caller:
    """Who asks, as far as is known yet."""

    peer: str
    client: str
    request_id: str = ""


@dataclass(slots=True)
class _Asked:
    """A request, taken apart; the message itself is gone."""

    question: Question
    digest: str
    audit_pixels: bool
    num_bytes: int


class TeacherService:
    """funmatch.v1.Teacher. Answers UNAVAILABLE until `open` is called, and after `close`."""

    def __init__(self, admission: Admission, metrics: Metrics, on_broken: Callable[[str], None]) -> None:
        """Take who lets in, who counts, and what to call, with a sentence, when this process must end."""
        self._desk: Desk | None = None
        self._admission = admission
        self._metrics = metrics
        self._on_broken = on_broken
        self._clients = Clients()
        self._last_call = 0.0
        self.refusals = Repeated()
        """What is logged of them; to be flushed now and then."""
        self._why_not = "the teacher is still loading"

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """What to register. Predict as a stream of one message: the docstring of this file says why."""
        return {
            "Describe": grpc.stream_unary_rpc_method_handler(
                self.Describe, response_serializer=pb.Description.SerializeToString
            ),
            "Predict": grpc.stream_unary_rpc_method_handler(
                self.Predict, response_serializer=pb.PredictReply.SerializeToString
            ),
        }

    def open(self, desk: Desk) -> None:
        """Begin to answer."""
        self._desk = desk

    def close(self, why_not: str = "the teacher is shutting down") -> None:
        """Answer nothing new; calls in progress go on."""
        self._why_not, self._desk = why_not, None

    def wait_until_quiet(self, timeout_s: float) -> None:
        """Wait until nobody has called for a moment, for so many seconds at most."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < min(deadline, self._last_call + _QUIET_S):
            time.sleep(_QUIET_S / 4)

    def Describe(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> pb.Description:  # noqa: ARG002
        """Who is this. The request is empty: whatever was sent is not read."""
        self._last_call = time.monotonic()
        desk = self._desk
        if desk is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, self._why_not)
        assert desk is not None
        return desk.description

    def Predict(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> pb.PredictReply:
        """Logits for a batch of rows."""
        began = self._last_call = time.monotonic()
        peer = context.peer()
        caller = _Caller(peer, host_of(peer))
        desk = self._desk
        try:
            return self._answer(desk, messages, caller, context)
        except Exception as error:  # whatever it is, it is this request's answer and not the server's end
            refusal = self._refusal(error, desk, caller)
        finally:
            self._metrics.request.observe(time.monotonic() - began)
        return self._refuse(refusal, caller, context)

    def _answer(
        self, desk: Desk | None, messages: Iterator[bytes], caller: _Caller, context: grpc.ServicerContext
    ) -> pb.PredictReply:
        if desk is None:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, self._why_not)
        with self._admission.seat():
            with self._admission.reading():
                asked = self._read(desk, messages, caller, context)
            with self._admission.request(caller.client, asked.num_bytes):
                return self._predict(desk, asked, caller, context)

    def _read(self, desk: Desk, messages: Iterator[bytes], caller: _Caller, context: grpc.ServicerContext) -> _Asked:
        message = self._admission.message(messages, context)
        if message is None:
            raise BadRequestError("the call ended without a request")
        request = _parsed(message, desk.description.max_rows)
        if len(request.request_id) > _MAX_ID_CHARACTERS:
            raise BadRequestError(
                f"request_id has {len(request.request_id)} characters, at most {_MAX_ID_CHARACTERS} are allowed"
            )
        caller.request_id = request.request_id
        if (num_bytes := len(request.client.encode())) > MAX_NAME_BYTES:
            raise BadRequestError(f"client has {num_bytes} bytes, at most {MAX_NAME_BYTES} are allowed")
        caller.client = self._clients.name(request.client, caller.peer)
        question = _checked(request, desk.description)
        return _Asked(question, request.references.digest, request.audit_pixels, len(message))

    def _predict(self, desk: Desk, asked: _Asked, caller: _Caller, context: grpc.ServicerContext) -> pb.PredictReply:
        description, question = desk.description, asked.question
        with desk.batcher.reserve(len(question.lam), caller.client) as ticket:
            # From here on, a caller that gives up or whose deadline passes withdraws the ticket.
            if not context.add_callback(ticket.withdraw):
                raise WithdrawnError("the call ended before it began")
            pixels = self._views(desk, asked, ticket, caller.client)
            asked.question = question = question.without_pictures()
            partner = torch.from_numpy(question.partner.astype(np.int64))
            ticket.submit(Scene(pixels, partner, torch.from_numpy(question.lam.copy())))
            answers = averaged(ticket.result(), question.mean_of, question.average)
            logits = travelling(answers, wire_dtype(description.precision))
        _check_finite(logits, question)
        reply = pb.PredictReply(
            request_id=caller.request_id, fingerprint=description.fingerprint, logits=to_message(logits)
        )
        if len(question.audit):
            _vouch(reply, pixels, question, with_pixels=asked.audit_pixels)
        self._metrics.answered(len(question.lam))
        return reply

    def _views(self, desk: Desk, asked: _Asked, ticket: Ticket[Scene], client: str) -> torch.Tensor:
        """The question's views, rendered portion by portion; between two, others have their turns."""
        seconds = 0.0

        @contextmanager
        def turn(num_pixels: int) -> Iterator[None]:
            nonlocal seconds
            with desk.turns.turn(client, num_pixels, lambda: ticket.settled):
                ticket.check()
                began = time.monotonic()
                yield
                seconds += time.monotonic() - began

        pixels = desk.pictures.views(asked.question, asked.digest, turn)
        self._metrics.render.observe(seconds)
        return pixels

    def _refusal(self, error: Exception, desk: Desk | None, caller: _Caller) -> Refusal:
        """The answer to give instead of logits."""
        match error:
            case Refusal():
                return error
            case BadRequestError():
                return Refusal(_STATUS[type(error)], str(error))
            case OverloadedError():
                return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), error.retry_after_s)
            case FullError():
                assert desk is not None
                retry_after_s = desk.batcher.retry_after_s(1 if error.next_in_line else None)
                return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), retry_after_s)
            case ClosedError():
                return Refusal(grpc.StatusCode.UNAVAILABLE, str(error))
            case WithdrawnError() | grpc.RpcError():  # nobody hears this: the call has ended
                return Refusal(grpc.StatusCode.CANCELLED, str(error) or "the call ended before its message came")
        if (how := broken_device(error)) is not None:
            self._on_broken(f"rendering failed: {how}")
            return Refusal(grpc.StatusCode.UNAVAILABLE, f"this teacher's device is broken: {how}")
        self.refusals.event(
            "predict_failed", (caller.client, "failed"), failed=True, request_id=caller.request_id, client=caller.client
        )
        if isinstance(error, ModelError):
            self._note_failure(error)
        return Refusal(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")

    def _note_failure(self, error: ModelError) -> None:
        desk = self._desk
        if desk is not None and desk.batcher.consecutive_failures >= _FAILURES_UNTIL_BROKEN:
            self._on_broken(f"{_FAILURES_UNTIL_BROKEN} batches in a row failed; the last: {error}")

    def _refuse(self, refusal: Refusal, caller: _Caller, context: grpc.ServicerContext) -> NoReturn:
        code = refusal.code.name
        self._metrics.refused(code)
        self.refusals.event(
            "refused", (caller.client, code), request_id=caller.request_id, client=caller.client, peer=caller.peer,
            code=code, reason=str(refusal),
        )  # fmt: skip
        if refusal.retry_after_s is not None:
            milliseconds = max(1, round(refusal.retry_after_s * 1000))
            context.set_trailing_metadata((("grpc-retry-pushback-ms", str(milliseconds)),))
        context.abort(refusal.code, str(refusal))
        raise AssertionError("abort raises")


def _parsed(message: bytes, max_rows: int) -> pb.PredictRequest:
    try:
        check_outline(message, pb.PredictRequest, 2 * max_rows + _OTHER_PARTS)
        return pb.PredictRequest.FromString(message)
    except (DecodeError, ValueError) as error:
        raise BadRequestError(f"this is no PredictRequest: {error}") from error


def averaged(logits: NDArray[np.float32], mean_of: int, average: Average) -> NDArray[np.float32]:
    """The mean of each mean_of consecutive rows [R, K], in float32: [R / mean_of, K].

    Of probabilities, as their logarithm: log(mean(softmax)), computed without leaving the log domain.
    """
    if mean_of == 1:
        return logits
    grouped_GNK = torch.from_numpy(logits).reshape(-1, mean_of, logits.shape[1])
    if average == "logits":
        mean_GK = grouped_GNK.mean(dim=1)
    else:
        mean_GK = grouped_GNK.log_softmax(dim=2).logsumexp(dim=1) - math.log(mean_of)
    return mean_GK.numpy()


def travelling(logits: NDArray[np.float32], dtype: type[np.float16] | type[np.float32]) -> NDArray[Any]:
    """The logits as they are sent; what is too large for half precision becomes infinite.

    torch's conversion, as exact as numpy's, which takes 200 us for 64,000 numbers and torch's 15; in pieces that torch
    does not hand to other threads, of which each handler would get a set of its own.
    """
    if logits.dtype == dtype:
        return logits
    half = torch.empty(logits.shape, dtype=torch.float16)
    sources = torch.split(torch.from_numpy(logits).reshape(-1), _ONE_THREAD)
    for to, source in zip(torch.split(half.view(-1), _ONE_THREAD), sources, strict=True):
        to.copy_(source)
    numbers: NDArray[np.float16] = half.numpy()
    return numbers


def _checked(request: pb.PredictRequest, description: pb.Description) -> Question:
    if request.fingerprint != description.fingerprint:
        raise NotHereError(
            f"the request is for teacher {request.fingerprint[:12] or '(no fingerprint)'}, this is "
            f"{description.fingerprint[:12]}: call Describe again"
        )
    # Before anything is unpacked: the count is in the shape.
    num_rows = request.lam.shape[0] if request.lam.shape else 0
    if num_rows > description.max_rows:
        raise BadRequestError(
            f"row {description.max_rows} is one too many: a request has at most {description.max_rows} rows, "
            f"this one {num_rows}"
        )
    try:
        question = read_question(request, description.rendering.size)
    except ValueError as error:
        raise BadRequestError(str(error)) from error
    audit_bytes = len(question.audit) * 3 * description.rendering.size**2
    if request.audit_pixels and audit_bytes > MAX_MESSAGE_BYTES // 2:
        raise BadRequestError(f"the pixels of {len(question.audit)} audited views do not fit a reply: ask for fewer")
    # Every view is a row's own or a row's partner, every picture a view's.
    if question.num_views > 2 * num_rows:
        raise BadRequestError(f"{num_rows} rows need at most {2 * num_rows} views, got {question.num_views}")
    num_pictures = max(len(question.sample), len(question.encoded))
    if num_pictures > question.num_views:
        raise BadRequestError(f"{question.num_views} views need at most as many pictures, got {num_pictures}")
    return question


def _check_finite(logits: NDArray[Any], question: Question) -> None:
    if not all_finite(logits):
        row = int(np.argmin(np.isfinite(logits).all(axis=1))) * question.mean_of
        raise Refusal(
            grpc.StatusCode.INTERNAL,
            f"{question.name(row)}: the logits are not finite in {logits.dtype}; serve with --precision float32",
        )


def _vouch(reply: pb.PredictReply, pixels: torch.Tensor, question: Question, *, with_pixels: bool) -> None:
    """The view audit: digests of what was really rendered, and on request the pixels."""
    audited = pixels[torch.from_numpy(question.audit.astype(np.int64)).to(pixels.device)].cpu().numpy()
    digests = np.stack([np.frombuffer(view_digest(view), np.uint8) for view in audited])
    reply.audit_digest.CopyFrom(to_message(digests))
    if with_pixels:
        reply.audit_pixels.CopyFrom(to_message(audited))
