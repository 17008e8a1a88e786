"""A real server on a free port with its stubs, rows to ask it about, and slow ways to know what it must answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

import models
import reference_render
from data_prep.index import Index
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from protos.arrays import from_message
from teacher_server.config import Config
from teacher_server.server import MAX_MESSAGE_BYTES, Server, create_server
from views.draw import ViewLaw
from views.setting import FixedViews
from views.view import Rows

SIZE = 32
TIMEOUT_S = 60


class Client:
    """The stubs of one server."""

    def __init__(self, address: str) -> None:
        limits = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        self.channel = grpc.insecure_channel(address, options=limits)
        self.stub = pb_grpc.TeacherStub(self.channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)
        self._described: pb.Description | None = None

    @property
    def description(self) -> pb.Description:
        self._described = self._described or self.stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT_S)
        return self._described

    def health(self, name: str = "") -> int:
        return self._health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status

    def watch_health(self) -> Iterator[health_pb2.HealthCheckResponse]:
        return self._health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)

    def signed(self, request: pb.PredictRequest, request_id: str = "r1") -> pb.PredictRequest:
        request.fingerprint, request.request_id = self.description.fingerprint, request_id
        return request

    def predict(self, request: pb.PredictRequest) -> pb.PredictReply:
        return self.stub.Predict(self.signed(request), timeout=TIMEOUT_S)

    def begin(self, request: pb.PredictRequest) -> grpc.Future:
        return self.stub.Predict.future(self.signed(request), timeout=TIMEOUT_S)

    def logits(self, request: pb.PredictRequest) -> np.ndarray:
        return from_message(self.predict(request).logits, "logits", np.float32, (None, 6))


def small(model: Path, data: Path) -> Config:
    """A teacher of views of 32 pixels that takes 40 rows a request, and 80 at a time."""
    return Config(
        model=str(model), data=(data,), address="127.0.0.1:0", device="cpu", threads=1,
        batch_rows=8, max_rows=40, max_pending_rows=80, gate_images=8, drain_s=20,
    )  # fmt: skip


@contextmanager
def serving(config: Config) -> Iterator[tuple[Server, Client]]:
    server, address = create_server(config)
    client = Client(address)
    try:
        server.load()
        yield server, client
    finally:
        client.channel.close()
        server.drain()


def draw(index: Index, num_rows: int, seed: int = 0) -> Rows:
    """Rows of random pictures and boxes, partners rolled by one, as a step of mixup has them."""
    rng = np.random.default_rng((9, seed))
    sample = rng.integers(0, len(index), num_rows)
    height, width = index.height[sample], index.width[sample]
    h, w = rng.integers(8, height + 1), rng.integers(8, width + 1)
    y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    return Rows(
        sample=sample,
        box=np.stack([y, x, h, w], axis=1).astype(np.int32),
        flip=rng.random(num_rows) < 0.5,
        partner=np.roll(np.arange(num_rows, dtype=np.int32), 1),
        lam=rng.random(num_rows, dtype=np.float32),
    )


def files(index: Index, rows: Rows) -> list[bytes]:
    return [picture.tobytes() for picture in index.read(np.unique(rows.sample))]


def rendered(index: Index, rows: Rows) -> np.ndarray:
    """The views by the slow reference, uint8 [V, S, S, 3]."""
    shown = zip(index.read(rows.sample), rows.box, rows.flip, strict=True)
    return np.stack([reference_render.render(picture, box, SIZE, flip) for picture, box, flip in shown])


def by_hand(index: Index, rows: Rows, model_file: Path) -> np.ndarray:
    """Logits by Pillow, numpy in float64, and the network as it lies in its file, one row at a time."""
    model, card = models.load(model_file)
    views = rendered(index, rows) / 255.0
    lam = rows.lam.astype(np.float64)[:, None, None, None]
    mixed = lam * views[: len(rows)] + (1 - lam) * views[rows.partner]
    inputs = torch.from_numpy(((mixed - card.mean) / card.std).transpose(0, 3, 1, 2)).float()
    with torch.inference_mode():
        return torch.cat([model.eval()(row[None]) for row in inputs]).numpy()


def crops(num_views: int) -> FixedViews:
    return FixedViews(law=ViewLaw(crop="ic", flip=True, mixup=False), num_views=num_views)
