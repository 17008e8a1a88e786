"""Whole runs of the loop, in this process, with real teacher servers, against slow direct computations in float64.

The direct computation knows nothing of DALI, gRPC, batches or stores: Pillow decodes, numpy interpolates, one picture
at a time goes through the network.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import models
import reference_render
from conftest import NUM_CLASSES, photograph, serve
from data_prep.index import Index
from data_prep.prepare import prepare
from student_trainer.config import Config, DataConfig, OptimConfig, StudentConfig, TeacherConfig
from student_trainer.fleet import TeacherRefusedError
from student_trainer.train import train
from student_trainer.world import World
from views.draw import Plan, ViewLaw
from views.setting import FixedViews, ViewSetting
from views.view import Rows

BATCH, STEPS = 8, 3


@pytest.fixture(scope="module")
def other_pictures(tmp_path_factory) -> Path:
    """A data set of another kind: 12 pictures in 3 classes of its own."""
    folder = tmp_path_factory.mktemp("other")
    rng = np.random.default_rng(9)
    for number in range(15):
        path = folder / "others" / ("val" if number % 5 == 4 else "train") / f"kind_{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(rng, *rng.integers(40, 100, 2)).save(path, quality=90)
    prepare("folder", folder / "others", folder / "prepared", workers=1, progress=False)
    return folder / "prepared"


def a_run(data: Path, addresses: tuple[str, ...], folder: Path, **settings) -> Config:
    return Config(
        recipe="test",
        run_dir=folder / "run",
        data=DataConfig(root=data, evaluate="val", evaluate_root=settings.pop("evaluate_root", None)),
        views=ViewSetting(**settings.pop("views", {})),
        student=StudentConfig(architecture="resnetv2_14x05_bit", size=settings.pop("student_size", 32)),
        teacher=TeacherConfig(addresses=addresses, store=str(folder / "logits"), **settings.pop("teacher", {})),
        optim=OptimConfig(
            batch_size=BATCH, epochs=STEPS * BATCH / len(Index.open(data).splits["train"]), warmup_steps=1, lr=1e-3,
            temperature=settings.pop("temperature", 1.0),
        ),
        device="cpu", decode_threads=1, evaluate_every=0, **settings,
    )  # fmt: skip


def lines(config: Config) -> list[dict]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def direct_logits(model_file: Path, index: Index, rows: Rows) -> np.ndarray:
    """What a teacher says of rows [R, K]: picture by picture, in float64."""
    model, card = models.load(model_file)
    model = model.eval().double()
    views = [
        reference_render.render(index.read([int(sample)])[0], box, card.size, bool(flip)) / 255.0
        for sample, box, flip in zip(rows.sample, rows.box, rows.flip, strict=True)
    ]
    answers = []
    for row, (partner, lam) in enumerate(zip(rows.partner, rows.lam.astype(np.float64), strict=True)):
        mixed = (lam * views[row] + (1 - lam) * views[partner] - card.mean) / np.array(card.std)
        with torch.no_grad():
            answers.append(model(torch.from_numpy(mixed.transpose(2, 0, 1)[None])).numpy()[0])
    return np.stack(answers)


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def loss_of_a_student_that_knows_nothing(teacher: np.ndarray, temperature: float = 1.0) -> float:
    """T^2 KL(teacher || uniform): a head of zeros says the same of everything."""
    p = softmax(teacher / temperature)
    return float(temperature**2 * (p * (np.log(p) + np.log(p.shape[-1]))).sum(-1).mean())


def first_rows(config: Config, stream: str = "student") -> tuple[Index, Rows]:
    index = Index.open(config.data.root)
    plan = Plan(seed=config.seed, batch_size=BATCH, law=config.views.student, samples=index.splits["train"],
                height=index.height, width=index.width, stream=stream)  # fmt: skip
    return index, plan.rows(0)


@pytest.mark.parametrize(
    ("setting", "stream"),
    [("same/rc", "student"), ("same/ic", "student"), ("same/ic+mix", "student"), ("ind/rc", "teacher"),
     ("ind/ic", "teacher"), ("ind/ic+mix", "teacher")],
)  # fmt: skip
def test_the_teacher_sees_the_views_of_its_setting(tiny_data, tiny_model, tmp_path, setting, stream):
    with serve((tiny_model, tiny_data)) as addresses:
        config = a_run(tiny_data, addresses, tmp_path, views={"setting": setting}, temperature=2.0)
        summary = train(config, World())
    index, rows = first_rows(config, stream)
    direct = loss_of_a_student_that_knows_nothing(direct_logits(tiny_model, index, rows), 2.0)
    assert lines(config)[0]["loss"] == pytest.approx(direct, rel=2e-3)
    assert summary["view_mismatch_max"] == 0
    assert not (tmp_path / "logits").exists(), "a run with new views at every step has no store"


@pytest.mark.parametrize("setting", ["fix/rs", "fix/cc"])
def test_a_fixed_teacher_says_of_each_picture_what_it_said_of_the_fixed_view(tiny_data, tiny_model, tmp_path, setting):
    with serve((tiny_model, tiny_data)) as addresses:
        config = a_run(tiny_data, addresses, tmp_path, views={"setting": setting})
        train(config, World())
    index, rows = first_rows(config)
    fixed = config.views.fixed.rows(rows.sample, index.height, index.width)
    direct = loss_of_a_student_that_knows_nothing(direct_logits(tiny_model, index, fixed))
    assert lines(config)[0]["loss"] == pytest.approx(direct, rel=2e-3)
    assert {line["recomputed_share"] for line in lines(config)} == {0.0}


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_fix_ic_ens_averages_the_teacher_over_the_pictures_crops(tiny_data, tiny_model, tmp_path, average):
    views = {"setting": "fix/ic_ens", "num_crops": 5, "average": average}
    with serve((tiny_model, tiny_data)) as addresses:
        config = a_run(tiny_data, addresses, tmp_path, views=views)
        train(config, World())
    index, rows = first_rows(config)
    every = direct_logits(tiny_model, index, config.views.fixed.rows(rows.sample, index.height, index.width))
    crops = every.reshape(BATCH, 5, NUM_CLASSES)
    mean = crops.mean(axis=1) if average == "logits" else np.log(softmax(crops).mean(axis=1))
    assert lines(config)[0]["loss"] == pytest.approx(loss_of_a_student_that_knows_nothing(mean), rel=2e-3)


def test_cross_resolution_shows_both_the_same_box_each_at_its_own_size(tiny_data, large_model, tmp_path):
    """T48 -> S24, as T384 -> S224: the box is cut from the original twice, never one view from the other."""
    with serve((large_model, tiny_data)) as addresses:
        config = a_run(tiny_data, addresses, tmp_path, student_size=24)
        summary = train(config, World())
    index, rows = first_rows(config)
    direct = loss_of_a_student_that_knows_nothing(direct_logits(large_model, index, rows))
    assert lines(config)[0]["loss"] == pytest.approx(direct, rel=2e-3)
    assert summary["view_mismatch_max"] == 0


@pytest.mark.parametrize("ensemble", ["logits", "probabilities", "sum_kl"])
def test_an_ensemble_of_two_sizes_is_averaged_as_said(tiny_data, tiny_model, large_model, tmp_path, ensemble):
    with serve((tiny_model, tiny_data), (large_model, tiny_data)) as addresses:
        config = a_run(tiny_data, addresses, tmp_path, teacher={"ensemble": ensemble})
        summary = train(config, World())
    index, rows = first_rows(config)
    answers = np.stack([direct_logits(model, index, rows) for model in (tiny_model, large_model)])
    if ensemble == "sum_kl":
        direct = sum(loss_of_a_student_that_knows_nothing(one) for one in answers)
    else:
        mean = answers.mean(0) if ensemble == "logits" else np.log(softmax(answers).mean(0))
        direct = loss_of_a_student_that_knows_nothing(mean)
    assert lines(config)[0]["loss"] == pytest.approx(direct, rel=2e-3)
    assert summary["view_mismatch_max"] == 0, "both teachers were audited"
    whole = FixedViews(law=ViewLaw(crop="cc", flip=False, mixup=False))
    val = whole.rows(np.array(index.splits["val"]), index.height, index.width)
    two = np.stack([direct_logits(model, index, val) for model in (tiny_model, large_model)])
    together = two.mean(0) if ensemble == "logits" else softmax(two).mean(0)
    assert summary["teacher_top1"] == pytest.approx((together.argmax(1) == index.label[val.sample]).mean())


def test_a_teacher_given_twice_is_no_ensemble(tiny_data, tiny_model, tmp_path):
    with serve((tiny_model, tiny_data)) as (address,):
        config = a_run(tiny_data, (address, address), tmp_path)
        with pytest.raises(TeacherRefusedError, match=f"one and the same.*--teacher {address},{address}"):
            train(config, World())


def test_out_of_domain_learns_from_other_pictures_and_is_judged_on_the_teachers(
    tiny_data, tiny_model, other_pictures, tmp_path
):
    with serve((tiny_model, tiny_data, other_pictures)) as addresses:
        config = a_run(other_pictures, addresses, tmp_path, evaluate_root=tiny_data)
        summary = train(config, World())
    index, rows = first_rows(config)
    assert len(index.classes) == 3, "other classes than the teacher's six"
    direct = loss_of_a_student_that_knows_nothing(direct_logits(tiny_model, index, rows))
    assert lines(config)[0]["loss"] == pytest.approx(direct, rel=2e-3)
    judged = Index.open(tiny_data)
    whole = FixedViews(law=ViewLaw(crop="cc", flip=False, mixup=False))
    val = whole.rows(np.array(judged.splits["val"]), judged.height, judged.width)
    teacher = direct_logits(tiny_model, judged, val).argmax(1)
    assert summary["examples"] == len(val)
    assert summary["teacher_top1"] == pytest.approx((teacher == judged.label[val.sample]).mean())


def test_out_of_domain_pictures_travel_as_files_to_a_teacher_that_has_only_its_own(
    tiny_data, tiny_model, other_pictures, tmp_path, capsys
):
    with serve((tiny_model, tiny_data)) as addresses:
        config = a_run(other_pictures, addresses, tmp_path, evaluate_root=tiny_data)
        summary = train(config, World())
    assert "pictures by encoded" in capsys.readouterr().out
    assert summary["view_mismatch_max"] == 0


def test_pictures_of_another_kind_need_the_teachers_data_set_named(tiny_data, tiny_model, other_pictures, tmp_path):
    with serve((tiny_model, tiny_data)) as addresses:
        config = a_run(other_pictures, addresses, tmp_path)
        with pytest.raises(ValueError, match=r"the teacher has 6 classes, .* 3: .*--data.evaluate-root"):
            train(config, World())


def test_fixed_constants_are_the_same_numbers_by_each_transport(tiny_data, tiny_model, tmp_path):
    losses = []
    with serve((tiny_model, tiny_data)) as addresses:
        for transport in ("reference", "encoded", "pixels"):
            config = a_run(tiny_data, addresses, tmp_path / transport, teacher={"transport": transport},
                           views={"setting": "fix/ic_ens", "num_crops": 3})  # fmt: skip
            train(config, World())
            losses.append([line["loss"] for line in lines(config)])
    assert losses[0] == losses[1] == losses[2]


def test_a_second_run_finds_the_constants_of_the_first(tiny_data, tiny_model, tmp_path, capsys):
    with serve((tiny_model, tiny_data)) as addresses:
        config = a_run(tiny_data, addresses, tmp_path, views={"setting": "fix/cc"})
        train(config, World())
        train(dataclasses.replace(config, run_dir=tmp_path / "again", seed=1), World())
    said = capsys.readouterr().out
    assert "0 pictures were there, 18 computed" in said
    assert "18 pictures were there, 0 computed" in said
