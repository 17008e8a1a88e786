"""What Prometheus can ask: the teacher's counters and histograms, and the port where they are read.

Each server has a registry of its own, so that several can live in one process. Nothing here knows gRPC or torch; the
names are those of the dashboards, and changing one breaks them.

Rejected: the library's global registry, where two servers of one process collide; and a row per client, which callers
who invent names would let grow (the log has the client's name).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIServer

import prometheus_client as prometheus

from teacher_server.batcher import Launch

M = TypeVar("M")

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_PREFIX = "funmatch_teacher"


class Metrics:
    """The metrics of one server. Thread-safe."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        self._requests = self._make(prometheus.Counter, "requests", "Predict calls by gRPC status.", ["code"])
        self._rows = self._make(prometheus.Counter, "rows", "Rows answered.")
        self._batch_rows_max = self._make(prometheus.Gauge, "batch_rows_max", "Rows of a full batch.")
        self._batch_rows: prometheus.Histogram | None = None  # its buckets are known when the model is
        self._queue_rows = self._make(prometheus.Gauge, "queue_rows", "Rows reserved now.")
        self._queue_clients = self._make(prometheus.Gauge, "queue_clients", "Clients with rows reserved now.")
        self._wait = self._seconds("queue_wait", "From a request's submission to its first rows' launch.")
        self.render = self._seconds("render", "Reading, decoding and rendering a request's pictures.")
        self._forward = self._seconds("forward", "One batch on the model.")
        self.request = self._seconds("request", "A whole Predict call, answered or refused.")
        self.serving = self._make(prometheus.Gauge, "serving", "1 while health says SERVING.")
        self._info = self._make(
            prometheus.Gauge, "info", "Always 1; the labels say who this is.", ["model", "fingerprint", "precision"]
        )
        for code in ("OK", "RESOURCE_EXHAUSTED", "INTERNAL", "UNAVAILABLE"):
            self._requests.labels(code)  # from the start, so that their rates are 0 and not absent

    def loaded(
        self,
        *,
        model: str,
        fingerprint: str,
        precision: str,
        batch_rows: int,
        queue_rows: Callable[[], float],
        queue_clients: Callable[[], float],
        gpu_memory: dict[str, Callable[[], float]],
    ) -> None:
        """Take what is known once the model is loaded: who it is, and what to ask when somebody reads.

        Args:
            model: the architecture.
            fingerprint: of the teacher.
            precision: of its forward pass.
            batch_rows: rows of a full batch.
            queue_rows: answers the rows that are reserved now.
            queue_clients: answers the clients that have rows reserved now.
            gpu_memory: what answers the bytes of each kind; empty without a GPU.
        """
        self._info.labels(model, fingerprint, precision).set(1)
        self._batch_rows_max.set(batch_rows)
        buckets = sorted({math.ceil(batch_rows * part / 8) for part in range(1, 9)})
        self._batch_rows = self._make(prometheus.Histogram, "batch_rows", "Rows of a forward pass.", buckets=buckets)
        self._queue_rows.set_function(queue_rows)
        self._queue_clients.set_function(queue_clients)
        if gpu_memory:
            memory = self._make(prometheus.Gauge, "gpu_memory_bytes", "Of this process, by torch.", ["kind"])
            for kind, ask in gpu_memory.items():
                memory.labels(kind).set_function(ask)

    def answered(self, num_rows: int) -> None:
        """Count an answer."""
        self._requests.labels("OK").inc()
        self._rows.inc(num_rows)

    def refused(self, code: str) -> None:
        """Count an answer other than logits, by gRPC status."""
        self._requests.labels(code).inc()

    def launched(self, launch: Launch) -> None:
        """Take what there is to measure about a batch."""
        assert self._batch_rows is not None, "a batch ran before the model was loaded"
        self._batch_rows.observe(launch.num_rows)
        self._forward.observe(launch.seconds)
        for wait_s in launch.waits_s:
            self._wait.observe(wait_s)

    def _make(self, kind: Callable[..., M], name: str, sentence: str, labels: Sequence[str] = (), **more: Any) -> M:
        return kind(f"{_PREFIX}_{name}", sentence, labels, registry=self.registry, **more)

    def _seconds(self, name: str, sentence: str) -> prometheus.Histogram:
        return self._make(prometheus.Histogram, f"{name}_seconds", f"{sentence} Seconds.", buckets=_SECONDS)


class MetricsPort:
    """Where the metrics are read: HTTP, GET only, any path."""

    def __init__(self, address: str, metrics: Metrics) -> None:
        """Listen and answer, on threads of its own.

        Args:
            address: HOST:PORT, port 0 for any free one.
            metrics: to show.

        Raises:
            ValueError: that is no address, or it cannot be bound.
        """
        host, colon, port = address.rpartition(":")
        if not (colon and host and port.isdecimal()):
            raise ValueError(f"--metrics-address must be HOST:PORT, got {address!r}")
        try:
            server, thread = prometheus.start_http_server(int(port), host.strip("[]"), metrics.registry)
        except (OSError, OverflowError) as error:
            raise ValueError(f"cannot listen on {address!r} (--metrics-address): {error}") from error
        self._server: WSGIServer = server
        self._thread: threading.Thread = thread
        self.address = f"{host}:{server.server_port}"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
