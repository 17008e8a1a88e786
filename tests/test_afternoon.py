"""The guides, by the letter: their blocks are read from docs/ and typed into one bash, in a folder like a fresh clone.

What a reader chooses is chosen small: tiny pictures, tiny networks, nothing that is downloaded. Not here: commands that
need a download, a GPU or a day (test_docs.py asks their parsers), and `tensorboard`, which serves until it is stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from conftest import photograph
from shell_blocks import ROOT, Block, session, shell_blocks

pytestmark = [
    pytest.mark.suite,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not all(map(shutil.which, ("bash", "make", "git"))), reason="needs bash, make and git"),
]

CLASSES = ("aster", "daisy", "iris", "lily", "rose", "tulip")
NUM_TRAIN, NUM_VAL = 32, 10  # of each class
COLOURS = np.array([(220, 40, 40), (40, 200, 40), (40, 60, 220), (220, 210, 40), (200, 40, 200), (40, 200, 210)])


class Afternoon(NamedTuple):
    """What the guide left."""

    folder: Path
    said: str
    port: int
    """Of its teacher."""


def page(name: str) -> list[Block]:
    return shell_blocks((ROOT / name).read_text())


def clone(folder: Path) -> Path:
    """What `git clone` and `make install` leave: the repository's files, and .venv."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(folder / name, (0, 0))  # older than .venv/installed, as after `make install`
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def pictures(root: Path, *, split: bool = True, labels: bool = True, number: int = NUM_TRAIN) -> Path:
    """Folders of pictures; a class has a colour."""
    rng = np.random.default_rng((2021, 6))
    for label, name in enumerate(CLASSES):
        for part, count in {"train": number, "val": NUM_VAL if split else 0}.items():
            folder = root / (part if split else "") / (name if labels else "")
            folder.mkdir(parents=True, exist_ok=True)
            for place in range(count):
                pixels = 0.5 * np.asarray(photograph(rng, 40, 48)) + 0.5 * COLOURS[label]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}_{place:02d}.jpg", quality=90)
    return root


def typed(script: Sequence[str], folder: Path, timeout_s: float, **environment: str) -> str:
    """What one bash says to these lines; every command must end with 0."""
    lines = ["set -eum", *script]  # m: what runs in the background is a group of its own, and ends as one
    process = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-c", "\n".join(lines)],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        said = process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        end(process)
        pytest.fail(f"not done within {timeout_s} s:\n{process.communicate()[0][-6000:]}")
    assert process.returncode == 0, said[-6000:]
    return said


