"""What Prometheus reads of a teacher, and what its log says: names, numbers, and no flood."""

from __future__ import annotations

import dataclasses
import json
import logging
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import plain_rows
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from teacher_server import events
from teacher_server.config import Config
from teacher_server.events import Repeated
from teacher_server.metrics import Metrics, MetricsPort
from teacher_server.server import Server, create_server
from views.wire import ask_pixels

NAMES = {  # what the dashboards ask for; gpu_memory_bytes is absent without a GPU
    "requests", "rows", "batch_rows", "batch_rows_max", "queue_rows", "queue_clients", "queue_wait_seconds",
    "render_seconds", "forward_seconds", "request_seconds", "serving", "info",
}  # fmt: skip


def read(address: str, path: str = "/metrics") -> dict[str, dict[tuple, float]]:
    """Sample name -> labels -> value, by a stock parser."""
    with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        text = response.read().decode()
    found: dict[str, dict[tuple, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> Config:
    return Config(
        model=str(tiny_model), address="127.0.0.1:0", metrics_address="127.0.0.1:0", device="cpu", threads=1,
        batch_rows=8, max_rows=40, max_pending_rows=80, gate_images=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(config: Config) -> Iterator[Server]:
    server, _ = create_server(config)
    assert read(server.metrics_address)["funmatch_teacher_serving"] == {(): 0}, "readable while the model loads"
    server.load()
    yield server
    server.drain()


def request(server: Server, num_rows: int, client: str = "run") -> pb.PredictRequest:
    asked = ask_pixels(plain_rows(num_rows), np.zeros((num_rows, 32, 32, 3), np.uint8))
    asked.fingerprint, asked.client = server._desk.description.fingerprint, client
    return asked


def test_the_numbers_follow_what_was_asked(server):
    before = read(server.metrics_address)
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.TeacherStub(channel)
        for num_rows in (3, 12, 8):
            stub.Predict(request(server, num_rows), timeout=20)
        for _ in range(2):
            with pytest.raises(grpc.RpcError):
                stub.Predict(request(server, 41), timeout=20)
    after = read(server.metrics_address)

    def grown(name: str, **labels: str) -> float:
        at = tuple(sorted(labels.items()))
        return after[f"funmatch_teacher_{name}"][at] - before.get(f"funmatch_teacher_{name}", {}).get(at, 0)

    assert {name.removeprefix("funmatch_teacher_") for name in after} >= NAMES - {
        "requests", "rows", "batch_rows", "queue_wait_seconds", "render_seconds", "forward_seconds", "request_seconds",
    }  # fmt: skip
    assert grown("requests_total", code="OK") == 3
    assert grown("requests_total", code="INVALID_ARGUMENT") == 2
    assert grown("rows_total") == 23
    assert grown("batch_rows_sum") == 23
    assert grown("batch_rows_count") == 4, "3; 8 and 4; 8"
    assert grown("forward_seconds_count") == 4
    assert grown("queue_wait_seconds_count") == 3
    assert grown("render_seconds_count") == 3
    assert grown("request_seconds_count") == 5
    assert after["funmatch_teacher_batch_rows_max"] == {(): 8}
    assert after["funmatch_teacher_queue_rows"] == after["funmatch_teacher_queue_clients"] == {(): 0}
    assert after["funmatch_teacher_serving"] == {(): 1}
    [(labels, one)] = after["funmatch_teacher_info"].items()
    assert one == 1
    assert dict(labels)["fingerprint"] == server._desk.description.fingerprint
    assert dict(labels)["precision"] == "float32"
    bounds = [float(dict(labels)["le"]) for labels in after["funmatch_teacher_request_seconds_bucket"]]
    assert (min(bounds), sorted(bounds)[-2]) == (0.001, 60)


def test_rows_and_clients_in_progress_show_while_they_are(server):
    desk = server._desk
    with desk.batcher.reserve(5, "a"), desk.batcher.reserve(7, "b"), desk.batcher.reserve(1, "b"):
        now = read(server.metrics_address)
    assert now["funmatch_teacher_queue_rows"] == {(): 13}
    assert now["funmatch_teacher_queue_clients"] == {(): 2}


def test_the_port_takes_questions_only(server):
    for method in ("POST", "PUT", "DELETE"):
        question = urllib.request.Request(f"http://{server.metrics_address}/metrics", method=method, data=b"x")
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(question, timeout=5)
        assert error.value.code == 405
        error.value.close()


def test_two_servers_of_one_process_count_apart_and_a_drained_one_listens_no_more(server, config):
    other, _ = create_server(dataclasses.replace(config, gate_images=1))
    other.load()
    assert read(other.metrics_address)["funmatch_teacher_requests_total"][(("code", "OK"),)] == 0
    address = other.metrics_address
    other.drain()
    with pytest.raises(OSError):
        read(address)


@pytest.mark.parametrize("address", ["9090", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:http", "256.0.0.1:0"])
def test_an_address_that_cannot_be_is_refused_with_the_flag(address):
    with pytest.raises(ValueError, match="--metrics-address"):
        MetricsPort(address, Metrics())


def test_gpu_memory_is_shown_where_there_is_a_gpu():
    metrics = Metrics()
    metrics.loaded(
        model="m", fingerprint="f", precision="float16", batch_rows=1, queue_rows=lambda: 0, queue_clients=lambda: 0,
        gpu_memory={"allocated": lambda: 5.0, "reserved": lambda: 7.0},
    )  # fmt: skip
    port = MetricsPort("127.0.0.1:0", metrics)
    shown = read(port.address)["funmatch_teacher_gpu_memory_bytes"]
    port.close()
    assert shown == {(("kind", "allocated"),): 5, (("kind", "reserved"),): 7}


# --- the log --------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(capsys: pytest.CaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Gives the lines that have reached standard error."""
    root = logging.getLogger()
    level = root.level
    yield lambda: capsys.readouterr().err.split("\n")[:-1]
    logging.captureWarnings(False)
    root.setLevel(level)
    for handler in [one for one in root.handlers if isinstance(one, events._Stderr)]:
        root.removeHandler(handler)


def test_each_line_of_a_json_log_is_one_object_whoever_wrote_it(log):
    events.set_up("json")
    events.event("serving", address="127.0.0.1:1", note="two\nlines \u2028 and\u0000", folder=Path("/data"))
    try:
        raise KeyError("lost")
    except KeyError:
        events.failure("predict_failed", request_id="r7", client="run")
    logging.getLogger("grpc").warning("a library speaks\nin two lines")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("so does Python", stacklevel=1)
    lines = [json.loads(line) for line in log()]
    assert [line["event"] for line in lines] == ["serving", "predict_failed", "log", "log"]
    assert all(line["time"].endswith("Z") and line["level"] for line in lines)
    assert lines[0]["note"] == "two\nlines \u2028 and\u0000"
    assert lines[0]["folder"] == "/data"
    assert (lines[1]["request_id"], lines[1]["client"], lines[1]["level"]) == ("r7", "run", "ERROR")
    assert "KeyError: 'lost'" in lines[1]["trace"]
    assert lines[2]["message"] == "a library speaks\nin two lines"
    assert "so does Python" in lines[3]["message"]


def test_a_text_line_is_readable_and_setting_up_twice_says_nothing_twice(log):
    events.set_up("json")
    events.set_up("text")
    events.event("refused", request_id="r1", reason="row 3: lam must lie in [0, 1]")
    [line] = log()
    assert line.endswith('INFO refused {"request_id": "r1", "reason": "row 3: lam must lie in [0, 1]"}')


def test_what_a_caller_sent_is_quoted_only_so_far(log):
    events.set_up("json")
    events.event("refused", request_id="r" * 1_000_000)
    [line] = log()
    assert len(line) < 3000
    assert "(1000000 characters)" in line


def test_a_flood_is_one_line_a_second_of_each_kind_with_a_count(caplog):
    now = 0.0
    repeated = Repeated(clock=lambda: now)
    with caplog.at_level("INFO"):
        for number in range(5000):
            now = number / 1000
            repeated.event("refused", ("a", "RESOURCE_EXHAUSTED"), client="a", request_id=str(number))
            if number == 2500:
                repeated.event("refused", ("b", "INVALID_ARGUMENT"), client="b", request_id="only")
        now = 9.0
        repeated.flush()
    lines = [record.fields for record in caplog.records]
    flood = [line for line in lines if line["client"] == "a"]
    assert len(flood) <= 7
    assert len(flood) + sum(line.get("left_out", 0) for line in flood) == 5000
    assert flood[-1]["request_id"] == "4999", "the last is not lost"
    assert [line for line in lines if line["client"] == "b"] == [{"client": "b", "request_id": "only"}]


def test_kinds_beyond_the_bound_share_one_and_kinds_that_rest_are_forgotten(caplog):
    now = 0.0
    repeated = Repeated(max_kinds=3, clock=lambda: now)
    with caplog.at_level("INFO"):
        for number in range(100):
            repeated.event("refused", (f"client {number}", "INTERNAL"), client=f"client {number}")
    assert len(caplog.records) == 4
    now = 2.0
    repeated.flush()
    now = 4.0
    repeated.flush()
    assert not repeated._kinds
