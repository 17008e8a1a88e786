"""Students and teachers on hosts of their own: network namespaces on one machine, with cables that can be pulled.

The teachers listen with TLS and a token, Needs Linux, root, and iproute2's `ip`; skipped with the reason elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from student_trainer.config import TeacherConfig
from student_trainer.recipes import RECIPES
from student_trainer.teachers import services
from student_trainer.world import World
from test_end_to_end import RESTARTS, STEPS, TORCHRUN, finish, lines, ranks_of, wait_for_step, weights
from test_end_to_end import command as one_host_command

ROOT = Path(__file__).resolve().parents[1]
NETWORK = "10.213.7"
# Fourteen processes that import torch one after another, on two cores that others may use as well.
pytestmark = pytest.mark.timeout(900)
_numbers = itertools.count()


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Host:
    """A namespace with one network card, plugged into the switch."""

    def __init__(self, switch: str, number: int) -> None:
        self.name = f"{switch}-{number}"
        self.address = f"{NETWORK}.{number}"
        self._switch = switch
        self._plug = f"port{number}"
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", "eth0", "netns", self.name, "type", "veth", "peer", self._plug, "netns", switch)
        run("ip", "-n", switch, "link", "set", self._plug, "master", "bridge", "up")
        run("ip", "-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        for card in ("lo", "eth0"):
            run("ip", "-n", self.name, "link", "set", card, "up")

    def pull_the_cable(self) -> None:
        run("ip", "-n", self._switch, "link", "set", self._plug, "down")

    def plug_in(self) -> None:
        run("ip", "-n", self._switch, "link", "set", self._plug, "up")

    def start(self, args: list[str], **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *args], cwd=ROOT, text=True, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


@contextlib.contextmanager
def network(num_hosts: int) -> Iterator[list[Host]]:
    """So many hosts on one switch."""
    switch = f"funmatch-{os.getpid()}-{next(_numbers)}"
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2 (ip)")
    made = subprocess.run(["ip", "netns", "add", switch], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    hosts: list[Host] = []
    try:
        run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "bridge", "up")
        hosts.extend(Host(switch, number + 1) for number in range(num_hosts))
        yield hosts
    finally:
        for name in (*(host.name for host in hosts), switch):
            for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "delete", name)


@contextlib.contextmanager
def teacher(host: Host, model: Path, data: Path, keys: Path) -> Iterator[str]:
    """A teacher that the other hosts can reach; its address."""
    file = keys / f"address-{host.name}"
    process = host.start([
        sys.executable, "-m", "teacher_server.main", f"--model={model}", f"--data={data}",
        f"--address={host.address}:50051", f"--address-file={file}", "--device=cpu", "--threads=1", "--batch-rows=16",
        f"--tls-cert={keys / 'server.pem'}", f"--tls-key={keys / 'server.key'}", f"--token-file={keys / 'token'}",
    ])  # fmt: skip
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.05)
    yield f"{host.address}:50051"
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output[-4000:]


def student(host: Host, meet_at: Host, args: list[str], *, nnodes: str = "2", restarts: int = 0) -> subprocess.Popen:
    """torchrun on one of several hosts, one rank each. One death may cost each host more than one of its restarts."""
    own = args[args.index(str(ROOT / "student_trainer" / "main.py")) :]
    return host.start([
        TORCHRUN, f"--nnodes={nnodes}", "--nproc_per_node=1", f"--max-restarts={restarts}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meet_at.address}:29400", "--rdzv-id=run", f"--local-addr={host.address}",
        # torchrun knows the host it should meet at by its name, and all of these have one name.
        f"--rdzv-conf=is_host={int(host is meet_at)},last_call_timeout=5,keep_alive_interval=1", *own,
    ], **RESTARTS)  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tiny_model, tiny_data, tmp_path_factory):
    """Two for students, two with teachers that serve; and what a student is told about the teachers."""
    with network(4) as found, contextlib.ExitStack() as cleanup:
        keys = tmp_path_factory.mktemp("keys")
        run("sh", str(ROOT / "docker" / "make_keys.sh"), str(keys), *(host.address for host in found[2:]))
        addresses = [cleanup.enter_context(teacher(host, tiny_model, tiny_data, keys)) for host in found[2:]]
        told = [
            f"--teacher={','.join(addresses)}",
            f"--teacher.tls-ca={keys / 'ca.pem'}",
            f"--teacher.token-file={keys / 'token'}",
        ]
        yield found, told


@pytest.fixture(scope="module")
def undisturbed(hosts, tiny_data, tmp_path_factory) -> Path:
    """A run of two ranks on one of the hosts that nothing happened to."""
    found, told = hosts
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(found[0].start([*one_host_command(tiny_data, run_dir), *told]))
    return run_dir


@pytest.mark.suite
def test_a_cut_link_that_heals_changes_no_weight_of_a_run_on_two_hosts(hosts, undisturbed, tiny_data, tmp_path):
    found, told = hosts
    args = [*one_host_command(tiny_data, tmp_path / "run"), *told, "--teacher.deadline-s=3"]
    processes = [student(host, found[0], args) for host in found[:2]]
    wait_for_step(processes[0], tmp_path / "run", 8)
    found[2].pull_the_cable()
    time.sleep(5)
    found[2].plug_in()
    for process in processes:
        finish(process)
    assert weights(tmp_path / "run") == weights(undisturbed)


@pytest.mark.suite
def test_a_rank_that_dies_is_started_again_on_all_hosts_from_the_last_checkpoint(
    hosts, undisturbed, tiny_data, tmp_path
):
    found, told = hosts
    args = [*one_host_command(tiny_data, tmp_path / "run"), *told]
    processes = [student(host, found[0], args, restarts=5) for host in found[:2]]
    wait_for_step(processes[0], tmp_path / "run", 15)
    of_second = set(subprocess.run(
        ["ip", "netns", "pids", found[1].name], capture_output=True, text=True).stdout.split())  # fmt: skip
    victims = [pid for pid in ranks_of(tmp_path / "run") if str(pid) in of_second and pid != processes[1].pid]
    os.kill(max(victims), signal.SIGKILL)  # torchrun's child
    outputs = [finish(process) for process in processes]
    assert "going on from step 10" in outputs[0] + outputs[1]
    assert weights(tmp_path / "run") == weights(undisturbed)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, STEPS + 1)), "no step twice"


@pytest.mark.suite
def test_a_host_that_is_told_to_go_and_comes_back_is_waited_for(hosts, undisturbed, tiny_data, tmp_path):
    """As when a spot node goes: its agent gets SIGTERM, all ranks save and end; the other must not call it done."""
    found, told = hosts
    args = [*one_host_command(tiny_data, tmp_path / "run"), *told]
    processes = [student(host, found[0], args, restarts=5) for host in found[:2]]
    wait_for_step(processes[0], tmp_path / "run", 13)
    processes[1].terminate()  # `ip netns exec` has become torchrun
    said = processes[1].communicate(timeout=90)[0]
    assert processes[1].returncode != 0, said[-4000:]
    processes[1] = student(found[1], found[0], args, restarts=5)
    outputs = [finish(process) for process in processes]
    (step,) = re.findall(r"stopped at step (\d+) by a signal", outputs[0] + said)
    assert f"going on from step {step}" in outputs[0] + outputs[1]
    assert weights(tmp_path / "run") == weights(undisturbed)


@pytest.mark.suite
def test_a_host_that_vanishes_leaves_a_run_that_goes_on_with_the_same_rows_on_the_others(
    hosts, undisturbed, tiny_data, tmp_path
):
    """--nnodes=1:2. With one rank a BatchNorm sees other batches, so the weights differ; rows and targets do not."""
    found, told = hosts
    args = [*one_host_command(tiny_data, tmp_path / "run"), *told]
    processes = [student(host, found[0], args, nnodes="1:2", restarts=3) for host in found[:2]]
    wait_for_step(processes[0], tmp_path / "run", 15)
    os.killpg(processes[1].pid, signal.SIGKILL)
    for pid in subprocess.run(["ip", "netns", "pids", found[1].name], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    processes[1].communicate()
    finish(processes[0])
    seen, expected = lines(tmp_path / "run"), lines(undisturbed)
    assert [line["step"] for line in seen] == list(range(1, STEPS + 1))
    for name in ("teacher_entropy", "lr"):
        assert [line[name] for line in seen] == pytest.approx([line[name] for line in expected], rel=1e-5)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["images_seen"] == STEPS * 32


def test_a_run_on_several_hosts_must_be_given_its_teachers(tmp_path):
    config = dataclasses.replace(
        RECIPES["digits/demo"].config, run_dir=tmp_path, teacher=TeacherConfig(model=("any.safetensors",))
    )
    with pytest.raises(ValueError, match=r"2 processes on several machines.*--teacher HOST:PORT"):
        with services(config, World(size=2, local_size=1)):
            pass
