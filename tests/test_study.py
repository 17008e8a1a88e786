"""The study with few steps: every setting and seed is a run, and a finished one stays; `make study` does all of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import models
from conftest import random_teacher
from data_prep.prepare import prepare
from typed import Page, clone, flowers, make_with, typed
from views.setting import SETTINGS

pytestmark = [pytest.mark.suite, pytest.mark.timeout(1200)]

SOME, SEEDS = ("same/ic+mix", "ind/rc", "fix/ic_ens"), ("0", "1")
FEW_STEPS = ("--optim.epochs", "0.5", "--optim.warmup-steps", "2", "--views.num-crops", "4", "--device", "cpu")


def study(folder: Path, *options: str) -> str:
    """What the command says; it must end with 0."""
    command = [
        sys.executable, "-m", "funmatch.main", "study", "--recipe", "digits/demo", "--data", folder / "digits",
        "--teacher", folder / "teacher.safetensors", "--out", folder / "study", *options, "--", *FEW_STEPS,
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def runs_of(said: str) -> set[str]:
    """The runs that were done just now."""
    return set(re.findall(r"^(\S+, seed \d): [\d.]+ min$", said, re.M))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Digits, and a teacher of them."""
    prepare("digits", None, tmp_path / "digits", workers=1, progress=False)
    half = (0.5, 0.5, 0.5)
    random_teacher(tmp_path / "teacher.safetensors", 3, 32, half, half, "", 10)
    return tmp_path


def test_every_setting_and_seed_is_a_run_and_an_interrupted_study_goes_on(folder):
    first = study(folder, "--settings", *SOME[:1], "--seeds", *SEEDS)
    assert runs_of(first) == {f"{SOME[0]}, seed {seed}" for seed in SEEDS}
    rest = study(folder, "--settings", *SOME, "--seeds", *SEEDS)
    assert runs_of(rest) == {f"{setting}, seed {seed}" for setting in SOME[1:] for seed in SEEDS}
    finished = {path.parent.relative_to(folder / "study"): json.loads(path.read_text())
                for path in (folder / "study").rglob("summary.json")}  # fmt: skip
    assert set(map(str, finished)) == {f"{setting.replace('/', '_')}/seed_{seed}" for setting in SOME for seed in SEEDS}
    table = (folder / "study" / "study.md").read_text()
    assert all(setting in table for setting in SOME)
    assert (folder / "study" / "study.png").stat().st_size > 10_000


def test_make_study_works_as_the_readme_has_it(tmp_path):
    """Flowers, its teacher fine-tuned from a file, then all settings with both seeds; 96 pictures, six steps a run."""
    weights = tmp_path / "lite0.safetensors"
    network = models.create("tf_efficientnet_lite0", 1000)
    half = (0.5, 0.5, 0.5)
    models.save(weights, network, models.ModelCard(
        architecture="tf_efficientnet_lite0", num_classes=1000, size=64, mean=half, std=half, data_set=""
    ))  # fmt: skip
    archives = flowers(tmp_path / "archives")
    folder = clone(tmp_path / "funmatch")
    choices = {"/archives WEIGHTS=tf_efficientnet_lite0.safetensors": f"{archives} WEIGHTS={weights}"}
    few = "2 --optim.warmup-steps 1 --optim.batch-size 32 --views.num-crops 4"
    said = typed(
        Page("README.md", choices).take("^make study", 1), folder, 1100, **make_with(STUDY="runs/study", EPOCHS=few)
    )
    assert "Traceback" not in said
    assert runs_of(said) == {f"{setting}, seed {seed}" for setting in SETTINGS for seed in (0, 1)}
    table = (folder / "runs" / "study" / "study.md").read_text()
    assert all(setting in table for setting in SETTINGS)
