import dataclasses
import json
import math
import os
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from student_trainer.config import settings
from student_trainer.contact_sheet import first_batch_sheet
from student_trainer.curves import draw_curves, together, whole_and_short
from student_trainer.metrics import Metrics
from student_trainer.recipes import RECIPES
from student_trainer.record import Run, Series, groups, series, unit_of
from student_trainer.report import main, print_table
from student_trainer.run_picture import bands, draw

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


def a_run(folder, seed=0, setting="same/ic", num_steps=40, top1=0.4, facts=True, **settings):
    """A run's folder as the loop leaves it, without its pictures."""
    folder.mkdir(parents=True)
    settings = {"recipe": "flowers102/funmatch/10k", "seed": seed, "views.setting": setting, "optim.batch_size": 64,
                "optim.lr": 0.003, "run_dir": str(folder)} | settings  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    if facts:
        (folder / "run.json").write_text(json.dumps({"num_train": 128, "steps": num_steps}))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            line = {"step": step, "loss": 1 / step, "kl": 1 / step, "images_per_s": 128.0, "teacher_wait_s": 0.02,
                    "data_wait_s": 0.001}  # fmt: skip
            if step % 10 == 0:
                line |= {"eval/student_top1": top1 * step / num_steps + 0.01 * seed, "eval/teacher_top1": 0.9,
                         "eval/agreement_top1": 0.5, "eval/kl": 1.0}  # fmt: skip
            file.write(json.dumps(line) + "\n")
    if num_steps == 40:
        summary = {"student_top1": top1, "teacher_top1": 0.9, "agreement_top1": 0.5, "kl": 1.0, "steps": num_steps}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Page(HTMLParser):
    """The rows of a page's tables, and its pictures; fails on a tag that is closed wrongly."""

    def __init__(self, path):
        super().__init__()
        self.rows, self.pictures, self._open = [], [], []
        self.feed(path.read_text())
        assert not self._open

    @property
    def cells(self):
        return [cell for row in self.rows for cell in row]

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures.append(dict(attrs))
        elif tag != "meta":
            self._open.append(tag)
            if tag == "tr":
                self.rows.append([])
            elif tag in ("td", "th"):
                self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_page_about_several_runs_has_curves_finals_differences_speed_and_views(tmp_path, capsys):
    runs = [
        a_run(tmp_path / "a", setting="same/ic", top1=0.5),
        a_run(tmp_path / "b", setting="same/ic+mix", top1=0.6),
        a_run(tmp_path / "c", setting="same/ic+mix", seed=1, top1=0.61),
    ]
    Image.new("RGB", (20, 10)).save(runs[0] / "first_batch.png")
    main([*map(str, runs), "--out", str(tmp_path / "out")])
    assert f"page: {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out
    page = Page(tmp_path / "out" / "report.html")
    for cell in ("50.00%", "60.00%", "92.83%", "90.00%", "views.setting", "seed", "128.0", "500 ms", "20.0 ms"):
        assert cell in page.cells, cell
    assert "optim.lr" not in page.cells, "the same in all runs"
    assert "run_dir" not in page.cells, "where a run lies is no difference of the experiment"
    assert [picture["src"][:22] for picture in page.pictures] == ["data:image/png;base64,"] * 2
    assert "no first_batch.png" in (tmp_path / "out" / "report.html").read_text()
    assert is_drawn(tmp_path / "out" / "curves.png")


def test_runs_of_two_seeds_are_one_curve_with_a_band(tmp_path):
    runs = [Run(a_run(tmp_path / f"s{seed}", seed=seed)) for seed in (0, 2)]
    runs += [Run(a_run(tmp_path / "other", setting="ind/ic"))]
    grouped = groups(runs)
    assert {label: len(members) for label, members in grouped.items()} == {"same/ic": 2, "ind/ic": 1}
    mean, least, greatest = together([run.over("epoch", "eval/student_top1") for run in grouped["same/ic"]])
    assert mean.step.tolist() == [5.0, 10.0, 15.0, 20.0], "epochs: 64 of 128 pictures a step"
    np.testing.assert_allclose(greatest.value - least.value, 0.02)
    np.testing.assert_allclose(mean.value, (greatest.value + least.value) / 2)


def test_two_seeds_of_one_setting_alone_are_one_curve_too(tmp_path):
    runs = [Run(a_run(tmp_path / f"seed_{seed}", seed=seed)) for seed in (0, 1)]
    assert list(groups(runs)) == ["flowers102/funmatch/10k"]


def test_groups_are_named_by_the_recipe_and_by_no_more_settings_than_needed(tmp_path):
    runs = [
        Run(a_run(tmp_path / "a", setting="same/ic", recipe="one", **{"optim.lr": 0.1})),
        Run(a_run(tmp_path / "b", setting="ind/ic", recipe="two", **{"optim.lr": 0.2})),
        Run(a_run(tmp_path / "c", setting="ind/ic", recipe="two", **{"optim.lr": 0.3, "optim.temperature": 2.0})),
    ]
    assert list(groups(runs)) == ["one, lr 0.1", "two, lr 0.2", "two, lr 0.3"]


