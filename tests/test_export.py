"""A finished run's student leaves for timm and as ONNX, with its card; an ONNX file or a folder returns as a teacher.

Each file is read by a process that imports nothing of ours, and must say what the run's student says.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import models
from conftest import NUM_CLASSES, plain_rows, serve
from funmatch import export, onnx_file, timm_folder
from funmatch.timm_folder import Preprocessing
from student_trainer.config import DataConfig, StudentConfig, TeacherConfig, settings
from student_trainer.fleet import Fleet
from student_trainer.recipes import RECIPES

SEEN = Preprocessing(interpolation="bilinear", crop_mode="center", crop_pct=0.8)

WITH_TIMM = """
import sys, numpy as np, timm, torch
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
assert tuple(config["input_size"]) == (3, 32, 32) and tuple(config["mean"]) == (0.5, 0.4, 0.3), config
assert (config["crop_pct"], config["crop_mode"], config["interpolation"]) == (0.8, "center", "bilinear"), config
with torch.inference_mode():
    np.save(sys.argv[3], model(torch.from_numpy(np.load(sys.argv[2]))).numpy())
assert not {"models", "funmatch", "views", "student_trainer"} & set(sys.modules)
"""

WITH_OURS = """
import sys, models, numpy as np, torch
model, _ = models.load(sys.argv[1])
with torch.inference_mode():
    np.save(sys.argv[3], model.eval()(torch.from_numpy(np.load(sys.argv[2]))).numpy())
"""

WITH_ONNXRUNTIME = """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
np.save(sys.argv[3], session.run(["logits"], {"images": np.load(sys.argv[2])})[0])
assert not {"torch", "timm", "models", "funmatch", "views"} & set(sys.modules)
"""


def finished_run(folder: Path, model: Path, data: Path, **student: object) -> Path:
    """A run's folder as the loop leaves it."""
    folder.mkdir()
    config = dataclasses.replace(
        RECIPES["digits/demo"].config,
        data=DataConfig(root=data, evaluate="val"),
        student=StudentConfig(architecture="resnetv2_14x05_bit", size=32, **student),
        teacher=TeacherConfig(model=("secret/place/teacher.safetensors",)),
    )
    facts = {
        "num_train": 18, "num_classes": NUM_CLASSES, "parameters": 1234567, "steps": 20,
        "teacher": [{"model": "resnetv2_152x2_bit", "precision": "float32", "weights_digest": "ab" * 32,
                     "rendering": {"size": 128}}],
    }  # fmt: skip
    numbers = {"student_top1": 0.75, "teacher_top1": 0.875, "agreement_top1": 0.8125, "kl": 0.125, "steps": 20}
    (folder / "config.json").write_text(json.dumps(settings(config)))
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "summary.json").write_text(json.dumps(numbers))
    shutil.copy(model, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def run(tiny_model, tiny_data, tmp_path_factory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "own", tiny_model, tiny_data)


@pytest.fixture(scope="module")
def exported(run) -> Path:
    """The run's student in all forms; torch's exporter takes seconds, so once for all tests."""
    out = run.parent / "exported"
    # In a process of its own, as users have it: torch's exporter refuses settings that servers in this one have made.
    subprocess.run(
        [sys.executable, "-m", "funmatch.export", str(run), "--out", str(out), "--onnx"],
        cwd=Path(__file__).parents[1],
        check=True,
    )
    return out


def foreign_answers(script: str, folder: Path, scratch: Path, images: np.ndarray) -> np.ndarray:
    np.save(scratch / "images.npy", images)
    command = [sys.executable, "-I", "-c", script, folder, scratch / "images.npy", scratch / "logits.npy"]
    subprocess.run(list(map(str, command)), cwd=scratch, check=True, timeout=120)
    return np.load(scratch / "logits.npy")


def own_answers(run: Path, scratch: Path, images: np.ndarray) -> np.ndarray:
    np.save(scratch / "images.npy", images)
    command = [sys.executable, "-c", WITH_OURS, run / "model.safetensors", scratch / "images.npy", scratch / "own.npy"]
    subprocess.run(list(map(str, command)), cwd=Path(__file__).parents[1], check=True, timeout=120)
    return np.load(scratch / "own.npy")


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(7, 3, 32, 32)).astype(np.float32)


def test_timm_alone_loads_the_folder_and_answers_the_same_to_the_last_bit(exported, run, images, tmp_path):
    np.testing.assert_array_equal(
        foreign_answers(WITH_TIMM, exported, tmp_path, images), own_answers(run, tmp_path, images)
    )


def test_onnxruntime_alone_answers_the_same(exported, run, images, tmp_path):
    found, expected = foreign_answers(WITH_ONNXRUNTIME, exported, tmp_path, images), own_answers(run, tmp_path, images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))


def test_the_card_tells_data_teacher_numbers_and_preprocessing_and_no_path(exported, tiny_data):
    card = (exported / "README.md").read_text()
    for told in ("75.00%", "87.50%", "resnetv2_152x2_bit", "tiny_pictures", "1,234,567", "[0.5, 0.4, 0.3]", "class_3",
                 "PLACEHOLDER", "pictures of tiny_pictures", "32 x 32", "bilinear",
                 "top-1 agrees on 100.0%"):  # fmt: skip
        assert told in card, told
    assert str(tiny_data) not in card and "secret" not in card


