"""What listens, and its life: bound -> loading -> gate -> serving -> draining (or broken) -> gone.

The port is bound and the health service answers before the model is loaded, so that whoever waits can see that
this process lives but does not serve yet. `create_server` makes it, `load` may take minutes, `drain` ends it.

A teacher whose device fails, or makes no progress any more, takes itself out of service: NOT_SERVING, everything in
progress is answered UNAVAILABLE so that another replica answers, and its owner is told to end the process.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos import teacher_pb2 as pb
from teacher_server import events, tls
from teacher_server.admission import MAX_CALLS, MAX_MESSAGE_BYTES, MAX_SEATS, Admission
from teacher_server.batcher import Batcher
from teacher_server.config import Config
from teacher_server.loading import Loaded, load_teacher
from teacher_server.metrics import Metrics, MetricsPort
from teacher_server.model import Scene
from teacher_server.service import SERVICE_NAME, Desk, TeacherService
from teacher_server.tokens import TokenGuard, Tokens
from teacher_server.turns import Turns
from teacher_server.watchdog import Watchdog

_SPARE_THREADS = 16  # for health, Describe, reflection and refusals, whatever Predict does
_MAX_RENDERING = 4  # requests: as many render as there are renderers, the others read their pictures meanwhile
_LAST_REPLIES_S = 2.0  # to get the last replies out; the streams of health watchers never end by themselves
_BROKEN_REPLIES_S = 1.0  # for a batcher whose requests have been abandoned; a device that hangs is not waited for

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
        """Set when the server should be drained: by whoever owns it, or by itself when it is broken."""
        self.broken = False
        """Model or device failed, or made no progress: the process must end."""
        self.metrics_address = ""
        """Where the metrics are read; empty: nowhere."""
        self._config = config
        self._breaking = threading.Lock()
        self._metrics = Metrics()
        self._metrics_port: MetricsPort | None = None
        self._watchdog: Watchdog | None = None
        self._desk: Desk | None = None
        self._health = health.HealthServicer()
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)  # its own default is SERVING
        self._admission = Admission()
        self._service = TeacherService(self._admission, self._metrics, self._break)
        self._threads = ThreadPoolExecutor(MAX_SEATS + _SPARE_THREADS, thread_name_prefix="handler")
        guards: list[grpc.ServerInterceptor] = []
        if config.token_file is not None:
            tokens = Tokens(config.token_file)
            guards.append(TokenGuard(tokens, self._health, self._service.refusals, self._metrics.refused))
        self._server = grpc.server(
            self._threads, interceptors=guards, options=_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_registered_method_handlers(SERVICE_NAME, self._service.handlers())
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
        if self._config.metrics_address:
            self._metrics_port = MetricsPort(self._config.metrics_address, self._metrics)
            self.metrics_address = self._metrics_port.address
        self._server.start()

    def load(self) -> pb.Description:
        """Load, warm up and gate the model, then serve.

        Raises:
            ValueError, OSError: model, data set or device are not what the config says.
            GateError: the network must not be served.
        """
        began = time.monotonic()
        loaded = load_teacher(self._config)
        self.serve(loaded, time.monotonic() - began)
        return loaded.description

    def serve(self, loaded: Loaded, load_s: float = 0.0) -> None:
        """Serve what is loaded already; it took so many seconds."""
        self._desk = desk = self._make_desk(loaded)
        self._watchdog = Watchdog(
            stall_s=self._config.stall_s,
            at_work=lambda: desk.batcher.at_work or desk.turns.at_work,
            num_ended=lambda: desk.batcher.num_ended + desk.turns.num_ended,
            on_stall=self._break,
            chores=(self._admission.cancel_late, self._service.refusals.flush),
        )
        self._service.open(desk)
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        _log_start(self.address, self.metrics_address, loaded, load_s)

    def _make_desk(self, loaded: Loaded) -> Desk:
        teacher, description = loaded.teacher, loaded.description
        batcher: Batcher[Scene] = Batcher(
            teacher.begin if teacher.device.type == "cuda" else teacher.answer,
            batch_rows=teacher.batch_rows,
            max_pending_rows=self._config.max_pending_rows,
            on_launch=self._metrics.launched,
            on_broken=lambda error: self._break(str(error)),
        )
        self._metrics.loaded(
            model=description.model,
            fingerprint=description.fingerprint,
            precision=description.precision,
            batch_rows=teacher.batch_rows,
            queue_rows=lambda: batcher.pending_rows,
            queue_clients=lambda: batcher.num_clients,
            gpu_memory=_gpu_memory(teacher.device),
        )
        return Desk(description=description, pictures=loaded.pictures, turns=Turns(_MAX_RENDERING), batcher=batcher)

    def drain(self) -> bool:
        """Say NOT_SERVING, answer nothing new, let requests in progress finish for drain_s at most, and stop.

        Until they have finished, and nobody has called for a moment, the port stays open and says UNAVAILABLE: gRPC's
        own stop would cancel calls that come just then, which looks like the caller's doing. Takes drain_s and 4 s at
        most.

        Returns whether nothing is at work any more. Otherwise a thread hangs in the device or in a decoder, the
        interpreter would wait for it, and only os._exit ends the process.
        """
        self._metrics.serving.set(0)
        self._health.enter_graceful_shutdown()
        if not self.broken:
            self._service.close()
        idle = True
        if self._desk is not None:
            batcher_ended = self._desk.batcher.close(_BROKEN_REPLIES_S if self.broken else self._config.drain_s)
            idle = batcher_ended and not self._desk.turns.at_work
        self._service.wait_until_quiet(_LAST_REPLIES_S)
        self._server.stop(_LAST_REPLIES_S).wait()
        self._threads.shutdown(wait=False)
        if self._watchdog is not None:
            self._watchdog.stop()
        self._service.refusals.flush()
        if self._metrics_port is not None:
            self._metrics_port.close()
        return idle

    @property
    def serving(self) -> bool:
        """Whether load has come to its end."""
        return self._desk is not None

    def _break(self, why: str) -> None:
        """Leave the service at once; from any thread, any number of times."""
        with self._breaking:
            if self.broken:
                return
            self.broken = True
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        sentence = f"this teacher is broken: {why}"
        self._service.close(sentence)
        if self._desk is not None:
            self._desk.batcher.abandon(sentence)
        events.event("broken", reason=why)
        self.ended.set()

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", SERVICE_NAME):
            self._health.set(service, status)
        self._metrics.serving.set(status == health_pb2.HealthCheckResponse.SERVING)


def create_server(config: Config) -> tuple[Server, str]:
    """A server that listens already, NOT_SERVING until its `load`; and the address that is really bound."""
    server = Server(config)
    server.bind()
    return server, server.address


def _gpu_memory(device: torch.device) -> dict[str, Callable[[], float]]:
    if device.type != "cuda":
        return {}
    return {
        "allocated": lambda: torch.cuda.memory_allocated(device),
        "reserved": lambda: torch.cuda.memory_reserved(device),
    }


def _log_start(address: str, metrics_address: str, loaded: Loaded, seconds: float) -> None:
    description = loaded.description
    events.event(
        "serving",
        address=address,
        metrics_address=metrics_address,
        pid=os.getpid(),
        model=description.model,
        weights=description.weights_digest,
        fingerprint=description.fingerprint,
        precision=description.precision,
        size=description.rendering.size,
        num_classes=description.num_classes,
        data_sets=[data_set.name for data_set in description.data_sets],
        renders=description.renders,
        gate=asdict(loaded.report),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        load_s=round(seconds, 1),
    )
