"""What may happen to a fleet while a student learns from it: in each case the weights are those of the undisturbed run.

Teachers are real servers in processes of their own; the student trains in this one, so that a test can stop it at any
step. What happens to two ranks together is in test_end_to_end.py, what happens to cables in test_several_hosts.py.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from conftest import free_port, random_teacher
from protos import teacher_pb2 as pb
from protos.arrays import from_message, to_message
from student_trainer import checkpoint
from student_trainer import train as loop
from student_trainer.config import override
from student_trainer.fleet import TeachersGoneError
from student_trainer.recipes import RECIPES
from student_trainer.world import World
from test_end_to_end import Teacher, finish, lines, start_teacher, wait_for_step, weights

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "digits/demo"
STEPS, EVERY = 40, 10


def arguments(data: Path, run_dir: Path, addresses: str) -> list[str]:
    return [
        f"--data={data}", f"--run-dir={run_dir}", "--data.evaluate=val",
        "--student.architecture=test_byobnet", "--student.size=32", "--optim.batch-size=32",
        f"--optim.epochs={STEPS * 32 / 18}", "--optim.warmup-steps=5", "--device=cpu", "--teacher.rows-per-request=8",
        "--teacher.audit-every=0", f"--checkpoint-every={EVERY}", "--evaluate-every=0", "--decode-threads=1",
        "--teacher.deadline-s=20", "--teacher.patience-s=60", "--teacher.addresses", addresses,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def teachers(tiny_model, tiny_data, folder):
    """Two replicas that share a port, as those of one name do; a test that ends one starts it again."""
    port = free_port()
    fleet = [start_teacher(tiny_model, tiny_data, folder, f"127.0.0.{host}:{port}") for host in (2, 3)]
    yield fleet
    for teacher in fleet:
        teacher.kill()


@pytest.fixture
def student(tiny_data, tmp_path, teachers, monkeypatch):
    """Train here; `at` says what to do before the update of which step."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(addresses: str = "", at: Callable[[int], object] = lambda _: None, *more: str) -> Path:
        addresses = addresses or ",".join(teacher.address for teacher in teachers)
        config = override(RECIPES[RECIPE].config, [*arguments(tiny_data, tmp_path / "run", addresses), *more])
        step = checkpoint.load_latest(config.run_dir)["step"] if (config.run_dir / "checkpoints").exists() else 0

        def set_schedule(*args):
            nonlocal step
            at(step)
            step += 1
            return original(*args)

        monkeypatch.setattr(loop, "set_schedule", set_schedule)
        loop.train(config, World())
        return config.run_dir

    original = loop.set_schedule
    yield run
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def undisturbed(tiny_data, teachers, folder) -> str:
    """The weights of a run that nothing happened to."""
    run_dir = folder / "undisturbed"
    finish(student_process(arguments(tiny_data, run_dir, ",".join(teacher.address for teacher in teachers))))
    return weights(run_dir)


def student_process(args: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "student_trainer" / "main.py"), "--recipe", RECIPE, *args], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