def test_runs_of_two_teachers_are_two_groups_and_of_one_teacher_moved_elsewhere_one(tmp_path):
    runs = []
    for folder, digest in (("a", "1" * 64), ("b", "2" * 64), ("c", "1" * 64)):
        path = a_run(tmp_path / folder, **{"teacher.model": [f"{folder}.safetensors"]})
        facts = json.loads((path / "run.json").read_text())
        teacher = {"model": "resnet50", "weights_digest": digest}
        (path / "run.json").write_text(json.dumps({**facts, "teacher": [teacher]}))
        runs.append(Run(path))
    grouped = groups(runs)
    assert {label: len(members) for label, members in grouped.items()} == {
        "resnet50 (11111111)": 2, "resnet50 (22222222)": 1,
    }  # fmt: skip


def test_runs_evaluated_at_different_epochs_are_averaged_where_all_have_been(tmp_path):
    first = Series(np.array([1.0, 2.0, 4.0]), np.array([0.1, 0.2, 0.4]))
    second = Series(np.array([2.0, 3.0, 4.0]), np.array([0.4, 0.4, 0.6]))
    mean, least, greatest = together([first, second])
    assert mean.step.tolist() == [2, 3, 4]
    np.testing.assert_allclose(mean.value, [0.3, 0.35, 0.5])
    np.testing.assert_allclose([least.value, greatest.value], [[0.2, 0.3, 0.4], [0.4, 0.4, 0.6]])


def test_a_run_that_is_behind_its_group_is_a_line_of_its_own():
    done, behind = (Series(np.arange(1.0, end), np.ones(end - 1)) for end in (9, 5))
    never = Series(np.zeros(0), np.zeros(0))
    whole, short = whole_and_short([behind, never, done])
    assert [one.step[-1] for one in whole] == [8] and [one.step[-1] for one in short] == [4]


def test_epochs_are_counted_in_pictures_or_follow_from_the_settings_or_are_steps(tmp_path):
    counted = Run(a_run(tmp_path / "counted"))
    derived = Run(a_run(tmp_path / "derived", facts=False, **{"optim.epochs": 10}))
    neither = Run(a_run(tmp_path / "neither", facts=False, num_steps=20, **{"optim.epochs": 10}))
    begun = Run(a_run(tmp_path / "begun", facts=False, num_steps=5))
    ends = [run.over(unit_of([run]), "eval/kl").step[-1] for run in (counted, derived, neither)]
    assert ends == [20.0, 10.0, 20.0], "64 of 128 pictures a step, 40 steps; 10 epochs; 20 steps"
    assert unit_of([counted, derived, begun]) == "epoch", "what has no curve needs no epochs"
    assert unit_of([counted, neither]) == "step"
    main([str(counted.folder), str(derived.folder), "--out", str(tmp_path / "out")])
    assert "epochs are those of the settings over all steps: derived." in (tmp_path / "out/report.html").read_text()
    main([str(counted.folder), str(neither.folder), "--out", str(tmp_path / "out")])
    assert "is on record for neither." in (tmp_path / "out/report.html").read_text()


def test_a_page_is_made_of_runs_that_miss_files_or_go_on(tmp_path):
    going_on = a_run(tmp_path / "going_on", num_steps=15)
    bare = a_run(tmp_path / "bare", facts=False, recipe="nobody's")
    (bare / "config.json").unlink()
    begun = a_run(tmp_path / "begun", num_steps=0)
    (begun / "metrics.jsonl").unlink()
    labels = tmp_path / "labels"
    labels.mkdir()
    record(labels, 20, with_teacher=False)
    main([*map(str, (going_on, bare, begun, labels)), "--out", str(tmp_path / "out")])
    page = Page(tmp_path / "out" / "report.html")
    assert {"15, not finished", "20, not finished", "0, not finished"} <= set(page.cells)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "bare: config.json, run.json, first_batch.png" in text
    assert "begun: metrics.jsonl, first_batch.png, summary.json" in text


def test_a_run_without_a_line_yet_has_a_page_too(tmp_path, capsys):
    begun = a_run(tmp_path / "begun", num_steps=0)
    main([str(begun)])
    assert capsys.readouterr().out == f"page: {begun / 'report.html'}\n"


def test_a_damaged_file_is_named(tmp_path, capsys):
    damaged = a_run(tmp_path / "damaged")
    (damaged / "run.json").write_text('{"num_tr')
    with pytest.raises(SystemExit):
        main([str(damaged)])
    assert f"{damaged / 'run.json'} is damaged" in capsys.readouterr().err


