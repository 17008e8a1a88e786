"""The RPC methods. Status codes live here, and only here.

A request's way: checked without pictures -> a place reserved in the batcher -> pictures read and rendered on
the handler's thread -> its rows wait for the model -> logits. Everything that a request can do wrong ends in a
status and a sentence that names the row; nothing that a request does ends the server.

Handlers are plain threads. Fewer Predict calls are let in than there are threads, so that health checks and
Describe always find one: a teacher that is busy must not look dead.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import numpy as np
import torch
from numpy.typing import NDArray

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from protos.arrays import to_message
from teacher_server import events
from teacher_server.batcher import Batcher
from teacher_server.gate import wire_dtype
from teacher_server.model import Scene
from teacher_server.pictures import BadRequestError, NotHereError, Pictures, UnknownSampleError
from teacher_server.ticket import ClosedError, ModelError, OverloadedError, WithdrawnError
from views.setting import Average
from views.view import view_digest
from views.wire import Question, read_question

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Teacher"].full_name

MAX_CONCURRENT_PREDICTS = 16
"""Predict calls in progress at once; more are refused like too many rows."""

_FAILURES_UNTIL_BROKEN = 3  # in a row: a device that fails every batch does not recover inside this process

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
    batcher: Batcher[Scene]


class Refusal(Exception):  # noqa: N818 - not an error of ours
    """An answer other than logits."""

    def __init__(self, code: grpc.StatusCode, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.code = code
        self.retry_after_s = retry_after_s


class TeacherService(pb_grpc.TeacherServicer):
    """funmatch.v1.Teacher. Answers UNAVAILABLE until `open` is called, and after `close`."""

    def __init__(self, on_broken: Callable[[], None]) -> None:
        """Take what to call when the model fails again and again."""
        self._desk: Desk | None = None
        self._on_broken = on_broken
        self._places = threading.BoundedSemaphore(MAX_CONCURRENT_PREDICTS)
        self._why_not = "the teacher is still loading"

    def open(self, desk: Desk) -> None:
        """Begin to answer."""
        self._desk = desk

    def close(self) -> None:
        """Answer nothing new; calls in progress go on."""
        self._why_not, self._desk = "the teacher is shutting down", None

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:  # noqa: ARG002
        """Who is this."""
        desk = self._desk
        if desk is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, self._why_not)
        assert desk is not None
        return desk.description

    def Predict(self, request: pb.PredictRequest, context: grpc.ServicerContext) -> pb.PredictReply:
        """Logits for a batch of rows."""
        try:
            with self._admitted() as desk:
                return _predict(desk, request, context)
        except Exception as error:  # whatever it is, it is this request's answer and not the server's end
            refusal = self._refusal(error, request)
        return _refuse(refusal, request, context)

    def _refusal(self, error: Exception, request: pb.PredictRequest) -> Refusal:
        """The answer to give instead of logits."""
        match error:
            case Refusal():
                return error
            case BadRequestError():
                return Refusal(_STATUS[type(error)], str(error))
            case OverloadedError():
                return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), error.retry_after_s)
            case ClosedError():
                return Refusal(grpc.StatusCode.UNAVAILABLE, str(error))
            case WithdrawnError():  # nobody hears this: the call has ended
                return Refusal(grpc.StatusCode.CANCELLED, str(error))
        events.failure("predict_failed", request_id=request.request_id)
        if isinstance(error, ModelError):
            self._note_failure()
        return Refusal(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")

    @contextmanager
    def _admitted(self) -> Iterator[Desk]:
        desk = self._desk
        if desk is None:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, self._why_not)
        if not self._places.acquire(blocking=False):
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{MAX_CONCURRENT_PREDICTS} requests are in progress already",
                desk.batcher.retry_after_s(),
            )
        try:
            yield desk
        finally:
            self._places.release()

    def _note_failure(self) -> None:
        desk = self._desk
        if desk is not None and desk.batcher.consecutive_failures >= _FAILURES_UNTIL_BROKEN:
            self._on_broken()


def _predict(desk: Desk, request: pb.PredictRequest, context: grpc.ServicerContext) -> pb.PredictReply:
    description = desk.description
    question = _checked(request, description)
    with desk.batcher.reserve(len(question.lam)) as ticket:
        # A caller that gave up, or whose deadline passed, is dropped before the model runs.
        if not context.add_callback(ticket.withdraw):
            raise WithdrawnError("the call ended before it began")
        pixels = desk.pictures.views(question, request.references.digest)
        partner = torch.from_numpy(question.partner.astype(np.int64))
        ticket.submit(Scene(pixels, partner, torch.from_numpy(question.lam.copy())))
        answers = averaged(ticket.result(), question.mean_of, question.average)
        logits = answers.astype(wire_dtype(description.precision), copy=False)
    _check_finite(logits, question)
    reply = pb.PredictReply(
        request_id=request.request_id, fingerprint=description.fingerprint, logits=to_message(logits)
    )
    if len(question.audit):
        _vouch(reply, pixels, question, with_pixels=request.audit_pixels)
    return reply


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
    # Every view is a row's own or a row's partner, every picture a view's.
    if question.num_views > 2 * num_rows:
        raise BadRequestError(f"{num_rows} rows need at most {2 * num_rows} views, got {question.num_views}")
    num_pictures = max(len(question.sample), len(question.encoded))
    if num_pictures > question.num_views:
        raise BadRequestError(f"{question.num_views} views need at most as many pictures, got {num_pictures}")
    return question


def _check_finite(logits: NDArray[Any], question: Question) -> None:
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite)) * question.mean_of
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


def _refuse(refusal: Refusal, request: pb.PredictRequest, context: grpc.ServicerContext) -> NoReturn:
    events.event(
        "refused", request_id=request.request_id, peer=context.peer(), code=refusal.code.name, reason=str(refusal)
    )
    if refusal.retry_after_s is not None:
        milliseconds = max(1, round(refusal.retry_after_s * 1000))
        context.set_trailing_metadata((("grpc-retry-pushback-ms", str(milliseconds)),))
    context.abort(refusal.code, str(refusal))
    raise AssertionError("abort raises")
