"""docs/deployment.md for a laptop and for several machines, typed where there is a Docker engine: a quarter hour.

    .venv/bin/pytest -n0 -m containers

The several machines are folders and addresses of this one. Not here: what compose files, images and manifests promise
(test_deploy.py), Kubernetes (test_cluster.py), and GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from typed import blocks_of, clone, typed


def engine() -> bool:
    return bool(shutil.which("docker")) and not subprocess.run(["docker", "info"], capture_output=True).returncode


pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not engine(), reason="needs a Docker engine"),
]

Typed = Callable[..., str]
V2 = [] if shutil.which("docker-compose") else ['docker-compose() { docker compose "$@"; }']
"""The page's spelling, where there is the other one."""


@contextlib.contextmanager
def machine(folder: Path, files: str = "docker-compose.yml:docker-compose.cpu.yml") -> Iterator[Typed]:
    """Where a page's commands are typed: a fresh clone, with a project of its own for compose.

    Its containers and volumes are removed in the end. Images stay, with TAG test.
    """
    project = f"funmatch_test_{uuid.uuid4().hex[:8]}"

    def type_(*lines: str) -> str:
        return typed([*V2, *lines], folder, 3600, TAG="test", COMPOSE_PROJECT_NAME=project, COMPOSE_FILE=files)

    clone(folder)
    try:
        yield type_
    finally:
        # Of the volumes one is that of all projects, and stays while another one uses it.
        type_('docker-compose down -v --remove-orphans || [ -z "$(docker-compose ps -aq)" ]')


def block(first_words: str) -> str:
    """The page's block that begins so."""
    (found,) = [one.text for one in blocks_of("docs/deployment.md") if one.text.startswith(first_words)]
    return found


def test_a_fleet_on_a_laptop_grows_loses_a_teacher_and_is_renewed_under_a_run(tmp_path):
    begun = block("export COMPOSE_FILE=docker-compose.yml:docker-compose.cpu.yml\ndocker-compose build")
    follow = "docker-compose logs -f student\n"  # until the run ends: typed last of these
    assert follow in begun
    with machine(tmp_path / "laptop") as type_:
        said = type_(
            begun.replace(follow, ""),
            block("docker-compose up -d --no-deps --no-recreate --scale teacher=3"),
            block("docker-compose build teacher"),
            follow,
            block("docker-compose run --rm --no-deps"),
        )
    assert "Traceback" not in said
    found = tmp_path / "laptop" / "demo"
    summary = json.loads((found / "summary.json").read_text())
    assert summary["view_mismatch_max"] == 0
    assert summary["student_top1"] > 0.9
    assert (found / "report.html").is_file()


@pytest.fixture
def addresses() -> Iterator[list[str]]:
    """Those that the page gives to its machines, here all of this one."""
    found = ["10.0.0.1", "10.0.0.3", "10.0.0.4"]
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2 (ip), to have a few addresses more")
    for address in found:
        subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    yield found
    for address in found:
        subprocess.run(["ip", "address", "delete", f"{address}/32", "dev", "lo"], check=True)


def test_a_student_on_two_machines_waits_for_the_one_that_was_told_to_go(tmp_path, addresses):
    """With teachers on a third. The folder of keys and that of runs are the same for all, as if mounted everywhere."""
    files = "docker-compose.yml:docker-compose.cpu.yml:docker-compose.nodes.yml"
    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.chown(runs, 1000, 1000)
    of_two = [f"RUNS_DIR={runs}", "NNODES=2", f"RENDEZVOUS={addresses[1]}:29500", "STUDENT_PROCESSES=1"]
    of_second = ["RENDEZVOUS_IS_HERE=0", "STUDENT_FLAGS=--metrics-address=127.0.0.1:9092"]  # 9091 is the first one's

    def chosen(text: str) -> str:
        as_root = text.replace("sudo ", "").replace("/srv/authority", str(tmp_path / "authority"))
        return as_root.replace("export COMPOSE_FILE=docker-compose.yml:docker-compose.nodes.yml\n", "")

    begin = chosen(block("export COMPOSE_FILE=docker-compose.yml:docker-compose.nodes.yml"))
    learn = chosen(block("printf 'ADDRESS=10.0.0.3"))
    with contextlib.ExitStack() as cleanup:
        teachers, first, second = (
            cleanup.enter_context(machine(tmp_path / name, files)) for name in ("teachers", "first", "second")
        )
        teachers(*(f"echo {line} >> .env" for line in [f"RUNS_DIR={runs}"]), "docker-compose build", begin)
        first(*(f"echo {line} >> .env" for line in of_two), learn)
        other = learn.replace(addresses[1], addresses[2], 1)
        second(*(f"echo {line} >> .env" for line in of_two + of_second), other)
        wait_for_step(runs / "demo", 60)
        second("docker-compose stop student")
        second("docker-compose up -d --no-deps student")
        said = first("docker-compose logs -f student")
        (step,) = re.findall(r"stopped at step (\d+) by a signal", said)
        assert f"going on from step {step}" in said
        for type_ in (first, second):
            assert type_("docker wait $(docker-compose ps -aq student)").strip() == "0"
        restarts = first("docker inspect -f '{{.RestartCount}}' $(docker-compose ps -aq student)")
        assert restarts.strip() == "0", "it waited in one piece"
    summary = json.loads((runs / "demo" / "summary.json").read_text())
    assert summary["view_mismatch_max"] == 0
    assert summary["student_top1"] > 0.9


def wait_for_step(run: Path, least: int) -> None:
    deadline = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < least:
        assert time.monotonic() < deadline, "the run has not come so far"
        time.sleep(0.2)