class Proxy:
    """Stands in front of a teacher, and may lie."""

    def __init__(self, upstream: str) -> None:
        self.spoil: Callable[[pb.PredictReply], None] = lambda _reply: None
        self.answered = 0
        self.go_to(upstream)
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers([self])
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def go_to(self, upstream: str) -> None:
        self._channel = grpc.insecure_channel(upstream)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def forward(request: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                answer = self._channel.unary_unary(details.method)(request, timeout=20)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
            if not details.method.endswith("/Predict"):
                return answer
            reply = pb.PredictReply.FromString(answer)
            self.spoil(reply)
            self.answered += 1
            return reply.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(forward)

    def stop(self) -> None:
        self._server.stop(None).wait()
        self._channel.close()


@pytest.fixture
def proxy(teachers):
    made = Proxy(teachers[0].address)
    yield made
    made.stop()


def restart(teachers: list[Teacher], number: int, model: Path, data: Path, folder: Path, how: int) -> None:
    """End a teacher by a signal and start it again where it was."""
    teachers[number].process.send_signal(how)
    assert teachers[number].process.wait(timeout=90) == (0 if how == signal.SIGTERM else -how)
    teachers[number] = start_teacher(model, data, folder, teachers[number].address)


def test_a_replica_killed_under_load(student, undisturbed, teachers, tiny_model, tiny_data, folder):
    again = threading.Thread(target=restart, args=(teachers, 0, tiny_model, tiny_data, folder, signal.SIGKILL))
    run_dir = student(at=lambda step: again.start() if step == 8 else None)
    again.join()
    assert weights(run_dir) == undisturbed


def test_a_replica_that_stands_still_for_seconds(student, undisturbed, teachers):
    process = teachers[0].process

    def at(step):
        if step == 8:
            process.send_signal(signal.SIGSTOP)
            threading.Timer(5, process.send_signal, [signal.SIGCONT]).start()

    began = time.monotonic()
    run_dir = student("", at, "--teacher.deadline-s=1")
    assert weights(run_dir) == undisturbed
    time.sleep(max(0.0, 6 - (time.monotonic() - began)))  # for the tests after this one


@pytest.mark.suite
def test_a_rolling_restart_of_all(student, undisturbed, teachers, tiny_model, tiny_data, folder):
    def roll():
        for number in range(len(teachers)):
            restart(teachers, number, tiny_model, tiny_data, folder, signal.SIGTERM)

    rolling = threading.Thread(target=roll)

    def at(step):
        if step == 5:
            rolling.start()
        if rolling.is_alive():
            rolling.join(timeout=0.3 if step < STEPS - 5 else None)  # some steps are left for those who are back

    run_dir = student(at=at)
    assert weights(run_dir) == undisturbed


def test_a_replica_that_comes_back_with_other_weights(student, undisturbed, teachers, proxy, tiny_data, folder, caplog):
    other_model = random_teacher(folder / "other.safetensors", 9, 32, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), "")
    other = start_teacher(other_model, tiny_data, folder)
    try:
        at = {8: lambda: proxy.go_to(other.address)}
        run_dir = student(f"{proxy.address},{teachers[1].address}", lambda step: at.get(step, int)())
    finally:
        other.kill()
    assert weights(run_dir) == undisturbed
    (sentence,) = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(set(sentence.replace(",", " ").split()) & fingerprints(run_dir, sentence)) == 2, "both are named"


def fingerprints(run_dir: Path, sentence: str) -> set[str]:
    ours = checkpoint.load_latest(run_dir)["identity"]["teacher"]
    theirs = sentence.split("its fingerprint is ")[1].split()[0]
    assert theirs != ours
    return {ours, theirs}


def wrong_size(reply: pb.PredictReply) -> None:
    logits = from_message(reply.logits, "logits", np.float32, (None, None))
    reply.logits.CopyFrom(to_message(np.ascontiguousarray(logits[:-1])))


def not_a_number(reply: pb.PredictReply) -> None:
    logits = from_message(reply.logits, "logits", np.float32, (None, None)).copy()
    logits[0, 0] = np.nan
    reply.logits.CopyFrom(to_message(logits))


def anothers_answer() -> Callable[[pb.PredictReply], None]:
    before: list[pb.PredictReply] = []

    def spoil(reply: pb.PredictReply) -> None:
        own = pb.PredictReply()
        own.CopyFrom(reply)
        if before:
            reply.CopyFrom(before.pop())
        before.append(own)

    return spoil


@pytest.mark.parametrize("spoil", [wrong_size, not_a_number, anothers_answer()], ids=["size", "nan", "another's"])
def test_a_replica_that_answers_wrongly(student, undisturbed, teachers, proxy, spoil, caplog):
    proxy.spoil = spoil
    run_dir = student(f"{proxy.address},{teachers[1].address}")
    assert weights(run_dir) == undisturbed
    assert proxy.answered > 0
    said = [record.getMessage() for record in caplog.records if "wrong answer" in record.getMessage()]
    assert len(said) >= 1 and all("(request " in sentence for sentence in said)
    assert spoil not in (wrong_size, not_a_number) or len(said) == 1, "said once"


