"""Recipes, overrides, and what is said about a wrong setting."""

import subprocess
import sys
from pathlib import Path

import pytest

import student_trainer.main as door
from student_trainer.config import FREE_ON_RESUME, flag, settings
from student_trainer.recipes import RECIPES
from views.setting import ViewSetting

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_full_config_under_its_own_name(name):
    config, is_tiny = door.parse(["--recipe", name])
    assert config.recipe == name
    assert not is_tiny
    assert config == RECIPES[name].config
    assert RECIPES[name].says


def test_settings_of_the_command_line_replace_those_of_the_recipe():
    config, _ = door.parse([
        "--recipe=digits/demo", "--optim.lr", "0.5", "--views.setting=ind/rc", "--data", "/x",
        "--teacher", "a:1,b:1", "unix:/c", "--student.weights=w.npz",
    ])  # fmt: skip
    assert config.optim.lr == 0.5
    assert config.views == ViewSetting(setting="ind/rc")
    assert config.data.root == Path("/x")
    assert config.teacher.addresses == ("a:1,b:1", "unix:/c")
    assert config.student.weights == "w.npz"
    assert config.optim.batch_size == RECIPES["digits/demo"].config.optim.batch_size


def test_an_unknown_setting_is_refused_with_the_known_ones_listed():
    with pytest.raises(SystemExit) as refused:
        door.parse(["--recipe=digits/demo", "--optim.learning-rate=3"])
    words = str(refused.value)
    assert "unknown setting --optim.learning-rate" in words
    for known in settings(RECIPES["digits/demo"].config):
        assert flag(known) in words


@pytest.mark.parametrize(("typed", "meant"), [("--optim.l", "--optim.lr"), ("--optim.batchsize", "--optim.batch-size")])
def test_a_near_miss_is_guessed(typed, meant):
    with pytest.raises(SystemExit, match=rf"Did you mean .*{meant}"):
        door.parse(["--recipe=digits/demo", f"{typed}=3"])


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--optim.batch-size=0", "--optim.batch-size is 0; it must be greater than 0"),
        ("--optim.warmup-steps=1.5", "give whole steps, or a share of the run below 1"),
        ("--views.min-area=2", "min_area is 2.0"),
        ("--views.setting=fix/ic", "there is no view setting 'fix/ic'; the paper's are fix/rs, fix/cc"),
        ("--views.setting=fix/cc+mix", "+mix goes with same/ and ind/"),
        ("--recipe=nope", "no recipe is called 'nope'"),
    ],
)
def test_a_setting_out_of_range_is_refused_in_a_sentence(argument, sentence, capsys):
    with pytest.raises(SystemExit) as refused:
        door.parse(["--recipe=digits/demo", argument])
    words = str(refused.value) + " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert sentence in words


def test_what_may_change_on_resume_are_settings_that_exist():
    assert set(settings(RECIPES["digits/demo"].config)) >= FREE_ON_RESUME


def test_the_door_opens_from_any_folder_and_without_this_folder_on_the_path(tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "student_trainer" / "main.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "which recipe?" in run.stderr
    for name in RECIPES:
        assert name in run.stderr
