"""What a run tells Prometheus while it goes on: its last step's numbers, and how its teachers' replicas do.

    http://HOST:PORT/metrics     rank 0 of this machine at --metrics-address, its second rank one port higher, ...

The record of a run is metrics.jsonl (metrics.py); this is a window for whoever watches, and nothing is kept here.

Rejected: pushing to a gateway. A run that is gone should be gone from the graphs too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from student_trainer.fleet import Fleet

_OF_A_STEP = {
    "loss": ("loss", "loss of the last step"),
    "images_per_s": ("images_per_second", "pictures of all ranks learned from a second, in the last step"),
    "teacher_wait_s": ("teacher_wait_seconds", "the last step's wait for logits"),
    "data_wait_s": ("data_wait_seconds", "the last step's wait for pictures"),
    "kl": ("kl", "KL(teacher || student) of the last step, nats"),
    "agreement_top1": ("agreement_top1", "share of the last step's rows where student and teacher agree"),
    "eval/student_top1": ("top1", "accuracy of the last evaluation"),
}


class Exporter(Collector):
    """Serves the numbers until it is closed."""

    def __init__(self, address: str, local_rank: int, fleets: Sequence[Fleet]) -> None:
        """Listen.

        Args:
            address: HOST:PORT of this machine's first rank.
            local_rank: added to the port.
            fleets: one a teacher.

        Raises:
            ValueError: the address is none, or taken.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--metrics-address {address!r}: HOST:PORT is wanted, as in 127.0.0.1:9091")
        self._fleets = fleets
        self._line: dict[str, float] = {}
        self._worst_mismatch: float | None = None
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(int(port) + local_rank, host, registry)
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host}:{int(port) + local_rank} (--metrics-address): {error}"
            ) from error
        self.port = self._server.server_port

    def step(self, step: int, line: Mapping[str, float]) -> None:
        """Take the numbers of a step; an evaluation's stay until the next."""
        self._line = {**self._line, **line, "step": step}
        if "view_mismatch" in line:
            self._worst_mismatch = max(line["view_mismatch"], self._worst_mismatch or 0)

    def collect(self) -> Iterable[Metric]:
        """For prometheus_client: all families, as they are now."""
        line = self._line
        if "step" in line:
            yield GaugeMetricFamily("funmatch_student_step", "updates done", line["step"])
        for name, (family, help_text) in _OF_A_STEP.items():
            if name in line:
                yield GaugeMetricFamily(f"funmatch_student_{family}", help_text, line[name])
        if self._worst_mismatch is not None:
            yield GaugeMetricFamily(
                "funmatch_student_view_mismatch_max", "largest difference of views so far, grey levels",
                self._worst_mismatch,
            )  # fmt: skip
        yield from self._of_the_fleets()

    def _of_the_fleets(self) -> Iterator[Metric]:
        retries = CounterMetricFamily("funmatch_student_retries", "requests sent again", labels=["teacher"])
        names = ["teacher", "replica"]
        in_flight = GaugeMetricFamily("funmatch_student_in_flight", "requests under way", labels=names)
        rows = CounterMetricFamily("funmatch_student_replica_rows", "rows answered", labels=names)
        latency = GaugeMetricFamily("funmatch_student_latency_seconds", "of a replica's last answer", labels=names)
        for number, fleet in enumerate(self._fleets):
            state = fleet.state()
            retries.add_metric([str(number)], state.retries)
            for replica in state.replicas:
                labels = [str(number), replica.target]
                in_flight.add_metric(labels, replica.in_flight)
                rows.add_metric(labels, replica.rows)
                latency.add_metric(labels, replica.latency_s)
        yield from (retries, in_flight, rows, latency)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Exporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