def test_a_name_that_stands_for_other_replicas_now_and_then(student, undisturbed, teachers, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    hosts = [teacher.address.partition(":")[0] for teacher in teachers]
    port = teachers[0].address.partition(":")[2]
    known: list[str] = []
    ask_the_system = socket.getaddrinfo

    def getaddrinfo(name, *args, **named):
        if name != "teachers.test":
            return ask_the_system(name, *args, **named)
        if not known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, int(port))) for host in known]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("student_trainer.fleet.addresses.LOOK_UP_EVERY_S", 0.2)
    changes = {8: hosts, 16: hosts[1:], 24: [], 32: hosts[:1]}

    def at(step):
        if step in changes:
            known[:] = changes[step]
            time.sleep(1)

    threading.Timer(1, lambda: known.append(hosts[0])).start()  # the name is not there at first
    run_dir = student(f"dns:///teachers.test:{port}", at)
    assert weights(run_dir) == undisturbed
    said = " ".join(record.getMessage() for record in caplog.records)
    for host in hosts:
        assert f"teacher {host}:{port}: left; it answered" in said


@pytest.mark.suite
def test_a_student_killed_and_resumed_while_a_teacher_is_replaced(
    student, undisturbed, teachers, tiny_model, tiny_data, tmp_path, folder
):
    run_dir = tmp_path / "run"
    process = student_process(arguments(tiny_data, run_dir, ",".join(teacher.address for teacher in teachers)))
    wait_for_step(process, run_dir, 15)
    again = threading.Thread(target=restart, args=(teachers, 1, tiny_model, tiny_data, folder, signal.SIGKILL))
    again.start()
    process.kill()
    process.communicate()
    assert weights(student()) == undisturbed
    again.join()
    assert [line["step"] for line in lines(run_dir)] == list(range(1, STEPS + 1)), "no step twice"


def no_room_for(run_dir: Path, step: int) -> None:
    """The file of that checkpoint is on a full disk."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run_dir / "checkpoints" / f"step_{step:08d}.tmp").symlink_to("/dev/full")


def test_a_disk_that_is_full_for_a_while(student, undisturbed, tmp_path, caplog):
    run_dir = tmp_path / "run"
    at = {2 * EVERY - 1: lambda: no_room_for(run_dir, 2 * EVERY)}
    assert weights(student("", lambda step: at.get(step, int)())) == undisturbed
    sentence = " ".join(record.getMessage() for record in caplog.records)
    assert f"for the checkpoint of step {2 * EVERY}; there are whole ones of step {EVERY}:" in sentence


def test_a_disk_that_stays_full_ends_the_run_at_its_end_and_a_new_start_makes_up(student, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    at = {STEPS - 1: lambda: no_room_for(run_dir, STEPS)}
    with pytest.raises(checkpoint.FullDiskError, match=f"whole ones of step {STEPS - EVERY} and {STEPS - 2 * EVERY}"):
        student("", lambda step: at.get(step, int)())
    assert weights(student()) == undisturbed


@pytest.mark.parametrize("step", [13, STEPS - 1])
def test_teachers_that_are_gone_end_the_run_at_a_checkpoint_of_its_own(student, undisturbed, proxy, tmp_path, step):
    """With checkpoints every 10: between two of them, its batch statistics too; and after the last step, with the
    evaluation to be made up for."""
    stopped = {step: proxy.stop}
    with pytest.raises(TeachersGoneError, match=r"(?s)no teacher has answered for.*UNAVAILABLE"):
        student(proxy.address, lambda now: stopped.get(now, int)(), "--teacher.patience-s=1.5")
    saved = checkpoint.load_latest(tmp_path / "run")["step"]
    assert saved == STEPS if step == STEPS - 1 else step < saved < STEPS and saved % EVERY
    run_dir = student()
    assert weights(run_dir) == undisturbed
    assert json.loads((run_dir / "summary.json").read_text())["examples"] == 6
    assert sorted({line["step"] for line in lines(run_dir)}) == list(range(1, STEPS + 1))
