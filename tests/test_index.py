"""The index: opening is cheap at any size, reading is exact, and nothing outside the root can be reached."""

import hashlib
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_prep import index as index_module
from data_prep.index import COLUMNS, DATASET_FILE, Index, Shard, content_errors, sha256_of, write_index

NUM_SHARDS, PER_SHARD, SIZE = 5, 20, 37


@pytest.fixture
def contents() -> np.ndarray:
    """[N, SIZE]: what each row's picture is, all different."""
    return np.random.default_rng(0).integers(0, 256, (NUM_SHARDS * PER_SHARD, SIZE), dtype=np.uint8)


@pytest.fixture
def index(tmp_path: Path, contents: np.ndarray) -> Index:
    shards = []
    for number in range(NUM_SHARDS):
        file = tmp_path / f"train-{number:06d}.tar"
        file.write_bytes(contents[number * PER_SHARD : (number + 1) * PER_SHARD].tobytes())
        shards.append(Shard(name=file.name, size=file.stat().st_size, sha256=sha256_of(file)))
    rows = np.arange(len(contents))
    return write_index(
        tmp_path,
        name="numbers",
        classes=["even", "odd"],
        splits={"train": range(70), "val": range(70, 90), "test": range(90, 100)},
        shards=shards,
        columns={
            "shard": rows // PER_SHARD,
            "offset": rows % PER_SHARD * SIZE,
            "size": np.full(len(rows), SIZE),
            "height": rows + 1,
            "width": rows + 2,
            "label": rows % 2,
            "key": np.array([f"picture_{row}" for row in rows], dtype="S"),
        },
    )


def redescribe(root: Path, **changes: object) -> None:
    """Change dataset.json the way a forger would: with a digest that agrees."""
    described = json.loads((root / DATASET_FILE).read_text()) | changes
    described["digest"] = index_module._digest(described)
    (root / DATASET_FILE).write_text(json.dumps(described))


def test_an_opened_index_says_what_was_written(index, tmp_path):
    again = Index.open(tmp_path)
    assert len(again) == 100 and again.name == "numbers" and again.classes == ("even", "odd")
    assert dict(again.splits) == {"train": range(70), "val": range(70, 90), "test": range(90, 100)}
    assert list(again.splits) == ["train", "val", "test"]
    np.testing.assert_array_equal(again.height, np.arange(100) + 1)
    np.testing.assert_array_equal(again.width, np.arange(100) + 2)
    np.testing.assert_array_equal(again.split, np.repeat([0, 1, 2], [70, 20, 10]))
    assert again.key[99] == b"picture_99" and again.digest == index.digest
    for name, dtype in COLUMNS.items():
        column = getattr(again, name)
        assert column.dtype.kind == dtype.kind and not column.flags.writeable
        assert dtype.kind == "S" or column.dtype == dtype
    assert content_errors(again) == []


def test_read_returns_the_pictures_in_the_order_asked_for(index, contents):
    samples = np.random.default_rng(1).integers(0, 100, 200)
    for sample, picture in zip(samples, index.read(samples), strict=True):
        assert picture.dtype == np.uint8
        np.testing.assert_array_equal(picture, contents[sample])


def test_threads_may_read_at_once_with_fewer_descriptors_than_shards(index, contents, monkeypatch):
    monkeypatch.setattr(index_module, "_MAX_OPEN_SHARDS", 2)

    def read(seed: int) -> bool:
        samples = np.random.default_rng(seed).integers(0, 100, 50)
        return bool((np.stack(index.read(samples)) == contents[samples]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(40)))


def test_an_index_travels_to_another_process_as_its_path(index):
    assert len(pickle.dumps(index)) < 1000
    copy = pickle.loads(pickle.dumps(index))
    assert copy.digest == index.digest and (copy.read([3])[0] == index.read([3])[0]).all()


def test_a_row_that_does_not_exist_is_refused(index):
    for sample in (-1, 100):
        with pytest.raises(IndexError, match=rf"sample {sample} .*'numbers' of 100"):
            index.read([sample])


def test_a_shard_cut_after_opening_is_named_with_the_key(index, tmp_path):
    shard = tmp_path / "train-000002.tar"
    shard.write_bytes(shard.read_bytes()[: 5 * SIZE + 3])
    assert len(index.read([44])) == 1
    with pytest.raises(OSError, match=r"sample 45 \(train-000002.tar, key picture_45\).*ends after 3 of them"):
        index.read([45])


