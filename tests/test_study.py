"""benchmarks/study.py with digits and few steps: every setting and seed is a run, and a finished one stays."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import random_teacher
from data_prep.prepare import prepare

pytestmark = [pytest.mark.suite, pytest.mark.timeout(600)]

SETTINGS, SEEDS = ("same/ic+mix", "ind/rc", "fix/ic_ens"), ("0", "1")
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
    first = study(folder, "--settings", *SETTINGS[:1], "--seeds", *SEEDS)
    assert runs_of(first) == {f"{SETTINGS[0]}, seed {seed}" for seed in SEEDS}
    rest = study(folder, "--settings", *SETTINGS, "--seeds", *SEEDS)
    assert runs_of(rest) == {f"{setting}, seed {seed}" for setting in SETTINGS[1:] for seed in SEEDS}
    finished = {path.parent.relative_to(folder / "study"): json.loads(path.read_text())
                for path in (folder / "study").rglob("summary.json")}  # fmt: skip
    assert set(map(str, finished)) == {
        f"{setting.replace('/', '_')}/seed_{seed}" for setting in SETTINGS for seed in SEEDS
    }
    table = (folder / "study" / "study.md").read_text()
    assert all(setting in table for setting in SETTINGS)
    assert (folder / "study" / "study.png").stat().st_size > 10_000
