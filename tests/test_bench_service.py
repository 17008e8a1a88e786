"""The benchmarks of service, step and wire measure what they say, and count what really travels."""

import socket
import threading

import numpy as np
import pytest

from benchmarks import echo, service, step, wire
from benchmarks.relay import relay
from student_trainer.fleet import Fleet
from views.draw import Plan, ViewLaw

pytestmark = pytest.mark.suite  # they set what all of torch shares, as a benchmark may


def test_a_replica_is_measured_beside_its_network():
    (figure,) = service.measure(quick=True)
    assert figure.row == "3"
    assert figure.value > 0
    assert figure.alternative > figure.floor > 0, "decoding and mixing take something"
    assert figure.judged == pytest.approx(figure.value / figure.alternative)


def test_a_step_is_measured_beside_logits_in_memory():
    (figure,) = step.measure(quick=True)
    assert figure.row == "4"
    assert figure.judged == pytest.approx(figure.value / figure.alternative)


def test_the_wire_is_counted_and_timed():
    figures = list(wire.measure(quick=True))
    bytes_a_row = {figure.name: figure for figure in figures if figure.row == "8"}
    assert len(bytes_a_row) == 4
    for figure in bytes_a_row.values():
        assert figure.met, figure.name
        assert figure.value >= figure.floor, figure.name
    (timed,) = [figure for figure in figures if figure.row == "9"]
    assert timed.value > 0
    assert timed.alternative > 0


def test_a_relay_passes_on_and_counts_both_ways():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(1000):
                    connection.sendall(2 * data)

        threading.Thread(target=answer, daemon=True).start()
        with relay(f"127.0.0.1:{server.getsockname()[1]}") as counted:
            host, port = counted.address.split(":")
            with socket.create_connection((host, int(port))) as client:
                client.sendall(b"twice")
                assert client.recv(10, socket.MSG_WAITALL) == b"twicetwice"
            assert (counted.up, counted.down) == (5, 10)


def test_a_pause_answers_right_shapes_after_its_time():
    sizes = np.full(100, 90, np.int32)
    rows = Plan(seed=1, batch_size=20, law=ViewLaw(), samples=range(100), height=sizes, width=sizes).rows(0, 0, 20)
    with echo.serving("echo", "pause", "0.3", "7") as address, Fleet([address], data_digest=echo.DIGEST) as fleet:
        answer = fleet.ask(rows)
        assert not answer.is_there
        logits = answer.result()
        assert fleet.state().replicas[0].latency_s >= 0.3
    assert np.array_equal(logits, echo.some_logits(1024, 7)[:20].astype(np.float16).astype(np.float32))
