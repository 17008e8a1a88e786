"""More than a teacher can do, callers who gave up, a network that fails, the end: who hears what."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from conftest import wait_until
from one_teacher import Client, draw, serving, small
from protos import teacher_pb2 as pb
from protos.arrays import from_message
from teacher_server import admission
from teacher_server.config import Config
from teacher_server.gate import GateError
from teacher_server.server import Server, create_server
from views.render import Renderer
from views.wire import ask_by_reference


@pytest.fixture(scope="module")
def config(tiny_model: Path, tiny_data: Path) -> Config:
    return small(tiny_model, tiny_data)


@pytest.fixture(scope="module")
def running(config: Config) -> Iterator[tuple[Server, Client]]:
    with serving(config) as both:
        yield both


@contextmanager
def renderers_held(server: Server) -> Iterator[None]:
    """Handlers that need to render wait, as they would for a slow disk."""
    pool = server._service._desk.pictures._renderers
    held: list[Renderer] = [pool.get(timeout=10) for _ in range(2)]
    try:
        yield
    finally:
        for renderer in held:
            pool.put(renderer)


def pushback_ms(error: grpc.RpcError) -> int:
    return int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"])


def test_too_many_waiting_rows_are_refused_with_a_time_to_come_back(running, index):
    server, client = running
    batcher = server._service._desk.batcher
    request = ask_by_reference(draw(index, 20), index.digest)
    with renderers_held(server):
        waiting = [client.begin(request) for _ in range(4)]
        wait_until(lambda: batcher.pending_rows == 80)
        with pytest.raises(grpc.RpcError, match=r"80 rows are in progress, of at most 80") as error:
            client.predict(request)
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 1 <= pushback_ms(error.value) <= 10_000
        assert client.health() == health_pb2.HealthCheckResponse.SERVING
    for call in waiting:
        assert len(from_message(call.result().logits, "logits", np.float32, (20, 6))) == 20
    assert len(client.logits(request)) == 20


def test_when_every_place_is_taken_health_and_describe_still_answer(running, index):
    server, client = running
    request = ask_by_reference(draw(index, 1), index.digest)
    with renderers_held(server):
        waiting = [client.begin(request) for _ in range(admission.MAX_IN_PROGRESS)]
        wait_until(lambda: server._service._desk.batcher.pending_rows == len(waiting))
        refused = [client.begin(request) for _ in range(100)]
        for call in refused:
            assert call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert pushback_ms(call) >= 1
        began = time.monotonic()
        assert client.health("funmatch.v1.Teacher") == health_pb2.HealthCheckResponse.SERVING
        assert client.stub.Describe(pb.DescribeRequest(), timeout=5).model
        assert time.monotonic() - began < 2
    answers = {call.result().logits.data for call in waiting}
    assert len(answers) == 1


def test_requests_whose_caller_gave_up_do_not_reach_the_model(running, index, monkeypatch):
    server, client = running
    batcher = server._service._desk.batcher
    launched: list[int] = []
    run = batcher._run
    monkeypatch.setattr(
        batcher, "_run", lambda parts: (launched.extend(p.stop - p.start for p in parts), run(parts))[1]
    )
    with renderers_held(server):
        cancelled = client.begin(ask_by_reference(draw(index, 5), index.digest))
        late = client.stub.Predict.future(client.signed(ask_by_reference(draw(index, 7), index.digest)), timeout=0.3)
        wait_until(lambda: batcher.pending_rows == 12)
        cancelled.cancel()
        assert late.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(client.logits(ask_by_reference(draw(index, 3), index.digest))) == 3
    wait_until(lambda: batcher.pending_rows == 0)
    assert launched == [3]


def test_a_failing_model_fails_its_requests_and_ends_a_server_that_does_not_recover(config, index, caplog):
    with serving(config) as (server, client):
        desk = server._service._desk
        request = ask_by_reference(draw(index, 2), index.digest)
        run, desk.batcher._run = desk.batcher._run, lambda parts: 1 / 0
        for attempt in range(3):
            assert not server.ended.is_set(), f"{attempt} failures are not yet the end"
            with pytest.raises(grpc.RpcError, match=r"division by zero") as error:
                client.predict(request)
            assert error.value.code() == grpc.StatusCode.INTERNAL
            if attempt == 0:
                failing, desk.batcher._run = desk.batcher._run, run
                assert len(client.logits(request)) == 2, "one failure is forgiven"
                desk.batcher._run = failing
                with pytest.raises(grpc.RpcError):
                    client.predict(request)
        assert server.ended.wait(5)
        assert server.broken
        assert client.health() == health_pb2.HealthCheckResponse.NOT_SERVING
    assert "ZeroDivisionError" in caplog.text


def test_logits_that_do_not_fit_the_wire_are_an_error_that_names_the_row(config, index):
    with serving(config) as (server, client):
        batcher = server._service._desk.batcher
        batcher._run = lambda parts: np.float32([[1] * 6, [1] * 6, [np.inf] * 6])
        with pytest.raises(grpc.RpcError, match=r"row 2, sample.*not finite") as error:
            client.predict(ask_by_reference(draw(index, 3), index.digest))
        assert error.value.code() == grpc.StatusCode.INTERNAL


def test_draining_answers_what_is_in_progress_and_refuses_what_comes(config, index):
    server, address = create_server(config)
    server.load()
    client = Client(address)
    request = ask_by_reference(draw(index, 9), index.digest)
    statuses = client.watch_health()
    assert next(statuses).status == health_pb2.HealthCheckResponse.SERVING
    with ThreadPoolExecutor() as pool:
        with renderers_held(server):
            waiting = client.begin(request)
            wait_until(lambda: server._service._desk.batcher.pending_rows == 9)
            ending: Future[None] = pool.submit(server.drain)
            wait_until(lambda: server._service._desk is None)
            with pytest.raises(grpc.RpcError) as error:
                client.predict(request)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
            assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert not ending.done()
        assert len(from_message(waiting.result().logits, "logits", np.float32, (9, 6))) == 9
        ending.result(timeout=20)
    client.channel.close()


def test_a_network_beyond_the_gates_bounds_is_not_served(config):
    server, _ = create_server(dataclasses.replace(config, precision="bfloat16", gate_max_kl=1e-9))
    with pytest.raises(GateError, match=r"--gate-max-kl.*--precision float32"):
        server.load()
    assert not server.serving
    server.drain()
