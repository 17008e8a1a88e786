import json
import math

import numpy as np
import pytest
from PIL import Image

from student_trainer.contact_sheet import first_batch_sheet
from student_trainer.metrics import Metrics
from student_trainer.report import bands, draw, main, print_table, series

SUMMARY = {
    "teacher_top1": 0.985,
    "student_top1": 0.9763,
    "agreement_top1": 0.9685,
    "kl": 0.0634,
    "steps": 1500,
    "images_seen": 96_000,
    "images_per_s": 903.21,
    "view_mismatch_max": 0,
}


def record(run_dir, num_steps, with_teacher=True, evaluate_every=10):
    with Metrics(run_dir) as metrics:
        for step in range(1, num_steps + 1):
            numbers = {"loss": 20 / step, "lr": 0.01, "images_per_s": 100.0, "student_entropy": 1.0}
            if with_teacher:
                numbers |= {"teacher_wait_s": 0.01, "teacher_entropy": 0.5, "agreement_top1": 0.5}
                numbers |= {"view_mismatch": 0}
            metrics.write(step, numbers if step != 3 else numbers | {"loss": math.nan})
            if step % evaluate_every == 0:
                scores = {"eval/student_top1": 0.5, "eval/student_xent": 1.0}
                if with_teacher:
                    scores |= {"eval/teacher_top1": 0.9, "eval/agreement_top1": 0.6}
                    scores |= {"eval/agreement_top5": 0.9, "eval/kl": 0.1}
                metrics.write(step, scores)


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def is_drawn(path) -> bool:
    pixels = pixels_of(path)
    return pixels.shape[0] > 300 and len(np.unique(pixels[..., 0])) > 20


def test_report_of_a_distillation_is_a_picture_and_a_table(tmp_path, capsys):
    record(tmp_path, 30)
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    plain_height = len(pixels_of(draw(tmp_path)))
    views = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    first_batch_sheet(tmp_path / "first_batch.png", views, views, ["row"] * 4)
    main([str(tmp_path)])
    assert is_drawn(tmp_path / "report.png")
    assert len(pixels_of(tmp_path / "report.png")) > plain_height, "the sheet is part of the picture"
    assert "student top-1" in capsys.readouterr().out


@pytest.mark.parametrize("num_steps", [1, 30])
def test_report_of_a_supervised_or_barely_started_run_works(tmp_path, num_steps, capsys):
    record(tmp_path, num_steps, with_teacher=False)
    main([str(tmp_path)])
    assert is_drawn(tmp_path / "report.png")
    assert "has not finished" in capsys.readouterr().out


def test_a_folder_without_a_run_is_refused_with_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "is it the folder of a run?" in capsys.readouterr().err


def test_the_table_is_aligned_and_holds_every_number_once(capsys):
    print_table(SUMMARY)
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("  ")[-1].strip() for line in lines[1:-1]] == [
        "98.50%", "97.63%", "96.85%", "0.0634 nats", "1,500", "96,000", "903.2", "0 of 255",
    ]  # fmt: skip


def test_a_supervised_table_says_nothing_of_a_teacher(capsys):
    print_table({"student_top1": 0.5, "teacher_top1": None, "kl": None, "steps": 10})
    assert "eacher" not in capsys.readouterr().out


def test_series_skips_lines_without_the_number_and_nulls():
    lines = [{"step": 1, "loss": 2.0}, {"step": 1, "eval/kl": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1}]
    loss = series(lines, "loss")
    assert (loss.step.tolist(), loss.value.tolist()) == ([1, 3], [2, 1])
    assert not series(lines, "absent")


@pytest.mark.parametrize("num_points", [1, 7, 1234])
def test_bands_hold_the_median_between_the_tenth_and_ninetieth_percentile(num_points):
    lines = [{"step": s, "x": float(v)} for s, v in enumerate(np.random.default_rng(0).normal(size=num_points))]
    step, low, middle, high = bands(series(lines, "x"), num_bins=10)
    assert len(step) == min(10, num_points)
    assert np.all(low <= middle) and np.all(middle <= high) and np.all(np.diff(step) > 0)
    first = [line["x"] for line in lines[: math.ceil(num_points / 10)]]
    assert middle[0] == pytest.approx(np.median(first))


def test_the_sheet_shows_each_sides_pixels_unchanged(tmp_path):
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], dtype=np.uint8)
    student = np.broadcast_to(colours[:, None, None], (3, 8, 8, 3))
    teacher = np.broadcast_to(255 - colours[:, None, None], (3, 16, 16, 3))
    mixed = (0.5 * student + 0.5 * np.roll(student, 1, axis=0)).astype(np.float32) / 255
    first_batch_sheet(tmp_path / "a.png", student, teacher, ["a", "b", "c" * 500], student_mixed=mixed)
    shown = {tuple(colour) for colour in pixels_of(tmp_path / "a.png").reshape(-1, 3).tolist()}
    for colour in (*colours.tolist(), *(255 - colours).tolist(), [115, 115, 30]):
        assert tuple(colour) in shown


def test_the_sheet_refuses_arrays_that_do_not_belong_together(tmp_path):
    views = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"teacher views have shape \(3, 8, 8, 3\), expected \[4, S, S, 3\]"):
        first_batch_sheet(tmp_path / "a.png", views, views[:3], [""] * 4)
    with pytest.raises(ValueError, match="3 captions for 4 rows"):
        first_batch_sheet(tmp_path / "a.png", views, None, [""] * 3)
