"""A real gRPC server that answers with a known function of the rows, and fails as a test asks it to; and its fleet."""

from __future__ import annotations

import threading
import time
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from protos.arrays import to_message
from student_trainer.fleet import Fleet
from views.draw import Plan, ViewLaw
from views.view import Rows
from views.wire import read_question

DIGEST = "d" * 64
NUM_CLASSES = 3


def expected_logits(rows: Rows) -> np.ndarray:
    """What the scripted teacher answers: numbers that change with every part of a row."""

    def view(v):
        y, x, h, w = rows.box[v].T.astype(np.float64)
        return rows.sample[v] + y / 7 + x / 11 + h / 13 + w / 17 + rows.flip[v]

    own, partner = view(np.arange(len(rows))), view(rows.partner)
    mixed = rows.lam * own + (1 - rows.lam) * partner
    return np.stack([mixed, -mixed, mixed**2 / 1000], axis=1).astype(np.float32)


class ScriptedTeacher(pb_grpc.TeacherServicer):
    """Answers by formula; fails the way a test asks it to."""

    def __init__(self, fingerprint: str = "f1", delay_s: float = 0.0, data_digest: str = DIGEST, max_rows: int = 1024):
        self.fingerprint = fingerprint
        self.delay_s = delay_s
        self.data_digest = data_digest
        self.max_rows = max_rows
        self.fail_next: list[grpc.StatusCode] = []
        self.push_back_ms = None
        self.spoil = None  # called with each reply
        self.answered_rows = 0
        self.calls: list[float] = []  # when
        self.clients: set[str] = set()
        self.lock = threading.Lock()

    def Describe(self, request, context):
        return pb.Description(
            fingerprint=self.fingerprint, model="scripted", num_classes=NUM_CLASSES, precision="float32",
            rendering=pb.Rendering(size=8, interpolation="linear", version="v"), max_rows=self.max_rows,
            data_sets=[pb.DataSet(name="tiny", digest=self.data_digest)], renders=True,
        )  # fmt: skip

    def Predict(self, request, context):
        with self.lock:
            code = self.fail_next.pop() if self.fail_next else None
            self.calls.append(time.monotonic())
            self.clients.add(request.client)
        if code is not None:
            if self.push_back_ms is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", str(self.push_back_ms)),))
            context.abort(code, "told to fail")
        if request.fingerprint != self.fingerprint:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"I am {self.fingerprint}")
        time.sleep(self.delay_s)
        question = read_question(request, 8)
        rows = Rows(
            sample=question.sample[question.image], box=question.box, flip=question.flip, partner=question.partner,
            lam=question.lam,
        )  # fmt: skip
        reply = pb.PredictReply(
            request_id=request.request_id,
            fingerprint=self.fingerprint,
            logits=to_message(averaged(expected_logits(rows), question.mean_of)),
        )
        if len(question.audit):
            reply.audit_digest.CopyFrom(to_message(np.full((len(question.audit), 16), 7, np.uint8)))
        with self.lock:
            self.answered_rows += len(rows)
        if self.spoil:
            self.spoil(reply)
        return reply


def averaged(logits: np.ndarray, mean_of: int) -> np.ndarray:
    return logits.reshape(-1, mean_of, logits.shape[1]).mean(axis=1)


@contextmanager
def serving(teacher: ScriptedTeacher, address: str = "127.0.0.1:0"):
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_TeacherServicer_to_server(teacher, server)
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def batch(step: int = 0, num_rows: int = 50) -> Rows:
    sizes = np.full(500, 90, np.int32)
    plan = Plan(seed=1, batch_size=2 * num_rows, law=ViewLaw(), samples=range(500), height=sizes, width=sizes)
    return plan.rows(step, 0, num_rows)


def fleet(*addresses: str, **settings) -> Fleet:
    settings = {"data_digest": DIGEST, "rows_per_request": 16, "patience_s": 20, "deadline_s": 10} | settings
    return Fleet(addresses, **settings)
