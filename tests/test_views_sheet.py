"""`funmatch views`: what it shows is what the step of that run looked at."""

import base64
import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import serve
from data_prep.index import Index
from funmatch.views_page import write
from funmatch.views_seen import Vouched, look
from funmatch.views_sheet import config_of, main
from student_trainer.config import settings
from student_trainer.recipes import RECIPES
from views.draw import Plan
from views.render import Renderer, Rendering

ROOT = Path(__file__).resolve().parents[1]
STEP = 7


def config_for(data, setting="same/ic+mix", **more):
    config = RECIPES["digits/demo"].config
    return dataclasses.replace(
        config, seed=3, data=dataclasses.replace(config.data, root=data, evaluate="val"),
        views=dataclasses.replace(config.views, setting=setting, num_crops=5),
        student=dataclasses.replace(config.student, size=24),
        optim=dataclasses.replace(config.optim, batch_size=16), **more,
    )  # fmt: skip


def a_run(folder, config, **facts):
    """The folder of a past run, as far as a sheet reads it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings(config)))
    (folder / "run.json").write_text(json.dumps({"num_train": 18, "teacher": [{"rendering": {"size": 40}}]} | facts))
    lines = [{"step": STEP, "view_mismatch": 9}, {"step": STEP + 1, "view_mismatch": 0}, {"step": STEP + 2}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def pictures_of(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def computed_directly(data, config, step, size, num_rows):
    """Views and mixtures of the first rows, from all rows of the step's batch, one picture at a time."""
    index = Index.open(data)
    rows = Plan(
        seed=config.seed, batch_size=config.optim.batch_size, law=config.views.student,
        samples=index.splits["train"], height=index.height, width=index.width,
    ).rows(step)  # fmt: skip
    renderer = Renderer(Rendering(size=size), 1, None, 1)
    for row in range(num_rows):
        mate = int(rows.partner[row])
        own, other = (
            renderer.render(index.read([rows.sample[v]]), np.int32([0]), rows.box[v : v + 1], rows.flip[v : v + 1])
            .numpy()[0] for v in (row, mate)
        )  # fmt: skip
        lam = rows.lam[row]
        yield own, other, np.rint(lam * own.astype(np.float64) + (1 - lam) * other.astype(np.float64))


def test_a_past_run_is_seen_again_from_its_folder_alone(tiny_data, tmp_path, capsys):
    config = config_for(tiny_data)
    run, out = a_run(tmp_path / "run", config), tmp_path / "new" / "sheet.html"
    assert main(["--run-dir", str(run), "--step", str(STEP), "--rows", "3", "--out", str(out)]) == 0
    page = out.read_text()
    shown = iter(pictures_of(page))
    both = [computed_directly(tiny_data, config, STEP, size, 3) for size in (24, 40)]
    for sides in zip(*both, strict=True):
        for own, other, mixed in sides:
            np.testing.assert_array_equal(next(shown), own)
            np.testing.assert_array_equal(next(shown), other)
            assert np.abs(next(shown).astype(float) - mixed).max() <= 1, "float32, and then whole grey levels"
    assert next(shown, None) is None
    told = capsys.readouterr().out
    assert "No teacher was asked" in told and "the largest difference was 0 grey levels" in told


def test_no_request_leaves_the_page(tiny_data, tmp_path):
    seen = look(config_for(tiny_data), STEP, range(2), None, ())
    write(seen, tmp_path / "sheet.html")
    page = re.sub(r"base64,[A-Za-z0-9+/=]+", "base64,", (tmp_path / "sheet.html").read_text())
    assert not re.findall(r"https?:|//|@import|url\(|<script|<link|<iframe", page)
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"data:image/png;base64,", "data:image/jpeg;base64,"}


def test_a_teacher_that_is_asked_vouches_for_its_own_pixels(tiny_model, tiny_data, tmp_path, capsys):
    run = a_run(tmp_path / "run", config_for(tiny_data))
    out = tmp_path / "sheet.html"
    with serve((tiny_model, tiny_data)) as (address,):
        args = ["--run-dir", str(run), "--step", str(STEP), "--rows", "4", "--out", str(out)]
        assert main([*args, "--teacher", address]) == 0
    assert "rendered the same pixels: the digests of all 5 views are equal" in capsys.readouterr().out
    assert out.read_text().count("digest is equal") == 8, "each row's own view and its partner's"
    assert "32 px" in out.read_text(), "the teacher's own size, not the one on record"