def test_the_page_says_what_was_changed_from_the_recipe(tmp_path):
    config = RECIPES["flowers102/funmatch/10k"].config
    own = dataclasses.replace(config, seed=3, optim=dataclasses.replace(config.optim, lr=0.5))
    for folder, one in (("as_it_is", config), ("own", own)):
        a_run(tmp_path / folder, **json.loads(json.dumps(settings(one))))
    main([str(tmp_path / "as_it_is"), str(tmp_path / "own"), "--out", str(tmp_path / "out")])
    rows = Page(tmp_path / "out" / "report.html").rows
    assert [(row[0], row[2], row[3]) for row in rows[1:3]] == [
        ("as_it_is", "92.83%", "nothing"),
        ("own", "92.83%", "optim.lr"),
    ]


def test_the_study_draws_every_setting_it_finds_and_ranks_them(tmp_path, capsys):
    for setting, top1 in (("fix/cc", 0.3), ("same/ic+mix", 0.5), ("ind/rc", 0.4)):
        for seed in (0, 1):
            a_run(tmp_path / setting.replace("/", "_") / f"seed_{seed}", seed=seed, setting=setting, top1=top1)
    main(["--study", str(tmp_path)])
    assert is_drawn(tmp_path / "study.png")
    table = (tmp_path / "study.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:5]] == ["| same/ic+mix", "| ind/rc", "| fix/cc"]
    assert "| same/ic+mix | 50.00%, 51.00% | 50.50% | 50.00% | 1.000 |" in table[2]


def test_a_study_that_goes_on_keeps_unfinished_runs_out_of_its_means(tmp_path):
    for seed, num_steps in ((0, 40), (1, 20), (2, 5)):
        a_run(tmp_path / "ind_rc" / f"seed_{seed}", seed=seed, setting="ind/rc", num_steps=num_steps, top1=0.3)
    a_run(tmp_path / "same_rc" / "seed_0", setting="same/rc", num_steps=0)
    main(["--study", str(tmp_path)])
    assert is_drawn(tmp_path / "study.png")
    table = (tmp_path / "study.md").read_text().splitlines()
    assert table[2].startswith("| ind/rc | 30.00%, (31.00%, step 20), (none yet, step 5) | 30.00% |")
    assert table[3] == "| same/rc | (none yet, step 0) |  |  |  |  |"
    assert table[-1].startswith("In parentheses")


def test_a_study_without_runs_is_refused_in_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--study", str(tmp_path)])
    assert "no runs" in capsys.readouterr().err


def test_the_page_of_a_run_that_goes_on_says_how_far_it_is_and_one_that_stopped_how_long_it_has_been_silent(tmp_path):
    going_on, stopped = (a_run(tmp_path / name, num_steps=20) for name in ("going_on", "stopped"))
    for run in (going_on, stopped):
        (run / "run.json").write_text(json.dumps({"num_train": 128, "steps": 80}))
    hour_ago = time.time() - 3600
    os.utime(stopped / "metrics.jsonl", (hour_ago, hour_ago))
    main([str(going_on), str(stopped), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.html").read_text()
    assert "going_on: step 20 of 80 (25.0%); it was going on when this page was written, about 0.5 minutes" in text
    assert "stopped: step 20 of 80 (25.0%); not finished, and silent for 60 minutes" in text
    assert "So far" in text and "In the end" not in text


def test_no_request_leaves_the_page(tmp_path):
    run = a_run(tmp_path / "run")
    Image.new("RGB", (20, 10)).save(run / "first_batch.png")
    main([str(run)])
    page = re.sub(r"base64,[A-Za-z0-9+/=]+", "base64,", (run / "report.html").read_text())
    assert not re.findall(r"https?:|@import|url\(|<script|<link|<iframe", page)
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"data:image/png;base64,"}


def words_on(picture_of, run, monkeypatch):
    """Every text of the figure that is drawn."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    picture_of(run)
    monkeypatch.undo()
    return [text.get_text() for text in figures[0].findobj(Text)]


def test_a_picture_of_a_run_without_labels_says_that_and_not_that_it_was_not_evaluated(tmp_path, monkeypatch):
    with Metrics(tmp_path) as metrics:
        numbers = {"loss": 1.0, "lr": 0.01, "images_per_s": 9.0, "teacher_wait_s": 0.1, "teacher_entropy": 0.5}
        metrics.write(1, numbers)
        assert words_on(draw, tmp_path, monkeypatch).count("not evaluated yet") == 2
        metrics.write(1, {"eval/kl": 0.5, "eval/agreement_top1": 0.75})
    told = words_on(draw, tmp_path, monkeypatch)
    assert "not evaluated yet" not in told and any("no labels" in text for text in told)
    assert any("agreement 75.00%" in text for text in told), "the headline has what was measured"


def test_a_page_of_a_run_without_labels_has_curves_even_where_epochs_are_not_known(tmp_path, monkeypatch):
    run = a_run(tmp_path / "run", facts=False, num_steps=20)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [{name: value for name, value in line.items() if not name.endswith("top1")} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    main([str(run)])
    page = (run / "report.html").read_text()
    assert "against steps" in page and "no labels" in Page(run / "report.html").cells
    words = words_on(lambda _: draw_curves(groups([Run(run)]), run / "curves.png"), run, monkeypatch)
    assert {"no labels: accuracy is not known", "no teacher to compare with", "step, log scale"} <= set(words)
