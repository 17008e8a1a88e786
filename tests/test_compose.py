"""docs/deployment.md, its laptop's part and its rolling update, typed where there is a Docker engine: ten minutes.

    .venv/bin/pytest -n0 -m containers

Not here: what compose files, images and manifests promise (test_deploy.py), and GPUs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from collections.abc import Iterator
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

V2 = [] if shutil.which("docker-compose") else ['docker-compose() { docker compose "$@"; }']
"""The page's spelling, where there is the other one."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """A fresh clone; containers and volumes are a project of their own, and are removed. Images stay, with TAG test."""
    monkeypatch.setenv("TAG", "test")
    monkeypatch.setenv("COMPOSE_PROJECT_NAME", f"funmatch_test_{uuid.uuid4().hex[:8]}")
    folder = clone(tmp_path / "funmatch")
    yield folder
    typed([*V2, "docker-compose down -v --remove-orphans"], folder, 300)


def block(first_words: str) -> str:
    """The page's block that begins so."""
    (found,) = [one.text for one in blocks_of("docs/deployment.md") if one.text.startswith(first_words)]
    return found


def test_a_fleet_on_a_laptop_grows_loses_a_teacher_and_is_renewed_under_a_run(folder):
    begun = block("export COMPOSE_FILE=docker-compose.yml:docker-compose.cpu.yml\ndocker-compose build")
    follow = "docker-compose logs -f student\n"  # until the run ends: typed last of these
    assert follow in begun
    said = typed(
        [
            *V2,
            begun.replace(follow, ""),
            block("docker-compose up -d --no-deps --no-recreate --scale teacher=3"),
            block("docker-compose build teacher"),
            follow,
            block("docker-compose run --rm --no-deps"),
        ],
        folder, 3600,
    )  # fmt: skip
    assert "Traceback" not in said
    summary = json.loads((folder / "demo" / "summary.json").read_text())
    assert summary["view_mismatch_max"] == 0
    assert summary["student_top1"] > 0.9
    assert (folder / "demo" / "report.html").is_file()
