"""`python -m teacher_server.main` as its owner sees it: address file, signals, standard input, exit codes, log."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from conftest import plain_rows
from data_prep.index import Index
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from protos.arrays import from_message
from teacher_server import events as events_room
from teacher_server.main import main
from views.wire import ask_by_reference

ROOT = Path(__file__).resolve().parents[1]
START_S, END_S = 120, 30

Start = Callable[..., tuple[subprocess.Popen, Path]]


@pytest.fixture
def start(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a server process with more flags; gives the process and its log file."""
    processes: list[subprocess.Popen] = []

    def begin(*flags: str) -> tuple[subprocess.Popen, Path]:
        log = tmp_path / f"log{len(processes)}.txt"
        command = [
            sys.executable, "-m", "teacher_server.main", f"--model={tiny_model}", "--data", str(tiny_data),
            "--address=127.0.0.1:0", "--device=cpu", "--threads=1", "--batch-rows=4", "--gate-images=4",
            f"--address-file={tmp_path / 'address'}", *flags,
        ]  # fmt: skip
        with log.open("w") as sink:
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=sink, stdout=sink)
        processes.append(process)
        return process, log

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def address_of(process: subprocess.Popen, log: Path, file: Path) -> str:
    deadline = time.monotonic() + START_S
    while not file.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return file.read_text().strip()


def events(log: Path) -> dict[str, dict]:
    """The last event of each name in a log."""
    found = {}
    for line in log.read_text().splitlines():
        words = line.split(" ", 4)
        if len(words) == 5 and words[4].startswith("{"):
            found[words[3]] = json.loads(words[4])
    return found


def question(tiny_data: Path, num_rows: int, fingerprint: str) -> pb.PredictRequest:
    index = Index.open(tiny_data)
    request = ask_by_reference(plain_rows(num_rows, side=30), index.digest)
    request.fingerprint = fingerprint
    return request


def test_sigterm_answers_what_is_in_progress_and_exits_zero(start, tiny_data, tmp_path):
    process, log = start("--max-rows=2000")
    address = address_of(process, log, tmp_path / "address")
    with grpc.insecure_channel(address) as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10).status
        assert status == health_pb2.HealthCheckResponse.SERVING, "the address is written once it serves"
        stub = pb_grpc.TeacherStub(channel)
        fingerprint = stub.Describe(pb.DescribeRequest(), timeout=10).fingerprint
        # 1000 rows take long enough that the signal comes in their midst.
        calls = [stub.Predict.future(question(tiny_data, 500, fingerprint), timeout=60) for _ in range(2)]
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        for call in calls:
            assert from_message(call.result().logits, "logits", np.float32, (None, 6)).shape == (500, 6)
        assert process.wait(END_S) == 0, log.read_text()
        with pytest.raises(grpc.RpcError) as error:
            stub.Describe(pb.DescribeRequest(), timeout=5)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert not (tmp_path / "address").exists(), "nobody shall try an address where nobody listens"
    serving = events(log)["serving"]
    assert serving["address"] == address
    assert serving["fingerprint"] == fingerprint
    assert serving["gate"]["batch_invariant"]
    assert events(log)["gate"]["pictures"] == "tiny_pictures"
    assert {"draining", "stopped"} <= events(log).keys()


def test_a_server_on_a_unix_socket_ends_when_its_owners_pipe_closes(start, tmp_path):
    process, log = start(f"--address=unix:{tmp_path}/socket", "--exit-when-stdin-closes")
    address = address_of(process, log, tmp_path / "address")
    assert address == f"unix:{tmp_path}/socket"
    with grpc.insecure_channel(address) as channel:
        assert pb_grpc.TeacherStub(channel).Describe(pb.DescribeRequest(), timeout=10).num_classes == 6
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(END_S) == 0, log.read_text()


def test_a_server_that_is_still_loading_ends_with_its_owner_too(start, tmp_path):
    process, log = start("--exit-when-stdin-closes")
    process.stdin.close()
    assert process.wait(START_S) == 0, log.read_text()
    assert not (tmp_path / "address").exists()


@pytest.fixture
def call_main(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Call the door in this process: for what ends before it serves."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(*flags: str) -> int:
        command = ["main", f"--model={tiny_model}", "--address=127.0.0.1:0", "--device=cpu", "--threads=1", *flags]
        monkeypatch.setattr(sys, "argv", command)
        try:
            return main()
        except SystemExit as end:  # the command line's own
            return end.code

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)
    logging.captureWarnings(False)
    for handler in logging.getLogger().handlers[:]:
        if isinstance(handler, events_room._Stderr):  # it writes to this test's captured stream
            logging.getLogger().removeHandler(handler)


def test_the_gates_refusal_exits_three_with_a_sentence(call_main, capsys, tmp_path):
    flags = "--precision=bfloat16", "--gate-max-kl=1e-12", "--gate-images=4", f"--address-file={tmp_path / 'address'}"
    assert call_main(*flags) == 3
    assert "on 4 pictures the served network differs too much" in capsys.readouterr().err
    assert not (tmp_path / "address").exists()


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--batch-rows=0", "--batch-rows must lie in 1..4096"),
        ("--model=nowhere.safetensors", "no such weight file: nowhere.safetensors"),
        ("--model=resnetv2_14x5_bit", "nearest known names are ['resnetv2_14x05_bit'"),
        ("--stall-s=0", "--stall-s must be positive"),
        ("--metrics-address=9090", "--metrics-address must be HOST:PORT"),
        ("--data=nowhere", "nowhere holds no prepared data set"),
        ("--device=cuda:99", "--device cuda:99: this machine has"),
        ("--insecure --address=nowhere.invalid:0", "cannot listen on 'nowhere.invalid:0' (--address)"),
    ],
)
def test_a_wrong_setting_exits_two_with_a_sentence(call_main, capsys, flag, sentence):
    assert call_main(*flag.split()) == 2
    assert sentence in capsys.readouterr().err


def test_a_second_sigterm_does_not_wait(start, tiny_data, tmp_path):
    process, log = start("--max-rows=4000", "--drain-s=100")
    address = address_of(process, log, tmp_path / "address")
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.TeacherStub(channel)
        fingerprint = stub.Describe(pb.DescribeRequest(), timeout=10).fingerprint
        os.kill(process.pid, signal.SIGSTOP)  # the request will be in progress when both signals have come
        call = stub.Predict.future(question(tiny_data, 4000, fingerprint), timeout=60)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM, log.read_text()
        assert call.code() == grpc.StatusCode.UNAVAILABLE
