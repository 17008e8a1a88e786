"""README and the other guides, typed: their commands are read from the pages and run, in a folder like a fresh clone.

What a reader chooses is chosen small: networks, ports, processes, and --tiny where a recipe would take a day. Each test
says which commands it leaves; test_docs.py asks all of them of their parsers.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import free_port, random_teacher
from shell_blocks import ROOT
from typed import CLASSES, CLOSED, Page, blocks_of, clone, flowers, in_background, make_with, pictures, typed

pytestmark = [
    pytest.mark.suite,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not all(map(shutil.which, ("bash", "make", "git"))), reason="needs bash, make and git"),
]

TINY = "--tiny --optim.epochs 3"
"""Nine steps of 32, of a hundred pictures."""


def make_demo_with(flags: str) -> dict[str, str]:
    """The environment in which `make demo` gives its two trainings these flags."""
    return make_with(
        TWO_RANKS=f"OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node=2 student_trainer/main.py {flags}"
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """A fresh clone, after make install."""
    return clone(tmp_path / "funmatch")


def teacher(path: Path, num_classes: int) -> Path:
    """A small network with random weights, in place of one that would be downloaded."""
    half = (0.5, 0.5, 0.5)
    return random_teacher(path, 3, 32, half, half, "", num_classes)


def onnx_file(path: Path) -> None:
    """What somebody else's tool might have made: nothing in it says how pictures are fed."""
    lines = (
        "import sys, torch",
        f"net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 16, 16), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),"
        f" torch.nn.Flatten(), torch.nn.Linear(8, {len(CLASSES)})).eval()",
        "batch = {0: torch.export.Dim('batch', min=1)}",
        "images = torch.zeros(2, 3, 224, 224)",
        "torch.onnx.export(net, (images,), dynamo=True, verbose=False, dynamic_shapes=(batch,)).save(sys.argv[1])",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines), str(path)], check=True, capture_output=True)


def tiny(line: str) -> str:
    """A student's run, of a few steps."""
    return f"{line} {TINY}"


def ended_well(*logs: Path) -> bool:
    return all("stopped" in log.read_text().splitlines()[-1] for log in logs)


def test_a_run_of_ones_own_as_the_readme_has_it(folder):
    """All of the page but make's verbs (here below, test_study.py, .ci/run) and containers (test_compose.py)."""
    ports = free_port(), free_port()
    page = Page(
        "README.md",
        {
            "/archives": str(flowers(folder.parent / "archives")), "--step 100": "--step 4",
            "bit:R152x2_T_flowers128": str(teacher(folder.parent / "teacher.safetensors", 102)),
            "--nproc-per-node=8": "--nproc-per-node=2", "50051": str(ports[0]), "50052": str(ports[1]),
        },
    )  # fmt: skip
    page.take("^(make|docker-compose|cp .env)", 8)
    servers = page.take(r"teacher_server\.main", 2)
    script = [
        *page.take(r"data_prep\.(prepare|check)", 2),
        *(in_background(line, f"teacher_{number}.log") for number, line in enumerate(servers)),
        tiny(page.take("flowers102/funmatch/10k", 1)[0]),
        CLOSED,
        *page.take(r"student_trainer\.report|funmatch (views|export)|benchmarks\.plan|--tiny", 5),
    ]
    assert page.left == []
    said = typed(script, folder, 600)
    assert "Traceback" not in said
    assert ended_well(folder / "teacher_0.log", folder / "teacher_1.log")
    summary = json.loads((folder / "runs/flowers102/summary.json").read_text())
    assert summary["view_mismatch_max"] == 0
    for name in (
        "data/flowers102/contact_sheet.png", "runs/flowers102/report.html", "step.html", "exported/model.onnx"
    ):  # fmt: skip
        assert (folder / name).is_file()


def test_data_teachers_and_students_of_ones_own_as_their_page_has_them(folder):
    """All of the page."""
    pictures(folder / "flowers", number=4)
    pictures(folder / "pictures", split=False, number=20)
    pictures(folder / "unlabeled", split=False, labels=False, number=20)
    pictures(folder / "shard_sources", number=6)
    flowers(folder / "archives")
    onnx_file(folder / "teacher.onnx")
    ports = free_port(), free_port()
    page = Page(
        "docs/own-data.md",
        {
            "tf_efficientnet_lite2.in1k": str(teacher(folder.parent / "lite2.safetensors", len(CLASSES))),
            "bit:R152x2_T_flowers128": str(teacher(folder.parent / "bit.safetensors", 102)),
            "resnetv2_50x1_bit --student.size 128": "resnetv2_14x05_bit --student.size 32",
            "50051": str(ports[0]), "50052": str(ports[1]),
        },
    )  # fmt: skip
    prepared = page.take(r"funmatch prepare|data_prep\.check", 6)
    unlabeled, paper, bit = page.take("funmatch train", 3)
    timm, onnx, *replicas = page.take("funmatch serve", 4)
    assert page.left == []
    said = typed(
        [
            "source .venv/bin/activate",
            "funmatch prepare folder --source shard_sources --out data/sharded --pictures-per-shard 6",
            "mkdir shards && cp data/sharded/*train*.tar shards",
            *prepared,
            in_background(timm, "timm.log"), tiny(unlabeled), CLOSED,
            in_background(onnx, "onnx.log"), tiny(bit), CLOSED,
            *(in_background(line, f"replica_{number}.log") for number, line in enumerate(replicas)),
            tiny(paper), CLOSED,
        ],
        folder, 900,
    )  # fmt: skip
    assert "Traceback" not in said
    for name in ("flowers", "mine", "shards", "unlabeled", "flowers102"):
        assert (folder / "data" / name / "dataset.json").is_file(), said
    assert (folder / "data" / "mine" / "contact_sheet.png").is_file()
    assert ended_well(*(folder / f"{name}.log" for name in ("timm", "onnx", "replica_0", "replica_1")))
    without_labels = json.loads((folder / "runs/unlabeled/summary.json").read_text())
    assert "agreement_top1" in without_labels and "student_top1" not in without_labels
    assert json.loads((folder / "runs/bit/summary.json").read_text())["view_mismatch_max"] == 0


