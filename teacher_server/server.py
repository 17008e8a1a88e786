"""What listens, and its life: bound -> loading -> gate -> serving -> draining -> gone.

The port is bound and the health service answers before the model is loaded, so that whoever waits can see that
this process lives but does not serve yet. `create_server` makes it, `load` may take minutes, `drain` ends it.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import grpc
import numpy as np
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from torch import nn

import models
from data_prep.index import Index
from models import ModelCard
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from teacher_server import events, gate, tls
from teacher_server.batcher import Batcher
from teacher_server.config import Config
from teacher_server.model import (
    Scene,
    Teacher,
    be_reproducible,
    choose_batch_rows,
    choose_device,
    choose_precision,
    fingerprint,
    load,
)
from teacher_server.pictures import Pictures, make_renderers
from teacher_server.service import MAX_CONCURRENT_PREDICTS, SERVICE_NAME, Desk, TeacherService
from teacher_server.tokens import TokenGuard, Tokens

MAX_MESSAGE_BYTES = 256 * 2**20
"""Of one request or reply: 1700 views of 224 pixels, 600 of 384. Without a bound, one caller could fill the memory."""

_SPARE_THREADS = 8  # for health, Describe, reflection and refusals, whatever Predict does
_NUM_RENDERERS = 2  # one renders while the other's pictures are read
_LAST_REPLIES_S = 2.0  # to get the last replies out; the streams of health watchers never end by themselves

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # two servers on one port are a mistake, not a fleet
    # Clients notice a vanished host by pinging; without these they would be told to stop (doc/keepalive.md).
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 15_000),
    # Clients that balance by name look it up again when a connection ends; calls in progress are not cut.
    ("grpc.max_connection_age_ms", 600_000),
]


class Server:
    """One teacher, listening. Made by create_server."""

    def __init__(self, config: Config) -> None:
        self.address = ""
        self.ended = threading.Event()
        """Set when the server should be drained: by whoever owns it, or by itself when the model is broken."""
        self.broken = False
        """The model failed again and again."""
        self._config = config
        self._health = health.HealthServicer()
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)  # its own default is SERVING
        self._service = TeacherService(self._break)
        self._batcher: Batcher[Scene] | None = None
        self._threads = ThreadPoolExecutor(MAX_CONCURRENT_PREDICTS + _SPARE_THREADS, thread_name_prefix="handler")
        guards: list[grpc.ServerInterceptor] = []
        if config.token_file is not None:
            guards.append(TokenGuard(Tokens(config.token_file)))
        self._server = grpc.server(self._threads, interceptors=guards, options=_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        pb_grpc.add_TeacherServicer_to_server(self._service, self._server)  # type: ignore[no-untyped-call]
        names = SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME
        reflection.enable_server_reflection(names, self._server)

    def bind(self) -> None:
        """Bind the config's address and answer health checks with NOT_SERVING.

        Raises:
            ValueError: the address cannot be bound, or a file of keys is wrong.
        """
        asked = self._config.address
        secrets = tls.credentials(self._config)
        # A socket in the file system belongs to this user alone; nothing else makes files meanwhile.
        umask = os.umask(0o177) if asked.startswith("unix:") else None
        try:
            port = self._server.add_secure_port(asked, secrets) if secrets else self._server.add_insecure_port(asked)
        except RuntimeError as error:
            raise ValueError(f"cannot listen on {asked!r} (--address): {error}") from error
        finally:
            if umask is not None:
                os.umask(umask)
        host, colon, _ = asked.rpartition(":")
        self.address = asked if asked.startswith("unix:") else f"{host}{colon}{port}"
        self._server.start()

    def load(self) -> pb.Description:
        """Load, warm up and gate the model, then serve.

        Raises:
            ValueError, OSError: model, data set or device are not what the config says.
            GateError: the network must not be served.
        """
        began = time.monotonic()
        desk, report = _set_up_desk(self._config)
        self._batcher = desk.batcher
        self._service.open(desk)
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        _log_start(self.address, desk.description, report, time.monotonic() - began)
        return desk.description

    def drain(self) -> None:
        """Say NOT_SERVING, answer nothing new, let requests in progress finish for drain_s at most, and stop.

        Until they have finished the port stays open and says UNAVAILABLE: gRPC's own stop would cancel calls
        that come just then, which looks like the caller's doing.
        """
        self._health.enter_graceful_shutdown()
        self._service.close()
        if self._batcher is not None:
            self._batcher.close(self._config.drain_s)
        self._server.stop(_LAST_REPLIES_S).wait()
        self._threads.shutdown(wait=False)

    @property
    def serving(self) -> bool:
        """Whether load has come to its end."""
        return self._batcher is not None

    def _break(self) -> None:
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.broken = True
        self.ended.set()

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", SERVICE_NAME):
            self._health.set(service, status)


def create_server(config: Config) -> tuple[Server, str]:
    """A server that listens already, NOT_SERVING until its `load`; and the address that is really bound."""
    server = Server(config)
    server.bind()
    return server, server.address


def _set_up_desk(config: Config) -> tuple[Desk, gate.Report]:
    indexes = [Index.open(root) for root in config.data]
    device = choose_device(config.device)
    be_reproducible(config.num_threads)
    module, card = load(config)
    renderers, version = make_renderers(
        card.size, config.interpolation, config.antialias,
        device=device, num_threads=config.num_threads, num=_NUM_RENDERERS,
    )  # fmt: skip
    pictures = Pictures(indexes, renderers)
    weights_digest = models.weights_digest(module)
    teacher, report = _gated_teacher(module, card, config, device, pictures)
    description = _describe(config, teacher, weights_digest, version, pictures)
    description.batch_invariant = report.batch_invariant
    batcher = Batcher(teacher.answer, batch_rows=teacher.batch_rows, max_pending_rows=config.max_pending_rows)
    return Desk(description=description, pictures=pictures, batcher=batcher), report


def _gated_teacher(
    module: nn.Module, card: ModelCard, config: Config, device: torch.device, pictures: Pictures
) -> tuple[Teacher, gate.Report]:
    """The teacher, warm; GateError if it must not serve."""
    precision = choose_precision(config.precision, device)
    batch_rows = choose_batch_rows(config.batch_rows, device)
    shape: dict[str, Any] = {"device": device, "batch_rows": batch_rows}
    reference = None
    if precision != "float32":
        reference = Teacher(copy.deepcopy(module), card, precision="float32", **shape)
    teacher = Teacher(module, card, precision=precision, **shape)
    pixels, source = _gate_pixels(config, card, pictures)
    report = gate.measure(teacher, reference, pixels)
    events.event("gate", pictures=source, precision=precision, **asdict(report))
    gate.judge(report, config)
    return teacher, report


def _gate_pixels(config: Config, card: ModelCard, pictures: Pictures) -> tuple[torch.Tensor, str]:
    """Views for the gate, and where they are from: whole pictures, spread over the first data set."""
    index = next(iter(pictures.data_sets.values()), None)
    if index is None or not pictures.renders:
        return gate.synthetic_pixels(config.gate_images, card.size), "synthetic"
    sample = np.unique(np.linspace(0, len(index) - 1, config.gate_images).astype(np.int64))
    return pictures.whole(index, sample), index.name


def _describe(
    config: Config, teacher: Teacher, weights_digest: str, render_version: str, pictures: Pictures
) -> pb.Description:
    card = teacher.card
    decoder = "" if not pictures.renders else "gpu" if teacher.device.type == "cuda" else "cpu"
    rendering = pb.Rendering(
        size=card.size,
        interpolation=config.interpolation,
        antialias=config.antialias,
        version=render_version,
        decoder=decoder,
    )
    return pb.Description(
        fingerprint=fingerprint(
            {
                "architecture": card.architecture,
                "weights": weights_digest,
                "num_classes": card.num_classes,
                "mean": card.mean,
                "std": card.std,
                "precision": teacher.precision,
                "batch_rows": teacher.batch_rows,
                "rendering": [card.size, config.interpolation, config.antialias, render_version, decoder],
            }
        ),
        model=card.architecture,
        num_classes=card.num_classes,
        precision=teacher.precision,
        rendering=rendering,
        max_rows=config.max_rows,
        data_sets=[
            pb.DataSet(name=index.name, digest=index.digest, num_samples=len(index))
            for index in pictures.data_sets.values()
        ],
        weights_digest=weights_digest,
        renders=pictures.renders,
    )


def _log_start(address: str, description: pb.Description, report: gate.Report, seconds: float) -> None:
    events.event(
        "serving",
        address=address,
        pid=os.getpid(),
        model=description.model,
        weights=description.weights_digest,
        fingerprint=description.fingerprint,
        precision=description.precision,
        size=description.rendering.size,
        num_classes=description.num_classes,
        data_sets=[data_set.name for data_set in description.data_sets],
        renders=description.renders,
        gate=asdict(report),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        load_s=round(seconds, 1),
    )
