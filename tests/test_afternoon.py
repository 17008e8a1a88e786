"""The afternoon guide, by the letter: its blocks are read from the page and typed, in a folder like a fresh clone.

What a reader chooses is chosen small: tiny pictures, tiny networks, nothing that is downloaded.

Not here: the other pages (test_guides.py).
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import free_port
from shell_blocks import ROOT
from typed import CLASSES, CLOSED, blocks_of, clone, in_background, pictures, typed

pytestmark = [
    pytest.mark.suite,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not all(map(shutil.which, ("bash", "make", "git"))), reason="needs bash, make and git"),
]


class Afternoon(NamedTuple):
    """What the guide left."""

    folder: Path
    said: str
    port: int
    """Of its teacher."""


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
    for block in blocks_of("docs/afternoon.md"):
        if block.title == "choose":
            assert re.findall(r"^export (\w+)=", block.text, re.M) == list(chosen)
            script += [f"export {name}={value}" for name, value in chosen.items()]
        else:
            script += [f"echo; echo '=== line {block.line}, at' $SECONDS s"]
            script += [in_background(block.text) if block.title == "second terminal" else block.text]
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
