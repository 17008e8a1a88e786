"""The planner: its arithmetic against numbers worked by hand, its sentences, and that it measures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import plan
from benchmarks.capacity import Eye, Rates, answer, demand_of, with_cores
from protos.arrays import to_message
from student_trainer.recipes import RECIPES
from views.draw import Plan, ViewLaw
from views.wire import ask_encoded, ask_pixels


def eye(**changes) -> Eye:
    return Eye(**({"name": "T", "size": 224, "num_classes": 1000, "dtype": np.float16} | changes))


def demand(name: str = "imagenet/funmatch/9600", *teachers: Eye, ranks: int = 8):
    return demand_of(
        RECIPES[name].config, 1_255_544, teachers or [eye()], picture_bytes=110_000, ranks=ranks
    )  # fmt: skip


def rates(teachers=(3000.0,), student: float = 8250.0) -> Rates:
    return Rates(teachers=teachers, student=student, student_decodes=250.0, teacher_decodes=(250.0,) * len(teachers))


def test_the_paper_s_longest_run_by_hand():
    """9600 epochs of 1,255,544 pictures are 2,942,681 steps of 4096, each row once through each network."""
    wanted = demand()
    assert (wanted.steps, wanted.images) == (2_942_681, 2_942_681 * 4096)
    eight = answer(wanted, rates(), 8)
    assert eight.replicas == (22,), "8 x 8250 / 3000"
    assert eight.images_per_s == 66_000
    assert eight.wall_s == pytest.approx(12_053_221_376 / 66_000)
    assert eight.student_gpu_hours == pytest.approx(8 * eight.wall_s / 3600) == pytest.approx(405.83, abs=0.01)
    assert eight.teacher_gpu_hours == pytest.approx(22 * eight.wall_s / 3600)
    assert eight.gpu_hours == pytest.approx(30 * eight.wall_s / 3600)
    assert [answer(wanted, rates(), num).replicas for num in (1, 32)] == [(3,), (88,)], "2.75 a student, rounded up"


def test_as_many_teachers_as_needed_and_not_one_more_because_of_a_rounding():
    assert answer(demand(), rates((0.1,), 0.3), 1).replicas == (3,)
    assert answer(demand(), rates((0.1,), 0.3001), 1).replicas == (4,)


def test_a_request_of_64_mixed_rows_looks_at_65_views_and_a_rank_at_one_more_than_its_rows():
    (cost,) = demand().costs
    assert cost.views == 65 / 64
    assert demand(ranks=8).student_views == 513 / 512
    (unmixed,) = demand("imagenet/consistent/9600").costs
    assert unmixed.views == 1


def test_bytes_a_row_are_those_of_the_messages():
    sizes = np.full(5000, 400, np.int32)
    rows = (
        Plan(seed=3, batch_size=64, law=ViewLaw(), samples=range(5000), height=sizes, width=sizes).rows(7).take(0, 63)
    )
    assert rows.num_views == 64
    (cost,) = demand().costs
    files = ask_encoded(rows, [bytes(110_000)] * len(np.unique(rows.sample))).ByteSize() / 63
    assert cost.up["encoded"] == pytest.approx(files, rel=0.002)
    pixels = ask_pixels(rows, np.zeros((64, 224, 224, 3), np.uint8)).ByteSize() / 63
    assert cost.up["pixels"] == pytest.approx(pixels, rel=0.002)
    assert cost.up["reference"] < 80 and cost.down < 2048, "the goals of the table, row 8"
    logits = to_message(np.zeros((64, 1000), np.float16)).ByteSize() / 64
    assert logits < cost.down < logits + 4


def test_network_and_cores_follow_the_rows():
    wanted = demand()
    eight = answer(wanted, rates(), 8)
    (cost,) = wanted.costs
    assert eight.up["reference"] == pytest.approx(66_000 * cost.up["reference"])
    assert eight.down == pytest.approx(66_000 * cost.down)
    assert eight.up_each[0]["pixels"] == pytest.approx(3000 * cost.up["pixels"]), "22 replicas have 3000 rows/s each"
    assert eight.student_cores == pytest.approx(66_000 * 513 / 512 / 250)
    assert eight.teacher_cores[0] == pytest.approx(3000 * 65 / 64 / 250)


def test_each_teacher_of_an_ensemble_has_its_own_replicas():
    wanted = demand("imagenet/ensemble/9600", eye(name="large", size=384), eye(name="small"))
    one = answer(wanted, rates((1000.0, 3000.0)), 1)
    assert one.replicas == (9, 3)
    assert one.down == pytest.approx(2 * 8250 * wanted.costs[0].down), "each row is asked at each"
    assert one.up_each[0]["pixels"] == pytest.approx(8250 / 9 * wanted.costs[0].up["pixels"])


def test_a_fixed_teacher_is_asked_once_for_a_picture_and_needs_no_gpu_afterwards():
    wanted = demand("imagenet/fixed/300")
    one = answer(wanted, rates(), 1)
    assert one.replicas == (0,) and one.down == 0 and one.up["reference"] == 0
    assert one.fill_gpu_s == pytest.approx(1_255_544 / 3000)
    assert one.teacher_gpu_hours == pytest.approx(1_255_544 / 3000 / 3600)


def test_too_few_cores_bound_both_sides():
    wanted = demand()
    bounded = with_cores(wanted, rates(), 4)
    assert bounded.student == pytest.approx(4 * 250 * 512 / 513)
    assert bounded.teachers[0] == pytest.approx(4 * 250 * 64 / 65)
    assert with_cores(wanted, rates(), 100) == rates()


GIVEN = ["--teacher-rate", "3000", "--student-rate", "8250", "--decode-rate", "250"]


def test_one_screen_for_the_paper_s_run_and_the_same_numbers_as_json(capsys, tmp_path):
    file = tmp_path / "plan.json"
    plan.main(["--recipe", "imagenet/funmatch/9600", *GIVEN, "--json", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 120
    found = {line[:40].strip(): line[40:].split() for line in lines}
    assert found["teacher GPUs (2.75 a student)"] == ["3", "22", "88"]
    record = json.loads(file.read_text())
    assert [one["replicas"] for one in record["answers"]] == [[3], [22], [88]]
    assert record["demand"]["images"] == 2_942_681 * 4096
    assert record["sources"] == {"student": "given", "teacher": "given", "decode": "given"}


def test_settings_of_the_recipe_may_follow(capsys):
    plan.main(["--recipe", "imagenet/funmatch/9600", *GIVEN, "--gpus", "2", "--optim.epochs", "300"])
    assert "300 epochs of 1,255,544 pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--recipe", "imagenet/nobody"], "no recipe is called 'imagenet/nobody'"),
        (["--recipe", "imagenet/labels/adam/90"], "learns from labels and has no teacher"),
        (["--recipe", "imagenet/ensemble/1200", "--teacher-rate", "3000"], "--teacher-rate has 1 numbers.* 2 teachers"),
        (["--recipe", "digits/demo"], "does not name its teacher: give --teacher.model FILE"),
        (["--recipe", "digits/demo", "--teacher-rate", "-1"], "-1 is no rate: give a number above 0"),
        (["--recipe", "digits/demo", "--teacher-rate", "fast"], "invalid .* 'fast'"),
        (["--recipe", "imagenet/funmatch/30", "--gpus", "0"], "0 is no number of things: give 1 or more"),
    ],
)
def test_what_is_asked_wrongly_is_told_in_a_sentence(args, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        plan.main(args)
    assert ended.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    import re

    assert re.search(sentence, error)


def test_what_cannot_be_known_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"how many classes has its teacher\? Give --classes N"):
        plan.main(["--recipe", "digits/demo", *GIVEN])
    with pytest.raises(SystemExit, match=r"how many pictures has runs/data/digits\?.*--pictures N"):
        plan.main(["--recipe", "digits/demo", *GIVEN, "--classes", "10"])


@pytest.mark.suite
def test_rates_that_nobody_gives_are_measured(monkeypatch, tmp_path, capsys):
    """Two teachers at two sizes and a student, tiny, with pictures that are really decoded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "_MEASURED_S", 0.05)
    plan.main(["--recipe", "imagenet/ensemble/9600", "--tiny", "--gpus", "1", "--json", "plan.json"])
    record = json.loads((tmp_path / "plan.json").read_text())
    assert set(record["sources"].values()) == {"measured on this CPU"}
    assert [one["size"] for one in record["demand"]["teachers"]] == [55, 32]
    assert record["demand"]["steps"] == 8 and record["demand"]["num_pictures"] == 1198
    found = record["rates"]
    assert min(*found["teachers"], found["student"], found["student_decodes"], *found["teacher_decodes"]) > 1
    assert found["teachers"][0] < found["teachers"][1], "the larger view takes longer"
    assert "images" in capsys.readouterr().out
