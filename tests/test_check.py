"""The check reads everything again, and names whatever is not as it was written."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.check import SHEET_FILE, check, contact_sheet, main, statistics
from data_prep.index import COLUMNS, Index, write_index
from data_prep.prepare import prepare
from make_pictures import jpeg, rotated, write_files


@pytest.fixture
def index(tmp_path: Path) -> Index:
    files = {f"train/{c}/{i}.jpg": jpeg(i, 40 + i, 50) for c in "ab" for i in range(4)}
    files |= {"train/a/turned.jpg": rotated(6), "test/b/1.jpg": jpeg(1), "test/unknown.jpg": jpeg(2, 200, 100)}
    source = write_files(tmp_path / "in", files)
    return prepare("folder", source, tmp_path / "out", pictures_per_shard=5, workers=1, progress=False)


def wrong(index: Index) -> list[str]:
    return check(index.root, workers=1, progress=False)


def rewrite(index: Index, **columns: np.ndarray) -> None:
    """The index of a tool that got a column wrong: consistent with itself, not with its shards."""
    columns = {name: np.array(getattr(index, name)) for name in COLUMNS if name != "split"} | columns
    described = {"name": index.name, "classes": index.classes, "splits": index.splits, "shards": index.shards}
    write_index(index.root, **described, columns=columns)


def test_a_whole_set_has_nothing_wrong_and_gets_a_contact_sheet(index, capsys):
    assert main(index.root, workers=1) == 0
    said = capsys.readouterr().out
    assert "11 pictures (train 9, test 2) of 2 classes" in said and index.digest in said
    assert main(index.root, workers=1) == 0, "the sheet itself is no stray file"
    with Image.open(index.root / SHEET_FILE) as sheet:
        assert min(sheet.size) > 300 and len(sheet.getcolors(10**6)) > 1000


def test_several_processes_find_the_same(index):
    rewrite(index, height=index.height + 1)
    assert check(index.root, workers=2, progress=False) == wrong(index)
    assert len(wrong(index)) == len(index)


def test_statistics_count_labels_and_sizes(index):
    train, test = statistics(index).splitlines()[1:3]
    assert train.split() == ["train", "9", "0", "2", "4/4/5", "40/42/80", "x", "50/50/60"]
    assert test.split() == ["test", "2", "1", "1", "1/1/1", "60/130/200", "x", "80/90/100"]


def test_a_flipped_bit_in_a_shard_is_found(index):
    shard = index.root / index.shards[1].name
    contents = bytearray(shard.read_bytes())
    contents[int(index.offset[6]) + 400] ^= 1
    shard.write_bytes(contents)
    assert any("train-000001.tar is not the file that was written" in error for error in wrong(index))
    assert main(index.root, workers=1) == 1


def test_a_picture_that_no_longer_decodes_is_named(index, capsys):
    shard = index.root / index.shards[0].name
    contents = bytearray(shard.read_bytes())
    start, size = int(index.offset[2]), int(index.size[2])
    contents[start : start + size] = bytes(size)
    shard.write_bytes(contents)
    assert main(index.root, workers=1) == 1
    said = capsys.readouterr().err
    assert "sample 2 (train-000000.tar, key train/a/2) does not decode" in said
    assert "2 things are wrong" in said


def test_wrong_sizes_offsets_and_labels_are_named(index):
    width, offset, label = np.array(index.width), np.array(index.offset), np.array(index.label)
    width[4] += 1
    offset[3] += 512
    label[0] = 2
    rewrite(index, width=width, offset=offset, label=label)
    errors = "\n".join(wrong(index))
    assert "sample 4 (train-000000.tar, key train/a/turned) is 80x60 pixels, the index says 80x61" in errors
    assert "sample 3 (train-000000.tar, key train/a/3) is not where the index says" in errors
    assert "sample 0 (train-000000.tar, key train/a/0) has label 2, outside -1 .. 1" in errors
    assert len(errors.splitlines()) == 3


def test_stray_and_missing_files_are_named(index):
    (index.root / "train-000009.tar").write_bytes(b"?")
    assert wrong(index) == [f"{index.root / 'train-000009.tar'} does not belong to the set"]
    (index.root / "test-000000.tar").unlink()
    assert "test-000000.tar is missing" in wrong(index)[0]


def test_a_folder_without_a_set_is_an_error_not_a_crash(tmp_path, capsys):
    assert main(tmp_path, workers=1) == 1
    assert "holds no prepared data set" in capsys.readouterr().err


def test_small_pictures_show_their_pixels_on_the_sheet(tmp_path):
    source = write_files(tmp_path / "in", {"1.jpg": jpeg(1, 4, 4, subsampling=0)})
    index = prepare("folder", source, tmp_path / "out", workers=1, progress=False)
    sheet = np.asarray(contact_sheet(index))
    shown = sheet[(sheet != sheet[0, 0]).any(axis=2)]
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) < 1000
