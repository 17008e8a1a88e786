"""Every recipe resolves, is listed, and runs in its tiny form (in `make suite`)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.index import Index
from models.zoo import PREFIX, released
from student_trainer.config import override
from student_trainer.recipes import RECIPES
from student_trainer.tiny import SHRINKS, make_parts, teacher_sizes, tiny
from student_trainer.train import train
from student_trainer.world import World
from teacher_server.config import Config as ServerConfig
from teacher_server.server import create_server

ROOT = Path(__file__).resolve().parents[1]


class Teachers:
    """Servers in this process, one for each weight file. They have the digits; other pictures travel as files."""

    def __init__(self, cleanup: contextlib.ExitStack) -> None:
        self._cleanup = cleanup
        self._addresses: dict[str, str] = {}

    def address(self, model: str, data: Path) -> str:
        if model not in self._addresses:
            server, address = create_server(
                ServerConfig(model=model, data=(data,), address="127.0.0.1:0", device="cpu", threads=1, batch_rows=16)
            )
            self._cleanup.callback(server.drain)
            server.load()
            self._addresses[model] = address
        return self._addresses[model]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiny_recipes")


@pytest.fixture(scope="module")
def teachers():
    with contextlib.ExitStack() as cleanup:
        yield Teachers(cleanup)


def run_tiny(name: str, folder: Path, teachers: Teachers) -> None:
    config = tiny(RECIPES[name].config, folder)
    make_parts(config, folder)
    if config.targets == "teacher":
        addresses = tuple(teachers.address(model, folder / "digits") for model in config.teacher.model)
        config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, addresses=addresses))
    summary = train(dataclasses.replace(config, device="cpu"), World())
    num_steps = 26 if config.optim.optimizer == "shampoo" else 8
    assert summary["steps"] == num_steps
    pictures = Index.open(config.data.evaluate_root or config.data.root)
    assert summary["examples"] == len(pictures.splits[config.data.evaluate])
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == num_steps
    assert all(math.isfinite(line["loss"]) and line["loss"] >= 0 for line in lines)
    if config.targets == "teacher" and config.views.kind != "fix":
        assert summary["view_mismatch_max"] == 0


@pytest.mark.suite
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_in_its_tiny_form(name, folder, teachers):
    run_tiny(name, folder, teachers)


@pytest.mark.suite
def test_tiny_on_the_command_line_makes_what_it_needs_and_says_what_it_shrinks(tmp_path):
    command = [sys.executable, ROOT / "student_trainer" / "main.py", "--recipe", "pets/transfer", "--tiny"]
    run = subprocess.run([*command, "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(SHRINKS)
    metrics = tmp_path / "runs" / "tiny" / "runs" / "pets" / "transfer" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 8


def test_nothing_is_made_up_in_place_of_what_the_command_line_names(tmp_path):
    config = tiny(RECIPES["imagenet/bit_init/300"].config, tmp_path / "tiny")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, root=tmp_path / "mine"),
        teacher=dataclasses.replace(config.teacher, model=(str(tmp_path / "teacher_32.safetensors"),)),
        student=dataclasses.replace(config.student, weights="bit:BiT-M-R50x1"),
    )
    make_parts(config, tmp_path / "tiny")
    assert [path.name for path in tmp_path.rglob("*")] == ["tiny"]


def test_tiny_keeps_what_makes_a_recipe_that_recipe():
    for recipe in RECIPES.values():
        whole, small = recipe.config, tiny(recipe.config)
        kept = ("targets", "seed", "precision", "channels_last")
        assert all(getattr(whole, name) == getattr(small, name) for name in kept)
        assert (whole.views.setting, whole.views.mixup_alpha) == (small.views.setting, small.views.mixup_alpha)
        for name in ("optimizer", "decay", "stairs", "lr", "weight_decay", "temperature", "clip_norm", "mu_dtype"):
            assert getattr(whole.optim, name) == getattr(small.optim, name), name
        assert whole.teacher.ensemble == small.teacher.ensemble
        assert len(teacher_sizes(whole)) == len(small.teacher.model)
        assert bool(whole.student.weights) == bool(small.student.weights)
        assert ("gn" in whole.student.architecture) == ("gn" in small.student.architecture)


def test_views_of_teacher_and_student_shrink_in_proportion():
    config = tiny(RECIPES["imagenet/ensemble/9600"].config)
    assert [Path(model).stem for model in config.teacher.model] == ["teacher_55", "teacher_32"]
    config = tiny(RECIPES["imagenet/t224_s160/funmatch/300"].config)
    assert [Path(model).stem for model in config.teacher.model] == ["teacher_45"]


def test_released_files_that_recipes_name_are_of_the_right_kind_and_size():
    for recipe in RECIPES.values():
        config = recipe.config
        files = [released(model) for model in config.teacher.model]
        if recipe.section and not recipe.name.startswith("imagenet/"):
            assert all(file.size == config.student.size for file in files), recipe.name
        assert all(file.architecture == "resnetv2_152x2_bit" for file in files), recipe.name
        if config.student.weights.startswith(PREFIX):
            assert released(config.student.weights).architecture == config.student.architecture, recipe.name


def test_the_list_names_every_recipe_with_its_section_and_number():
    run = subprocess.run([sys.executable, "-m", "student_trainer.recipes"], cwd=ROOT, capture_output=True, text=True,
                         check=True)  # fmt: skip
    listed = {line.split()[0]: line for line in run.stdout.splitlines() if "/" in line.partition(" ")[0]}
    for recipe in RECIPES.values():
        line = listed[recipe.name]
        assert recipe.section in line
        assert not recipe.expected or f"{recipe.expected:.2f}" in line
    assert max(map(len, run.stdout.splitlines())) <= 120


def test_one_recipe_is_explained_with_its_command_and_every_setting():
    run = subprocess.run(
        [sys.executable, "-m", "student_trainer.recipes", "sun397/funmatch/1k"], cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "torchrun student_trainer/main.py --recipe sun397/funmatch/1k" in run.stdout
    assert "code: lr 0.001; table 4: --optim.lr 0.003" in run.stdout
    assert "--views.no-fold-lambda" in run.stdout
    assert "--optim.weight-decay 0.0001" in run.stdout


def test_the_other_choice_is_one_setting_away():
    one_of_each = {choice: recipe for recipe in RECIPES.values() for choice in recipe.choices}
    for choice, recipe in one_of_each.items():
        for flag, value in re.findall(r"(--[\w.-]+\w)(?: ([\w./+]*\w))?", choice):
            value = [] if ".no-" in flag else ["8" if value == "NUM_DEVICES" else value]
            assert override(recipe.config, [flag, *value]) != recipe.config, (recipe.name, flag)


def test_a_recipe_of_the_papers_says_where_it_is_from():
    for recipe in RECIPES.values():
        family, _, name = recipe.name.partition("/")
        assert recipe.section or family == "own" or name.startswith(("demo", "laptop"))