def end(bash: subprocess.Popen) -> None:
    """It, and all that it has begun."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(int(entry.name)) == bash.pid:
                os.kill(int(entry.name), signal.SIGTERM)


def in_background(block: Block) -> str:
    """Another terminal: it is left running until CLOSED, or until the session ends."""
    return f"(trap : TERM\n{block.text}) > second_terminal.log 2>&1 &\ntrap 'kill %1; wait %1' EXIT"


CLOSED = "trap - EXIT\nkill %1\nwait %1"  # as by Ctrl-C in that terminal; it must end with 0, too


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def afternoon(tmp_path_factory) -> Afternoon:
    """The guide, gone through once."""
    import timm
    import torch

    import models

    folder = clone(tmp_path_factory.mktemp("afternoon") / "funmatch")
    start = folder.parent / "start.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = timm.create_model("test_byobnet", num_classes=20)
    grey = (0.5, 0.5, 0.5)
    models.save(
        start, network, models.ModelCard(architecture="test_byobnet", num_classes=20, size=32, mean=grey, std=grey)
    )
    port = free_port()
    chosen = {
        "PICTURES": pictures(folder.parent / "pictures"), "TEACHER_NET": "test_byobnet", "TEACHER_WEIGHTS": start,
        "TEACHER_EPOCHS": 20, "STUDENT_NET": "test_efficientnet", "STUDENT_EPOCHS": 80, "PIXELS": 32,
        "TEACHER": f"127.0.0.1:{port}",
    }  # fmt: skip
    script = []
    for block in page("docs/afternoon.md"):
        if block.title == "choose":
            assert re.findall(r"^export (\w+)=", block.text, re.M) == list(chosen)
            script += [f"export {name}={value}" for name, value in chosen.items()]
        else:
            script += [f"echo; echo '=== line {block.line}, at' $SECONDS s"]
            script += [in_background(block) if block.title == "second terminal" else block.text]
    said = typed([*script, CLOSED, "echo === all was typed, in $SECONDS s"], folder, 600)
    print(said)
    return Afternoon(folder, said, port)


def test_all_that_the_afternoon_promises_is_there(afternoon):
    folder, said = afternoon.folder, afternoon.said
    spans = re.findall(r"`((?:data|runs|exported)(?:/[\w./-]+)?)`", (ROOT / "docs" / "afternoon.md").read_text())
    promised = {span for span in spans if "," not in span}
    assert {"data/mine/contact_sheet.png", "runs/mine/report.html", "runs/mine/views.html", "exported"} <= promised
    assert [name for name in sorted(promised) if not (folder / name).exists()] == []
    exported = {path.name for path in (folder / "exported").iterdir()}
    assert exported == {"README.md", "config.json", "model.onnx", "model.safetensors"}
    assert "6 classes" in said.splitlines()
    assert "Traceback" not in said


def test_the_student_of_the_afternoon_learned_from_its_teacher(afternoon):
    folder = afternoon.folder
    teacher = json.loads((folder / "runs/mine/teacher/summary.json").read_text())
    student = json.loads((folder / "runs/mine/student/summary.json").read_text())
    chance = 1 / len(CLASSES)
    assert teacher["student_top1"] > 3 * chance
    assert student["agreement_top1"] > 2 * chance
    assert student["view_mismatch_max"] == 0


def test_nothing_of_the_afternoon_goes_on_afterwards(afternoon):
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", afternoon.port)) != 0
    assert "stopped" in (afternoon.folder / "second_terminal.log").read_text().splitlines()[-1]


def test_what_the_readme_says_of_a_finished_run_works(afternoon, tmp_path):
    """Report, views, export, and what can be looked up; the run is the afternoon's."""
    folder = clone(tmp_path / "funmatch")
    (folder / "data").mkdir()
    (folder / "runs").mkdir()
    for name in ("flowers102", "mine"):  # the page's name of it, and the run's own
        (folder / "data" / name).symlink_to(afternoon.folder / "data" / "mine")
    shutil.copytree(afternoon.folder / "runs" / "mine" / "student", folder / "runs" / "flowers102")
    (tmp_path / "noted").mkdir()
    commands = session(page("README.md"), tmp_path / "noted").commands
    works = re.compile(r"data_prep\.check|student_trainer\.report|benchmarks\.plan|funmatch (views|export)")
    chosen = [" ".join(command.argv) for command in commands if works.search(" ".join(command.argv))]
    assert len(chosen) == 5
    said = typed(chosen, folder, 300)
    assert "Traceback" not in said
    for name in (
        "data/flowers102/contact_sheet.png",
        "runs/flowers102/report.html",
        "step.html",
        "exported/model.onnx",
    ):
        assert (folder / name).is_file()


def test_sources_of_pictures_become_data_sets_as_the_page_says(tmp_path):
    from data_prep.prepare import prepare

    folder = clone(tmp_path / "funmatch")
    pictures(folder / "flowers", number=4)
    pictures(folder / "pictures", split=False, number=10)
    pictures(folder / "unlabeled", split=False, labels=False, number=4)
    of_shards = prepare("folder", folder / "flowers", tmp_path / "set", workers=1, pictures_per_shard=6, progress=False)
    (folder / "shards").mkdir()
    for shard in of_shards.root.glob("*train*.tar"):
        shutil.copy(shard, folder / "shards")
    (tmp_path / "noted").mkdir()
    commands = session(page("docs/own-data.md"), tmp_path / "noted").commands
    offline = re.compile(r"prepare (folder|shards)|data_prep\.check")
    chosen = [" ".join(command.argv) for command in commands if offline.search(" ".join(command.argv))]
    assert len(chosen) == 5
    said = typed(["source .venv/bin/activate", *chosen], folder, 300)
    for name in ("flowers", "mine", "shards", "unlabeled"):
        assert (folder / "data" / name / "dataset.json").is_file(), said
    assert (folder / "data" / "mine" / "contact_sheet.png").is_file()


def test_getting_started_works_as_written(tmp_path):
    """The demo in small: make is told to run its two trainings with --tiny."""
    folder = clone(tmp_path / "funmatch")
    tiny = "OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node=2 student_trainer/main.py --tiny"
    said = typed(
        ["tensorboard() { :; }", *(block.text for block in page("docs/getting-started.md"))], folder, 600,
        MAKEFLAGS="TWO_RANKS=" + tiny.replace(" ", "\\ "), MAKELEVEL="0",
    )  # fmt: skip
    rows = re.findall(
        r"^\| ([^|`]+?) \| [\d.]+ ", (ROOT / "docs" / "getting-started.md").read_text().replace("\\|", "¦"), re.M
    )
    assert len(rows) == 5
    assert [row for row in rows if row.replace("¦", "|") not in said] == []
    for name in ("report.png", "report.html", "metrics.jsonl", "summary.json"):
        assert (folder / "runs" / "demo" / name).is_file()
