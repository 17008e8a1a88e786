"""A teacher that fails, hangs, drains or is restarted: nobody is left waiting, and somebody else can answer."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from conftest import free_port, plain_rows
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from protos.arrays import from_message
from teacher_server.config import Config
from teacher_server.model import broken_device
from teacher_server.server import Server, create_server
from teacher_server.watchdog import Watchdog
from views.wire import ask_pixels

ROOT = Path(__file__).resolve().parents[1]
SIZE, START_S = 32, 120

BEHAVES_OTHERWISE = """
import sys, threading
from teacher_server import main, model

right = model.Teacher.answer

def forward(batch):
    {how}

def answer(self, parts):
    self._forward = forward
    return right(self, parts)

model.Teacher.answer = answer
sys.exit(main.main())
"""
HANGS = "threading.Event().wait()"
BREAKS = "raise RuntimeError('CUDA error: unspecified launch failure')"


def ask(fingerprint: str, num_rows: int = 3, seed: int = 0, request_id: str = "") -> pb.PredictRequest:
    pixels = np.random.default_rng(seed).integers(0, 256, (num_rows, SIZE, SIZE, 3), dtype=np.uint8)
    request = ask_pixels(plain_rows(num_rows), pixels)
    request.fingerprint, request.request_id = fingerprint, request_id
    return request


def health(channel: grpc.Channel, name: str = "", timeout_s: float = 1.0) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=timeout_s).status


SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


# --- a device that fails --------------------------------------------------------------------------------------------


@pytest.fixture
def server(tiny_model: Path) -> Iterator[tuple[Server, grpc.Channel, str]]:
    server, address = create_server(
        Config(model=str(tiny_model), address="127.0.0.1:0", device="cpu", threads=1, batch_rows=4, gate_images=4,
               stall_s=60, drain_s=5)
    )  # fmt: skip
    fingerprint = server.load().fingerprint
    with grpc.insecure_channel(address) as channel:
        yield server, channel, fingerprint
    server.drain()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failing_device_takes_the_teacher_out_at_once_and_sends_callers_elsewhere(server, error):
    server, channel, fingerprint = server
    stub = pb_grpc.TeacherStub(channel)
    come, go = threading.Event(), threading.Event()

    def forward(_: torch.Tensor) -> torch.Tensor:
        come.set()
        go.wait(20)
        raise error

    server._desk.batcher._run.__self__._forward = forward
    calls = [stub.Predict.future(ask(fingerprint, 3), timeout=30) for _ in range(6)]
    come.wait(20)
    go.set()
    for call in calls:  # in the batch, in the queue, or just come
        assert call.code() == grpc.StatusCode.UNAVAILABLE, call.details()
        assert "broken" in call.details()
    assert server.ended.is_set()
    assert server.broken
    for name in ("", "funmatch.v1.Teacher"):
        assert health(channel, name) == NOT_SERVING
    with pytest.raises(grpc.RpcError, match="broken") as later:
        stub.Predict(ask(fingerprint), timeout=5)
    assert later.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_device_that_fails_while_rendering_is_a_failing_device_too(server, monkeypatch):
    server, channel, fingerprint = server

    def views(*_: object) -> torch.Tensor:
        raise RuntimeError("rendering failed, though every picture decodes") from RuntimeError(
            "CUDA runtime API error cudaErrorIllegalAddress (700)"
        )

    monkeypatch.setattr(server._desk.pictures, "views", views)
    with pytest.raises(grpc.RpcError, match="cudaErrorIllegalAddress") as error:
        pb_grpc.TeacherStub(channel).Predict(ask(fingerprint), timeout=10)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert server.broken


@pytest.mark.parametrize("error", [ValueError("CUDA error"), RuntimeError("shape mismatch"), MemoryError()])
def test_other_errors_are_not_the_devices(error):
    assert broken_device(error) is None


# --- progress -------------------------------------------------------------------------------------------------------


def watched(at_work: Callable[[], bool], num_ended: Callable[[], int]) -> tuple[Watchdog, list[str]]:
    said: list[str] = []
    return Watchdog(stall_s=0.3, at_work=at_work, num_ended=num_ended, on_stall=said.append), said


def test_a_stall_is_work_without_progress():
    began = time.monotonic()
    dog, said = watched(lambda: True, lambda: 7)
    while not said:
        assert time.monotonic() - began < 10
        time.sleep(0.02)
    assert time.monotonic() - began >= 0.3
    dog.stop()
    assert len(said) == 1


def test_neither_slow_work_nor_idleness_is_a_stall():
    slow, said_of_slow = watched(lambda: True, lambda: int(time.monotonic() / 0.2))
    idle, said_of_idle = watched(lambda: False, lambda: 7)
    time.sleep(1.2)
    slow.stop()
    idle.stop()
    assert not said_of_slow
    assert not said_of_idle


# --- processes ------------------------------------------------------------------------------------------------------


class Replica:
    """A teacher process; its address stays when it is started again."""

    def __init__(self, folder: Path, model: Path, port: int, *flags: str, behaves: str = "") -> None:
        self._address_file, self.log = folder / f"address{port}", folder / f"log{port}.txt"
        arguments = [
            f"--model={model}", f"--address=127.0.0.1:{port}", "--device=cpu", "--threads=1", "--batch-rows=4",
            "--gate-images=4", f"--address-file={self._address_file}", *flags,
        ]  # fmt: skip
        program = ["-m", "teacher_server.main"]
        if behaves:
            program = ["-c", BEHAVES_OTHERWISE.format(how=behaves)]
        self._command = [sys.executable, *program, *arguments]
        self.address = f"127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        with self.log.open("a") as sink:
            self.process = subprocess.Popen(self._command, cwd=ROOT, stderr=sink, stdout=sink)

    def wait_until_serving(self) -> None:
        deadline = time.monotonic() + START_S
        while not self._address_file.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 30) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


@pytest.fixture
def replica(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def make(*flags: str, behaves: str = "", port: int) -> Replica:
        made.append(Replica(tmp_path, tiny_model, port, *flags, behaves=behaves))
        return made[-1]

    yield make
    for one in made:
        one.process.kill()
        one.process.wait()


def fingerprint_of(address: str) -> str:
    with grpc.insecure_channel(address) as channel:
        return pb_grpc.TeacherStub(channel).Describe(pb.DescribeRequest(), timeout=10).fingerprint


def test_a_hanging_device_ends_the_process_and_one_that_fails_too(replica):
    hangs = replica("--stall-s=1", behaves=HANGS, port=free_port())
    breaks = replica(behaves=BREAKS, port=free_port())
    for one, sentence in ((hangs, "no batch and no rendering"), (breaks, "unspecified launch failure")):
        one.wait_until_serving()
        with grpc.insecure_channel(one.address) as channel:
            stub = pb_grpc.TeacherStub(channel)
            fingerprint = fingerprint_of(one.address)
            calls = [stub.Predict.future(ask(fingerprint), timeout=60) for _ in range(4)]
            for call in calls:
                assert call.code() == grpc.StatusCode.UNAVAILABLE
            assert any(sentence in call.details() for call in calls), [call.details() for call in calls]
        assert one.process.wait(15) == 4, one.log.read_text()
        assert f'broken {{"reason": "{sentence}' in one.log.read_text().replace("CUDA error: ", "")


def test_sigterm_ends_even_a_process_whose_device_hangs_within_the_stated_time(replica):
    one = replica("--drain-s=1", behaves=HANGS, port=free_port())
    one.wait_until_serving()
    with grpc.insecure_channel(one.address) as channel:
        call = pb_grpc.TeacherStub(channel).Predict.future(ask(fingerprint_of(one.address)), timeout=60)
        time.sleep(0.5)
        began = time.monotonic()
        assert one.end() == 0, one.log.read_text()
        assert time.monotonic() - began < 1 + 5
        assert call.code() == grpc.StatusCode.UNAVAILABLE
    assert '"left_behind": true' in one.log.read_text()


@pytest.mark.suite
def test_a_rolling_restart_under_load_loses_nothing(replica):
    """Four callers ask without a pause, each the replica that answered last, and the other when it is UNAVAILABLE."""
    fleet = [replica(port=free_port()) for _ in range(2)]
    for one in fleet:
        one.wait_until_serving()
    fingerprint = fingerprint_of(fleet[0].address)
    assert fingerprint_of(fleet[1].address) == fingerprint
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
    channels = [grpc.insecure_channel(one.address, options=options) for one in fleet]
    stubs = [pb_grpc.TeacherStub(channel) for channel in channels]
    expected = [stubs[0].Predict(ask(fingerprint, 3, seed), timeout=10).logits.data for seed in range(10)]
    over = threading.Event()
    codes: set[grpc.StatusCode] = set()

    def caller(first: int) -> int:
        number, asked = first, first % 2
        while not over.is_set():
            try:
                reply = stubs[asked].Predict(ask(fingerprint, 3, number % 10, f"r{number}"), timeout=30)
            except grpc.RpcError as error:
                codes.add(error.code())
                asked = 1 - asked
                time.sleep(0.1)
            else:
                assert reply.request_id == f"r{number}"
                assert reply.logits.data == expected[number % 10]
                number += 4
        return number // 4

    with ThreadPoolExecutor() as pool:
        callers = [pool.submit(caller, first) for first in range(4)]
        try:
            for one in fleet:
                assert one.end() == 0, one.log.read_text()
                one.start()
                one.wait_until_serving()
        finally:
            over.set()
        answered = [one.result(timeout=60) for one in callers]
    for channel in channels:
        channel.close()
    assert min(answered) > 10
    assert codes == {grpc.StatusCode.UNAVAILABLE}, "who drains says so: ask another"


def test_health_answers_within_a_second_while_predict_is_saturated(server):
    server, channel, fingerprint = server
    stub = pb_grpc.TeacherStub(channel)
    run = server._desk.batcher._run
    server._desk.batcher._run = lambda parts: (time.sleep(0.05), run(parts))[1]
    over = threading.Event()
    codes: dict[grpc.StatusCode, int] = {}

    def flood() -> None:
        while not over.is_set():
            calls = [stub.Predict.future(ask(fingerprint, 4), timeout=30) for _ in range(10)]
            for call in calls:
                codes[call.code()] = codes.get(call.code(), 0) + 1

    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(flood)
        try:
            slowest = 0.0
            with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as probe:
                for _ in range(10):
                    began = time.monotonic()
                    assert health(probe, "funmatch.v1.Teacher") == SERVING
                    slowest = max(slowest, time.monotonic() - began)
                    time.sleep(0.1)
        finally:
            over.set()
    assert slowest < 1
    assert codes.keys() == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}, codes
    assert from_message(stub.Predict(ask(fingerprint), timeout=10).logits, "logits", np.float32, (3, 6)).size