def test_class_names_travel_in_timms_configuration(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["label_names"] == [f"class_{number}" for number in range(NUM_CLASSES)]


@pytest.mark.parametrize("name", ["resnetv2_26x05_bit", "resnetv2_14x05_bit", "test_byobnet", "test_vit"])
def test_every_student_that_timm_can_hold_is_read_back_bit_for_bit(name, tmp_path):
    torch.manual_seed(0)
    model = models.create(name, 5).eval()
    side = 160 if name == "test_vit" else 48
    card = models.ModelCard(
        architecture=name, num_classes=5, size=side, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), data_set="x"
    )
    read_back = timm_folder.write(tmp_path, model, card, SEEN, ())
    rows = torch.randn(3, 3, side, side)
    assert torch.equal(timm_folder.answers(read_back, rows), timm_folder.answers(model, rows))


def test_a_network_that_timm_has_not_is_refused_with_a_way_out(tmp_path):
    model = models.create("mobilenetv3_small_050_gn8", 5)
    with pytest.raises(ValueError, match=r"--only-onnx"):
        timm_folder.portable(model, "mobilenetv3_small_050_gn8")


def test_a_file_that_answers_otherwise_is_refused_and_nothing_is_left(run, tmp_path, monkeypatch, capsys):
    def damaged(path, model, *_):
        path.write_bytes(b"")

    monkeypatch.setattr(onnx_file, "write", damaged)
    monkeypatch.setattr(onnx_file, "answers", lambda _path, images: np.zeros((len(images), NUM_CLASSES), np.float32))
    assert export.main([str(run), "--out", str(tmp_path / "out"), "--onnx"]) == 2
    assert "does not answer as the run's student does" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_not_finished_and_a_folder_that_exists_are_refused(run, tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "model.safetensors").unlink()
    assert export.main([str(unfinished), "--out", str(tmp_path / "out")]) == 2
    assert "has not finished" in capsys.readouterr().err
    assert export.main([str(run), "--out", str(tmp_path)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert export.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is it the folder of a run?" in capsys.readouterr().err


def test_without_its_data_set_an_export_is_tried_on_synthetic_pictures_and_says_so(tiny_model, tmp_path):
    run = finished_run(tmp_path / "run", tiny_model, tmp_path / "moved", interpolation="cubic")
    done = export.export(run, tmp_path / "out")
    assert done.timm is not None and "synthetic" in done.timm.pictures and done.timm.max_difference == 0
    assert "bicubic" in (tmp_path / "out" / "README.md").read_text()


def ask(address: str, data: Path) -> tuple[np.ndarray, object]:
    from data_prep.index import Index

    with Fleet((address,), data_digest=Index.open(data).digest) as fleet:
        return fleet.ask(plain_rows(8), picture=lambda _sample: b"", pixels=None).result(), fleet.description


def test_an_exported_student_teaches_as_onnx_and_as_a_folder_like_the_run_itself(exported, run, tiny_data):
    teachers = (f"{run}/model.safetensors", f"local-dir:{exported}", f"{exported}/model.onnx")
    with serve(*((teacher, tiny_data) for teacher in teachers)) as addresses:
        found = [ask(address, tiny_data) for address in addresses]
    (own, who), (folder, _), (onnx_logits, onnx_who) = found
    np.testing.assert_array_equal(folder, own)
    np.testing.assert_allclose(onnx_logits, own, rtol=0, atol=1e-4)
    assert onnx_who.batch_invariant and onnx_who.precision == "float32"
    assert onnx_who.fingerprint != who.fingerprint, "another runtime is another teacher"


def forgetful(file: Path, out: Path, batch: int | None = None) -> Path:
    """The same graph as somebody else wrote it: without our card, perhaps for batches of one size."""
    graph = onnx.load(file)
    del graph.metadata_props[:]
    if batch:
        for door in (*graph.graph.input, *graph.graph.output):
            door.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(graph, out)
    return out


def test_what_a_foreign_onnx_file_does_not_say_is_asked_for_and_taken_from_flags(exported, tmp_path):
    file = forgetful(exported / "model.onnx", tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match=r"--mean R G B --std R G B"):
        models.load(file)
    network, card = models.load(file, mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert (card.num_classes, card.size, card.mean) == (NUM_CLASSES, 32, (0.1, 0.2, 0.3))
    assert models.weights_digest(network) != models.weights_digest(models.load(exported / "model.onnx")[0])
    with pytest.raises(ValueError, match="leave out --size 64"):
        models.load(file, mean=(0, 0, 0), std=(1, 1, 1), size=64)


def test_an_onnx_file_for_batches_of_one_size_chooses_the_rows_of_a_batch(exported, tmp_path):
    from teacher_server.model import choose_for_onnx

    network, _ = models.load(
        forgetful(exported / "model.onnx", tmp_path / "four.onnx", 4), mean=(0, 0, 0), std=(1, 1, 1)
    )
    assert choose_for_onnx(network, "auto", None) == 4
    with pytest.raises(ValueError, match="exactly 4 rows"):
        choose_for_onnx(network, "auto", 8)
    with pytest.raises(ValueError, match="--precision float16"):
        choose_for_onnx(network, "float16", None)


def test_files_that_are_no_onnx_classifier_are_refused_with_a_sentence(exported, tmp_path):
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(ValueError, match="onnxruntime cannot read it"):
        models.load(tmp_path / "text.onnx")
    graph = onnx.load(exported / "model.onnx")
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(graph, tmp_path / "grey.onnx")
    with pytest.raises(ValueError, match=r"cannot read it|channels first"):
        models.load(tmp_path / "grey.onnx")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.onnx"):
        models.load(tmp_path / "nowhere.onnx")
    with pytest.raises(ValueError, match="can teach and not learn"):
        models.load(exported / "model.onnx", num_classes=3)
    with pytest.raises(FileNotFoundError, match="funmatch export"):
        models.load(f"local-dir:{tmp_path}")
