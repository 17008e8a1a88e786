"""The eight view settings: what teacher and student see, of what law and from which stream."""

import dataclasses

import numpy as np
import pytest

from views.draw import Plan, ViewLaw
from views.setting import SETTINGS, FixedViews, ViewSetting

NUM = 40
HEIGHT = np.random.default_rng(1).integers(60, 500, NUM).astype(np.int32)
WIDTH = np.random.default_rng(2).integers(60, 500, NUM).astype(np.int32)


def plans(setting: ViewSetting) -> tuple[Plan, Plan]:
    """The student's plan and its teacher's, as the training loop makes them."""
    student = Plan(seed=5, batch_size=NUM, law=setting.student, samples=range(NUM), height=HEIGHT, width=WIDTH)
    return student, dataclasses.replace(student, stream="teacher") if setting.kind == "ind" else student


@pytest.mark.parametrize(
    ("setting", "student", "teacher"),
    [
        ("fix/rs", "rs", "rs"),
        ("fix/cc", "rc", "cc"),
        ("fix/ic_ens", "ic", "ic"),
        ("ind/rc", "rc", None),
        ("ind/ic", "ic", None),
        ("same/rc", "rc", None),
        ("same/ic", "ic", None),
        ("same/ic+mix", "ic", None),
    ],
)
def test_each_setting_has_the_papers_crops(setting, student, teacher):
    chosen = ViewSetting(setting=setting)
    assert chosen.student.crop == student
    assert chosen.student.mixup == setting.endswith("+mix")
    assert chosen.student.flip == (student in ("rc", "ic")), "a whole picture is shown as it is"
    if teacher:
        assert chosen.fixed.law.crop == teacher
        assert chosen.fixed.num_views == (1000 if setting == "fix/ic_ens" else 1)
    else:
        with pytest.raises(ValueError, match=f"{setting.replace('+', '.')} has no fixed views"):
            _ = chosen.fixed


def test_the_names_are_the_papers_eight():
    assert len(SETTINGS) == 8
    for name in SETTINGS:
        ViewSetting(setting=name)


@pytest.mark.parametrize("setting", ["same/rc", "same/ic", "same/ic+mix"])
def test_with_same_the_teacher_sees_the_very_rows_of_the_student(setting):
    student, teacher = plans(ViewSetting(setting=setting))
    assert teacher is student


@pytest.mark.parametrize("setting", ["ind/rc", "ind/ic", "ind/ic+mix"])
def test_with_ind_the_pictures_are_the_same_and_the_crops_independent(setting):
    student, teacher = plans(ViewSetting(setting=setting))
    both_flipped, equal_boxes, offsets = [], 0, []
    for step in range(60):
        ours, theirs = student.rows(step), teacher.rows(step)
        for same in ("sample", "partner", "lam"):
            assert np.array_equal(getattr(ours, same), getattr(theirs, same))
        both_flipped.append(ours.flip == theirs.flip)
        equal_boxes += int((ours.box == theirs.box).all(axis=1).sum())
        order = np.argsort(ours.sample)
        offsets.append(np.stack([ours.box[order, 0], theirs.box[order, 0]]))
    assert abs(np.mean(both_flipped) - 0.5) < 0.05
    assert equal_boxes < 0.01 * 60 * NUM
    deviations = np.stack(offsets) - np.mean(offsets, axis=0)  # both sides' boxes fit into the same picture
    assert abs(np.corrcoef(deviations.transpose(1, 0, 2).reshape(2, -1))[0, 1]) < 0.06


def test_with_ind_both_crops_follow_one_law():
    student, teacher = plans(ViewSetting(setting="ind/ic"))
    areas = [[], []]
    for step in range(100):
        for side, plan in enumerate((student, teacher)):
            rows = plan.rows(step)
            areas[side].append(rows.box[:, 2] * rows.box[:, 3] / (HEIGHT[rows.sample] * WIDTH[rows.sample]))
    ours, theirs = (np.sort(np.concatenate(side)) for side in areas)
    assert np.abs(ours - theirs).max() < 0.05


def test_the_crops_of_an_ensemble_belong_to_the_picture_alone():
    views = ViewSetting(setting="fix/ic_ens", num_crops=7).fixed
    alone = views.rows(np.array([3]), HEIGHT, WIDTH)
    among = views.rows(np.array([9, 3, 4]), HEIGHT, WIDTH)
    assert len(among) == 21
    assert among.sample.tolist() == [9] * 7 + [3] * 7 + [4] * 7
    assert np.array_equal(among.box[7:14], alone.box) and np.array_equal(among.flip[7:14], alone.flip)
    assert len(np.unique(alone.box, axis=0)) > 1
    more = dataclasses.replace(views, num_views=9).rows(np.array([3]), HEIGHT, WIDTH)
    assert np.array_equal(more.box[:7], alone.box)


def test_an_ensembles_crops_are_none_that_a_run_of_the_same_seed_trains_on():
    views = ViewSetting(setting="fix/ic_ens", num_crops=50).fixed
    boxes = views.rows(np.arange(NUM), HEIGHT, WIDTH).box.reshape(NUM, 50, 4)
    plan = Plan(seed=0, batch_size=NUM, law=ViewLaw(mixup=False), samples=range(NUM), height=HEIGHT, width=WIDTH)
    trained = np.zeros((NUM, 50, 4), np.int32)
    for step in range(50):
        rows = plan.rows(step)
        trained[rows.sample, step] = rows.box
    assert (boxes == trained).all(axis=2).mean() < 0.01


def test_the_facts_of_fixed_views_name_what_can_change_an_answer_and_nothing_else():
    def facts(**numbers):
        setting = numbers.pop("setting", "fix/ic_ens")
        return ViewSetting(setting=setting, **numbers).fixed.facts()

    assert facts() != facts(num_crops=10) != facts(min_area=0.1)
    assert facts() != facts(average="logits")
    assert facts() != facts(flip=False)
    assert facts(setting="fix/rs") == facts(setting="fix/rs", num_crops=3, min_area=0.2, keep=0.5, average="logits")
    assert facts(setting="fix/cc") != facts(setting="fix/cc", keep=0.5)


def test_fixed_views_cannot_be_mixed():
    with pytest.raises(ValueError, match="not mixed"):
        FixedViews(law=ViewLaw(crop="ic", mixup=True))


@pytest.mark.parametrize("wrong", ["fix/ic", "fix/cc+mix", "ind/rs", "same/xx", "mix", "", "same/ic+", "fix/rs+mix"])
def test_an_unknown_setting_is_refused_with_the_papers_listed(wrong):
    with pytest.raises(ValueError, match=r"there is no view setting .*fix/ic_ens.*same/ic\+mix"):
        ViewSetting(setting=wrong)