def test_keys_and_a_token_as_the_page_on_security_has_them(folder):
    """All of the page; the token's owner learns, somebody without one is told so."""
    pictures(folder / "pictures", number=16)
    port = free_port()
    page = Page(
        "docs/security.md",
        {
            "teacher.example.org:50051": f"localhost:{port}", "teacher.example.org 10.0.0.5": "localhost 127.0.0.1",
            "0.0.0.0:50051": f"0.0.0.0:{port}", "--nproc-per-node=8": "--nproc-per-node=2",
            "runs/mine/teacher/model.safetensors": str(teacher(folder.parent / "teacher.safetensors", len(CLASSES))),
        },
    )  # fmt: skip
    keys, served, student = (page.take(word, 1)[0] for word in ("make_keys", r"teacher_server\.main", "torchrun"))
    assert page.left == []
    stranger = ".venv/bin/python student_trainer/" + student.partition("student_trainer/")[2]
    stranger = stranger.replace("--teacher.token-file keys/token", "--run-dir runs/stranger")
    said = typed(
        [
            keys,
            ".venv/bin/funmatch prepare folder --source pictures --out data/mine",
            in_background(served, "teacher.log"),
            tiny(student),
            f"! {tiny(stranger)}",
            CLOSED,
        ],
        folder, 600,
    )  # fmt: skip
    assert "Traceback" not in said
    assert ended_well(folder / "teacher.log")
    assert "token" in said.splitlines()[-1]


def test_recipes_are_listed_explained_and_run_as_their_page_has_it(folder):
    """All of the page but a run that README has, too."""
    port = free_port()
    flowers(folder / "archives")
    page = Page("docs/recipes.md", {"50051": str(port)})
    page.take("imagenet/ensemble/9600 --tiny", 1)
    listed, explained = page.take(r"student_trainer\.recipes", 2)
    student = page.take("funmatch train", 1)[0]
    assert page.left == []
    weights = teacher(folder.parent / "teacher.safetensors", 102)
    said = typed(
        [
            "source .venv/bin/activate",
            "funmatch prepare flowers102 --source archives --out data/flowers102",
            in_background(f"funmatch serve --model {weights} --data data/flowers102 --address 127.0.0.1:{port}"),
            listed,
            explained,
            tiny(student),
            CLOSED,
        ],
        folder, 600,
    )  # fmt: skip
    assert "Traceback" not in said
    assert "imagenet/funmatch/9600" in said and "section 3.2" in said


TENSORBOARD = """tensorboard() {
  command tensorboard "$@" --port %d > tensorboard.log 2>&1 &
  until python -c "import urllib.request as web; web.urlopen('http://127.0.0.1:%d')" 2> /dev/null
  do kill -0 $! || return 1; sleep 0.5; done
  kill $!
}"""
"""Serves until it has answered, and not until somebody stops it."""


def test_getting_started_works_as_written(folder):
    """All of the page, the demo in small."""
    port = free_port()
    blocks = [block.text for block in blocks_of("docs/getting-started.md")]
    said = typed([TENSORBOARD % (port, port), *blocks], folder, 600, **make_demo_with("--tiny"))
    rows = re.findall(
        r"^\| ([^|`]+?) \| [\d.]+ ", (ROOT / "docs" / "getting-started.md").read_text().replace("\\|", "¦"), re.M
    )
    assert len(rows) == 5
    assert [row for row in rows if row.replace("¦", "|") not in said] == []
    for name in ("report.png", "report.html", "metrics.jsonl", "summary.json"):
        assert (folder / "runs" / "demo" / name).is_file()


def test_the_demo_on_flowers_works_as_the_readme_has_it(folder):
    archives = flowers(folder.parent / "archives")
    page = Page("README.md", {"SOURCE=/archives": f"SOURCE={archives}"})
    said = typed(page.take("^make demo DATA=", 1), folder, 600, **make_demo_with(TINY))
    assert "Traceback" not in said
    assert (folder / "runs/demo-flowers102/report.png").is_file()
    assert json.loads((folder / "runs/demo-flowers102/summary.json").read_text())["view_mismatch_max"] == 0