def test_a_shard_missing_or_of_another_length_is_refused_at_opening(index, tmp_path):
    shard = tmp_path / "train-000002.tar"
    shard.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"train-000002.tar has 5 bytes, 740 were written"):
        Index.open(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000002.tar is missing"):
        Index.open(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../secret.tar", "/etc/passwd", "deeper/a.tar", "..", ".", "", ".hidden.tar", "a\0b.tar", "a\\b.tar", "a.tar\n"],
)
def test_a_shard_name_that_leads_out_of_the_root_is_refused(index, tmp_path, name):
    shards = json.loads((tmp_path / DATASET_FILE).read_text())["shards"]
    redescribe(tmp_path, shards=[shards[0] | {"name": name}, *shards[1:]])
    with pytest.raises(ValueError, match="not a plain file name"):
        Index.open(tmp_path)


def test_a_link_in_the_place_of_a_shard_is_refused_before_and_after_opening(index, tmp_path):
    shard = tmp_path / "train-000001.tar"
    secret = shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(secret)
    with pytest.raises(ValueError, match=r"train-000001.tar is a symbolic link"):
        Index.open(tmp_path)
    with pytest.raises(OSError, match=r"cannot read sample 20 \(train-000001.tar, key picture_20\)"):
        index.read([20])


def test_an_edited_description_is_noticed(index, tmp_path):
    file = tmp_path / DATASET_FILE
    file.write_text(file.read_text().replace('"odd"', '"queer"'))
    with pytest.raises(ValueError, match="does not agree with its own digest"):
        Index.open(tmp_path)


def test_a_folder_without_a_set_is_named_with_the_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prepared data set.*data_prep.prepare NAME"):
        Index.open(tmp_path)


def test_a_damaged_column_is_named(index, tmp_path):
    column = tmp_path / "columns" / "offset.npy"
    column.write_bytes(column.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"offset.npy is damaged"):
        Index.open(tmp_path)
    np.save(column, np.zeros(100, dtype=np.int32))
    with pytest.raises(ValueError, match=r"offset.npy is int32\[100\], not int64\[100\]"):
        Index.open(tmp_path)


def test_splits_must_tile_the_rows(index, tmp_path):
    redescribe(tmp_path, splits={"train": [0, 70], "test": [80, 100]})
    with pytest.raises(ValueError, match="do not tile 100 rows"):
        Index.open(tmp_path)


def test_the_digest_changes_with_any_byte_of_a_shard_or_a_column(index, tmp_path):
    column = tmp_path / "columns" / "label.npy"
    labels = np.load(column)
    labels[7] += 1
    np.save(column, labels)
    assert content_errors(Index.open(tmp_path)) == [
        "columns/label.npy is not the file that was written: its SHA-256 has changed"
    ]
    described = json.loads((tmp_path / DATASET_FILE).read_text())
    redescribe(tmp_path, columns=described["columns"] | {"label": sha256_of(column)})
    assert Index.open(tmp_path).digest != index.digest


def sparse_set(root: Path, num_rows: int) -> Path:
    """A set of any number of rows that takes no room: its columns are holes in files."""
    (root / "columns").mkdir(parents=True)
    (root / "train-000000.tar").write_bytes(b"x" * SIZE)
    for name, dtype in COLUMNS.items():
        dtype = np.dtype("S24") if dtype.kind == "S" else dtype
        with (root / "columns" / f"{name}.npy").open("wb") as stream:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_rows,)}
            np.lib.format.write_array_header_1_0(stream, header)
            stream.truncate(stream.tell() + num_rows * dtype.itemsize)
    sha256 = hashlib.sha256(b"x" * SIZE).hexdigest()
    content = {
        "format": index_module.FORMAT,
        "name": "holes",
        "num_rows": num_rows,
        "splits": {"train": [0, num_rows]},
        "linked": False,
        "classes": ["a"],
        "columns": dict.fromkeys(COLUMNS, ""),
        "shards": [{"name": "train-000000.tar", "size": SIZE, "sha256": sha256}],
    }
    (root / DATASET_FILE).write_text(json.dumps({"digest": index_module._digest(content), **content}))
    return root


def test_opening_costs_the_same_at_a_thousand_and_at_a_hundred_million_rows(tmp_path):
    small, large = sparse_set(tmp_path / "small", 10**3), sparse_set(tmp_path / "large", 10**8)

    def cost(root: Path) -> tuple[float, int]:
        """(seconds, bytes read), the least of a few tries."""
        tries = []
        for _ in range(7):
            begin, read = time.perf_counter(), bytes_read()
            index = Index.open(root)
            index.height[len(index) // 2], index.key[len(index) - 1]
            tries.append((time.perf_counter() - begin, bytes_read() - read))
        return min(tries)

    (small_s, small_bytes), (large_s, large_bytes) = cost(small), cost(large)
    assert large_s < 3 * small_s + 0.01
    assert max(small_bytes, large_bytes) < 200_000, "the large columns are 4.9 GB"


def bytes_read() -> int:
    """Bytes this process has read so far, by read() and its like."""
    return int(Path("/proc/self/io").read_text().split()[1])
