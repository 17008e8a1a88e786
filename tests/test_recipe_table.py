"""The recipes against recipe_table.csv: the paper's numbers, written down without looking at the recipes' code.

A column is a fact of a run; an empty cell is one that neither the paper nor its code gives, and that the recipe chose.
`source` names the sections of the collected facts: 1.0 where paper and code differ (`note` says which is followed), 1.1
view settings, 1.5 the table of hyperparameters, 1.7 other experiments, 1.8 results. n_train is a fact of the data set;
steps follow from it. top1 is in percent. `setting` is a pattern: for learning from labels only the student's half is
looked at.
"""

from __future__ import annotations

import csv
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from models.zoo import PREFIX, released
from student_trainer.config import Config
from student_trainer.recipes import RECIPES, Recipe
from student_trainer.schedule import num_steps

TABLE = list(csv.DictReader((Path(__file__).parent / "recipe_table.csv").read_text().splitlines()))
NEVER_CLIPS = 1e6  # a global norm that no gradient has
NO_FACTS_OF_A_RUN = {"recipe", "source", "note"}


def number_of(text: str) -> float:
    return float(text)


def numbers_of(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def yes_or_no(text: str) -> bool:
    return {"yes": True, "no": False}[text]


def teacher_px(config: Config) -> list[float]:
    return [config.teacher.size or released(name).size for name in config.teacher.model]


def facts(recipe: Recipe, n_train: int) -> dict[str, object]:
    """What the recipe resolves to, under the table's names."""
    config = recipe.config
    optim, views, student = config.optim, config.views, config.student
    return {
        "setting": views.setting, "targets": config.targets, "student": student.architecture,
        "student_px": student.size, "teacher": [name.removeprefix(PREFIX) for name in config.teacher.model],
        "teacher_px": teacher_px(config), "ensemble": config.teacher.ensemble, "data": config.data.root.name,
        "evaluate_on": (config.data.evaluate_root or config.data.root).name, "train": config.data.train,
        "evaluate": config.data.evaluate, "n_train": n_train, "batch": optim.batch_size, "epochs": optim.epochs,
        "steps": num_steps(optim.epochs, n_train, optim.batch_size), "lr": optim.lr, "wd": optim.weight_decay,
        "T": optim.temperature, "warmup": optim.warmup_steps, "optimizer": optim.optimizer, "decay": optim.decay,
        "stairs": list(optim.stairs), "momentum": optim.momentum, "clip": optim.clip_norm, "mu": optim.mu_dtype,
        "weights": student.weights or "scratch", "zero_head": student.zero_head,
        "interpolation": student.interpolation, "antialias": student.antialias, "mixup_alpha": views.mixup_alpha,
        "keep": views.keep, "min_area": views.min_area, "num_crops": views.num_crops,
        "eval_crop": config.data.eval_crop, "eval_keep": config.data.eval_keep, "top1": recipe.expected,
    }  # fmt: skip


def agrees(name: str, found: object, cell: str) -> bool:
    if name == "setting":
        return fnmatchcase(str(found), cell)
    if cell == "none":  # clip
        return found >= NEVER_CLIPS
    if name == "teacher":
        return sorted(found) == sorted(cell.split())  # the members of an ensemble have no order
    if name == "teacher_px":
        return sorted(found) == sorted(numbers_of(cell))
    if name == "stairs":
        return found == pytest.approx(numbers_of(cell))
    if isinstance(found, bool):
        return found is yes_or_no(cell)
    if isinstance(found, int | float):
        return found == pytest.approx(number_of(cell), rel=1e-9)
    return found == cell


@pytest.mark.parametrize("row", TABLE, ids=[row["recipe"] for row in TABLE])
def test_a_recipe_resolves_to_the_numbers_of_the_paper(row):
    found = facts(RECIPES[row["recipe"]], int(row["n_train"]))
    assert set(found) == set(row) - NO_FACTS_OF_A_RUN, "a column of the table that is not compared"
    differing = [
        f"{name}: {found[name]} in the recipe, {cell} in the table"
        for name, cell in row.items()
        if name not in NO_FACTS_OF_A_RUN and cell and not agrees(name, found[name], cell)
    ]
    assert not differing, "\n".join(differing)


def test_every_experiment_of_the_paper_is_a_recipe_and_no_recipe_claims_to_be_another():
    of_the_paper = {name for name, recipe in RECIPES.items() if recipe.section}
    assert of_the_paper == {row["recipe"] for row in TABLE}


def test_steps_are_given_with_the_epochs_that_make_them():
    """A check of the table itself: its numbers of steps were copied, not computed."""
    for row in TABLE:
        if row["steps"] and row["epochs"]:
            assert round(float(row["epochs"]) * int(row["n_train"]) / int(row["batch"])) == int(row["steps"]), row
