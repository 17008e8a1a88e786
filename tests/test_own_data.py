"""Pictures of one's own, from the folder or the shards that somebody has to a trained student; also without labels."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import tarfile
from pathlib import Path

import pytest

from conftest import NUM_CLASSES, serve
from data_prep.index import Index
from data_prep.prepare import main, prepare, summary
from make_pictures import jpeg, write_files
from student_trainer import world
from student_trainer.config import Config, DataConfig
from student_trainer.recipes import RECIPES
from student_trainer.report import main as main_of_report
from student_trainer.train import train


def make(name: str, source: Path, out: Path, **options: object) -> Index:
    return prepare(name, source, out, workers=1, progress=False, **options)


def class_folders(root: Path, num_each: int, below: str = "") -> Path:
    names = [f"{below}{name}/{number}.jpg" for name in ("ant", "bee") for number in range(num_each)]
    return write_files(root, {name: jpeg(seed) for seed, name in enumerate(names)})


def test_a_held_out_share_of_each_class_becomes_val_and_is_the_same_every_time(tmp_path):
    source = class_folders(tmp_path / "own", 10)
    index = make("folder", source, tmp_path / "out", hold_out=0.2)
    assert {split: len(rows) for split, rows in index.splits.items()} == {"train": 16, "val": 4}
    held = index.label[index.splits["val"].start :]
    assert sorted(held) == [0, 0, 1, 1]
    assert make("folder", source, tmp_path / "again", hold_out=0.2).digest == index.digest
    with pytest.raises(ValueError, match="other options"):
        make("folder", source, tmp_path / "out")


def test_holding_out_is_refused_where_it_means_nothing(tmp_path):
    split = class_folders(tmp_path / "split", 2, "train/")
    write_files(split, {"val/ant/x.jpg": jpeg(9)})
    with pytest.raises(ValueError, match=r"splits of its own \(val\)"):
        make("folder", split, tmp_path / "out", hold_out=0.1)
    with pytest.raises(ValueError, match="no class has enough pictures"):
        make("folder", class_folders(tmp_path / "few", 2), tmp_path / "out", hold_out=0.1)
    with pytest.raises(ValueError, match="official splits"):
        make("digits", None, tmp_path / "out", hold_out=0.1)
    with pytest.raises(ValueError, match="less than 1"):
        make("folder", split, tmp_path / "out", hold_out=20)


def test_splits_one_folder_further_down_are_pointed_at(tmp_path):
    packed = class_folders(tmp_path / "packed", 2, "animals/train/")
    with pytest.raises(ValueError, match=f"give --source {packed}/animals"):
        make("folder", packed, tmp_path / "out")
    inside = write_files(tmp_path / "inside", {f"{c}/{s}/1.jpg": jpeg(1) for c in "ab" for s in ("train", "test")})
    with pytest.raises(ValueError, match="the split comes first and the class second: test/a/picture"):
        make("folder", inside, tmp_path / "out")


def test_splits_may_be_written_large_and_a_class_may_be_called_train(tmp_path):
    large = write_files(tmp_path / "large", {"Train/a/1.jpg": jpeg(1), "Validation/a/2.jpg": jpeg(2)})
    assert list(make("folder", large, tmp_path / "out").splits) == ["train", "val"]
    vehicles = write_files(tmp_path / "vehicles", {"Train/1.jpg": jpeg(1), "Bus/2.jpg": jpeg(2)})
    assert make("folder", vehicles, tmp_path / "out2").classes == ("Bus", "Train")


def test_files_of_other_kinds_are_told_by_their_ends(tmp_path, capsys):
    source = write_files(
        tmp_path / "own", {"ant/1.jfif": jpeg(1), "ant/2.HEIC": b"heic", "bee/3.heic": b"", "a.csv": b""}
    )
    index = make("folder", source, tmp_path / "out")
    assert len(index) == 1 and ".heic 2, .csv 1" in summary(index) and "--hold-out 0.1" in summary(index)
    only = write_files(tmp_path / "phone", {"ant/2.heic": b"heic"})
    assert main("folder", source=only, out=tmp_path / "out2") == 2
    assert "no pictures (.jpg" in capsys.readouterr().err


def shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, contents in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))


def img2dataset_shards(root: Path, num_shards: int, num_each: int) -> Path:
    """As img2dataset writes them: jpg, txt and json, a sample that failed, statistics and a table beside each shard."""
    for number in range(num_shards):
        members: dict[str, bytes] = {}
        for place in range(num_each):
            key = f"{number:05d}{place:04d}"
            record = {"url": "https://example.org/a.jpg", "key": key, "status": "success", "width": 80, "height": 60}
            members |= {
                f"{key}.jpg": jpeg(100 * number + place), f"{key}.txt": b"a caption",
                f"{key}.json": json.dumps(record).encode(),
            }  # fmt: skip
        members |= {f"{number:05d}9999.json": b'{"status": "failed_to_download"}'}
        shard(root / f"{number:05d}.tar", members)
        (root / f"{number:05d}_stats.json").write_text("{}")
        (root / f"{number:05d}.parquet").write_bytes(b"PAR1")
    return root


def test_img2dataset_shards_are_indexed_in_place_and_whole_shards_held_out(tmp_path):
    source = img2dataset_shards(tmp_path / "laion", 4, 3)
    index = make("shards", source, tmp_path / "out", hold_out=0.25)
    assert {split: len(rows) for split, rows in index.splits.items()} == {"train": 9, "val": 3}
    assert index.classes == () and set(index.label.tolist()) == {-1} and index.prepared["num_without_picture"] == 4
    assert (tmp_path / "out" / "00000.tar").samefile(source / "00000.tar"), "no byte was copied"
    one = img2dataset_shards(tmp_path / "one", 1, 3)
    with pytest.raises(ValueError, match="takes whole shards"):
        make("shards", one, tmp_path / "out2", hold_out=0.25)


def test_labels_of_shards_come_from_cls_or_json_and_a_damaged_json_is_named(tmp_path):
    shard(tmp_path / "own" / "train-0.tar", {
        "a.jpg": jpeg(1), "a.cls": b"2", "b.png": jpeg(2), "b.json": b'{"label": 1}', "c.jpg": jpeg(3), "c.json": b"[]",
    })  # fmt: skip
    assert make("shards", tmp_path / "own", tmp_path / "out").label.tolist() == [2, 1, -1]
    shard(tmp_path / "bad" / "0.tar", {"a.jpg": jpeg(1), "a.json": b"{"})
    with pytest.raises(ValueError, match=r"sample a of .*0\.tar has a json that is none"):
        make("shards", tmp_path / "bad", tmp_path / "out2")


@pytest.fixture(scope="module")
def unlabelled_run(tiny_model, tmp_path_factory) -> Path:
    """A student that learned from pictures that nobody has labelled."""
    root = tmp_path_factory.mktemp("unlabelled")
    data = make("shards", img2dataset_shards(root / "laion", 3, 8), root / "data", hold_out=0.34).root
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with serve((tiny_model, data)) as addresses, world.join("cpu") as alone:
            train(small_run(data, root / "run", addresses), alone)
    finally:
        for number, handler in kept.items():  # the loop has some of its own
            signal.signal(number, handler)
    return root / "run"


def small_run(data: Path, run_dir: Path, addresses: tuple[str, ...]) -> Config:
    demo = RECIPES["digits/demo"].config
    return dataclasses.replace(
        demo, run_dir=run_dir, device="cpu", decode_threads=1, evaluate_every=2,
        data=DataConfig(root=data, evaluate="val"),
        student=dataclasses.replace(demo.student, architecture="test_byobnet", size=32, weights=""),
        teacher=dataclasses.replace(demo.teacher, addresses=addresses, audit_every=2),
        optim=dataclasses.replace(demo.optim, batch_size=8, epochs=2.0, warmup_steps=1),
    )  # fmt: skip


def test_without_labels_a_run_reports_agreement_and_kl_and_no_accuracy(unlabelled_run, tmp_path, capsys):
    summary_of_run = json.loads((unlabelled_run / "summary.json").read_text())
    assert summary_of_run["examples"] == 8 and {"kl", "agreement_top1", "agreement_top5"} <= summary_of_run.keys()
    assert not {"student_top1", "teacher_top1", "student_xent"} & summary_of_run.keys()
    main_of_report([str(unlabelled_run), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "against epochs" in page and "agreement" in page
    assert "agreement of the two" in said and "student top-1" not in said


def test_a_student_of_unlabelled_pictures_is_exported_with_a_card_that_says_so(unlabelled_run, tmp_path):
    from funmatch import export

    done = export.export(unlabelled_run, tmp_path / "out")
    assert done.timm is not None and done.timm.num_pictures == 8
    card = (tmp_path / "out" / "README.md").read_text()
    assert "no accuracy is known" in card and "agreement" in card and f"{NUM_CLASSES} outputs" in card