def test_a_teacher_that_saw_something_else_is_told_of_and_is_a_failure(tiny_data, tmp_path):
    seen = look(config_for(tiny_data), STEP, range(2), None, ())
    lies = Vouched(("0" * 32, *seen.looks[1].digests[1:]), (3, 0, 0), 0)
    seen = dataclasses.replace(seen, looks=(seen.looks[0], dataclasses.replace(seen.looks[1], vouched=lies)))
    assert seen.differs and "differ by up to 3 grey levels, of which 0 are allowed" in seen.verdict()
    write(seen, tmp_path / "sheet.html")
    assert "up to 3 grey levels away" in (tmp_path / "sheet.html").read_text()


@pytest.mark.parametrize("setting", ["ind/ic+mix", "ind/rc", "fix/ic_ens", "fix/cc", "same/rc"])
def test_each_view_setting_shows_each_sides_own_boxes(setting, tiny_data, tmp_path):
    seen = look(config_for(tiny_data, setting), STEP, range(4), None, (32,))
    student, teacher = (one.rows for one in seen.looks)
    assert student.sample[:4].tolist() == teacher.sample[:4].tolist()
    assert np.array_equal(student.box[:4], teacher.box[:4]) == setting.startswith("same")
    assert seen.of_many == (5 if setting == "fix/ic_ens" else 1)
    for name in ("sheet.html", "sheet.png"):
        write(seen, tmp_path / name)
    text = (tmp_path / "sheet.html").read_text()
    assert ("where the teacher looks" in text) != setting.startswith("same")
    assert ("average over 5 crops" in text) == (setting == "fix/ic_ens")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert min(picture.size) > 300


def test_a_run_that_learns_from_labels_has_no_teachers_half(tiny_data):
    seen = look(config_for(tiny_data, targets="labels"), STEP, range(2), None, ())
    assert [one.name for one in seen.looks] == ["the student"] and "learns from labels" in seen.verdict()


def test_the_last_rows_of_a_batch_are_those_of_the_whole_batch(tiny_data):
    config = config_for(tiny_data)
    whole, last = (look(config, STEP, rows, None, ()).looks[0] for rows in (range(16), range(13, 16)))
    assert last.digests[:3] == whole.digests[13:16] and last.rows.sample[3] == whole.rows.sample[12]


@pytest.mark.parametrize("name", list(RECIPES)[::10])
def test_a_config_comes_back_from_its_settings(name):
    config = RECIPES[name].config
    assert config_of(json.loads(json.dumps(settings(config))), Path("run")) == config


@pytest.mark.parametrize(
    ("facts", "changes", "args", "sentence"),
    [
        ({}, {}, ["--step", "9999999"], "this run has the steps 0 to"),
        ({}, {}, ["--first-row", "15"], "rows 15 to 17: a batch of this run has the rows 0 to 15"),
        ({"num_train": 1020}, {}, [], "is not the data set that"),
        ({"teacher": [{"rendering": {"version": "older"}}]}, {}, [], "was rendered by older"),
        ({}, {"views.colour": 1}, [], "unknown here: views.colour"),
        ({}, {}, ["--recipe", "flowers102/laptop"], "is a run of 'digits/demo', not of 'flowers102/laptop'"),
        ({}, {}, ["--data", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_sentence(facts, changes, args, sentence, tiny_data, tmp_path, capsys):
    run = a_run(tmp_path / "run", config_for(tiny_data), **facts)
    told = json.loads((run / "config.json").read_text()) | changes
    (run / "config.json").write_text(json.dumps(told))
    out = ["--out", str(tmp_path / "sheet.html")]
    assert main(["--run-dir", str(run), "--step", str(STEP), "--rows", "3", *out, *args]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("funmatch views: ")
    assert not (tmp_path / "sheet.html").exists()


def test_help_comes_without_torch():
    code = (
        "import sys; from funmatch.views_sheet import main\n"
        "try: main(['--help'])\nexcept SystemExit: print({'torch', 'nvidia.dali'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("set()") and "example: funmatch views" in done.stdout
