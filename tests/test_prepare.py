"""Preparing: any official layout becomes shards that webdataset and tar read, whole or not at all."""

import gzip
import io
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import webdataset
from PIL import Image, ImageOps

from conftest import wait_until
from data_prep.check import check
from data_prep.index import Index
from data_prep.layouts import split_of_path
from data_prep.prepare import CorruptPictures, main, prepare
from make_pictures import awkward_pictures, broken_pictures, encode, jpeg, plain_pictures, rotated, smooth, write_files

ROOT = Path(__file__).resolve().parents[1]


def make(name: str, source: Path | None, out: Path, **options) -> Index:
    """Prepare in this process, without a bar."""
    return prepare(name, source, out, **({"workers": 1, "progress": False} | options))


def keys(index: Index, split: str) -> list[str]:
    return [index.key[row].decode() for row in index.splits[split]]


def labels(index: Index) -> dict[str, int]:
    return {key.decode(): int(label) for key, label in zip(index.key, index.label, strict=True)}


def picture(index: Index, key: str) -> bytes:
    return index.read(np.flatnonzero(index.key == key.encode()))[0].tobytes()


def tar_of(files: dict[str, bytes], compress: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, contents in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return gzip.compress(buffer.getvalue(), 1) if compress else buffer.getvalue()


def mat(**arrays) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, arrays)
    return buffer.getvalue()


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A folder of three classes in three splits, 14 pictures, one of them without a label."""
    files = {f"train/{c}/p{i}.jpg": jpeg(10 * i + ord(c)) for c in "abc" for i in range(3)}
    files |= {f"val/{c}/q.jpg": jpeg(ord(c)) for c in "ab"} | {f"test/{c}/r.jpg": jpeg(ord(c) + 1) for c in "bc"}
    return write_files(tmp_path / "few", files | {"train/nobody_knows.jpg": jpeg(99), "train/a/readme.txt": b"hello"})


# webdataset's reader leaves closing its files to the garbage collector.
reads_with_webdataset = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


# What comes out


@reads_with_webdataset
def test_webdataset_and_tar_read_what_was_written(few, tmp_path):
    index = make("folder", few, tmp_path / "out", pictures_per_shard=4)
    shards = [str(index.root / shard.name) for shard in index.shards]
    read = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert [sample["__key__"].encode() for sample in read] == index.key.tolist()
    assert [int(sample["cls"]) for sample in read] == index.label.tolist()
    for sample, row in zip(read, index.read(range(len(index))), strict=True):
        assert sample["jpg"] == row.tobytes()
    decoded = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("rgb8").to_tuple("jpg", "cls")
    assert [pixels.shape[:2] for pixels, _ in decoded] == list(zip(index.height, index.width, strict=True))
    listed = subprocess.run(["tar", "tf", shards[0]], capture_output=True, text=True, check=True).stdout.split()
    assert listed == [f"train/a/p{i}.{kind}" for i in range(3) for kind in ("cls", "jpg")] + [
        "train/b/p0.cls",
        "train/b/p0.jpg",
    ]


def test_the_index_points_at_the_members_that_tarfile_finds(few, tmp_path):
    index = make("folder", few, tmp_path / "out")
    for row in range(len(index)):
        with tarfile.open(index.root / index.shards[index.shard[row]].name) as tar:
            member = tar.extractfile(f"{index.key[row].decode()}.jpg")
            assert member.read() == index.read([row])[0].tobytes()


def test_a_folder_gives_its_splits_classes_and_unlabelled_pictures(few, tmp_path):
    index = make("folder", few, tmp_path / "out")
    assert index.name == "few" and index.classes == ("a", "b", "c")
    assert dict(index.splits) == {"train": range(10), "val": range(10, 12), "test": range(12, 14)}
    found = labels(index)
    assert found["train/c/p0"] == 2 and found["test/b/r"] == 1 and found["train/nobody_knows"] == -1
    assert index.prepared["num_ignored"] == 1
    assert check(index.root, workers=1, progress=False) == []


def test_a_folder_without_splits_is_all_train_and_half_named_splits_are_refused(tmp_path):
    plain = write_files(tmp_path / "plain", {"x/1.jpg": jpeg(1), "y/deep/2.jpg": jpeg(2), "3.jpg": jpeg(3)})
    index = make("folder", plain, tmp_path / "out")
    assert labels(index) == {"3": -1, "x/1": 0, "y/deep/2": 1} and list(index.splits) == ["train"]
    mixed = write_files(tmp_path / "mixed", {"train/1.jpg": jpeg(1), "extra/2.jpg": jpeg(2)})
    with pytest.raises(ValueError, match=r"named like splits \(train\) beside others \(extra\)"):
        make("folder", mixed, tmp_path / "out2")


@reads_with_webdataset
def test_keys_have_no_dots_and_stay_apart(tmp_path):
    names = ("cat.jpg", "cat.jpeg", "c.a.t.jpg", "c_a_t.jpg", "two words.jpg", "\N{SNOWMAN}.jpg")
    source = write_files(tmp_path / "in", {name: jpeg(i) for i, name in enumerate(names)})
    index = make("folder", source, tmp_path / "out")
    found = {key.decode() for key in index.key.tolist()}
    assert found == {"cat", "cat-2", "c_a_t", "c_a_t-2", "two_words", "\N{SNOWMAN}"}
    assert (
        len(list(webdataset.WebDataset(str(index.root / "train-000000.tar"), shardshuffle=False, empty_check=False)))
        == 6
    )


def test_the_result_does_not_depend_on_the_number_of_workers(few, tmp_path):
    one = make("folder", few, tmp_path / "one", pictures_per_shard=3)
    three = make("folder", few, tmp_path / "three", pictures_per_shard=3, workers=3)
    assert len(one.shards) == 6
    assert one.digest == three.digest


# Pictures


def test_awkward_pictures_come_out_as_a_viewer_shows_them(tmp_path):
    awkward = awkward_pictures()
    index = make("folder", write_files(tmp_path / "in", awkward), tmp_path / "out")
    for name, contents in awkward.items():
        out = Image.open(io.BytesIO(picture(index, Path(name).stem)))
        seen = ImageOps.exif_transpose(Image.open(io.BytesIO(contents)))
        if name == "transparent.png":
            paper = Image.new("RGBA", seen.size, "white")
            seen = Image.alpha_composite(paper, seen)
        if name == "grey_16_bit.png":
            seen = Image.fromarray((np.asarray(seen) // 257).astype(np.uint8))
        expected = np.asarray(seen.convert("RGB"), dtype=np.float32)
        assert (out.format, out.mode, out.size) == ("JPEG", "RGB", seen.size), name
        assert not out.getexif() and out.info.get("icc_profile") is None, name
        # JPEG at 95 errs by a level or two on smooth pictures; on one-bit dithering by more.
        error = np.abs(np.asarray(out, dtype=np.float32) - expected).mean()
        assert error < (5 if name in ("bilevel.png", "palette.png", "animation.gif") else 1.5), (name, error)


def test_plain_pictures_are_copied_byte_for_byte(tmp_path):
    plain = plain_pictures()
    index = make("folder", write_files(tmp_path / "in", plain), tmp_path / "out")
    for name, contents in plain.items():
        assert picture(index, Path(name).stem) == contents, name
    assert index.prepared["num_reencoded"] == 0


def test_dali_decodes_everything_that_was_written_to_pillows_pixels(tmp_path):
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    index = make("folder", write_files(tmp_path / "in", plain_pictures() | awkward_pictures()), tmp_path / "out")
    pictures = index.read(range(len(index)))

    @pipeline_def(batch_size=len(pictures), num_threads=1, device_id=None)
    def decode():
        return fn.decoders.image(fn.external_source(source=lambda: pictures), device="cpu", adjust_orientation=True)

    pipeline = decode()
    pipeline.build()
    (decoded,) = pipeline.run()
    for row, encoded in enumerate(pictures):
        expected = np.asarray(Image.open(io.BytesIO(encoded.tobytes())).convert("RGB"))
        assert expected.shape == (index.height[row], index.width[row], 3)
        np.testing.assert_array_equal(np.array(decoded.at(row)), expected, err_msg=index.where(row))


def test_short_side_shrinks_the_larger_and_leaves_the_smaller(tmp_path):
    files = {"wide.jpg": jpeg(1, 90, 200), "tall.jpg": jpeg(2, 333, 100), "small.jpg": jpeg(3, 40, 300)}
    files |= {"turned.jpg": rotated(6)}  # 60 x 80 lying on its side
    index = make("folder", write_files(tmp_path / "in", files), tmp_path / "out", short_side=45)
    sizes = {key.decode(): size for key, *size in zip(index.key, index.height, index.width, strict=True)}
    assert sizes == {"wide": [45, 100], "tall": [150, 45], "small": [40, 300], "turned": [60, 45]}
    assert picture(index, "small") == files["small.jpg"]
    slow = Image.fromarray(smooth(1, 90, 200)).resize((100, 45), Image.Resampling.LANCZOS)
    error = np.abs(np.asarray(Image.open(io.BytesIO(picture(index, "wide"))), dtype=np.float32) - np.asarray(slow))
    assert error.mean() < 2


def test_corrupt_pictures_are_named_and_nothing_is_published(few, tmp_path, capsys):
    broken = broken_pictures()
    write_files(few / "train" / "a", broken)
    out = tmp_path / "out"
    command = {"name": "folder", "out": out, "source": few, "workers": 1}
    assert main(command.pop("name"), **command) == 1
    said = capsys.readouterr().err
    for name in broken:
        assert re.search(rf"does not decode: train/a/{name}: \w+", said), name
    assert f"{len(broken)} pictures do not decode" in said and "--skip-corrupt" in said
    assert not out.exists()

    # Permission given later publishes what is done already: the source is not even read again.
    pictures = [path for path in few.rglob("*.jpg") if path.name not in broken]
    for path in pictures:
        path.write_bytes(bytes(path.stat().st_size))
    assert main("folder", **command, skip_corrupt=True) == 0
    index = Index.open(out)
    assert len(index) == 14 and len(index.prepared["corrupt"]) == len(broken)
    assert check(out, workers=1, progress=False) == []
    assert not out.with_name("out.partial").exists()
    assert main("folder", **command, skip_corrupt=True) == 0
    assert main("folder", **command) == 1


def test_a_repaired_source_needs_no_permission(few, tmp_path):
    write_files(few, {"train/a/p1.jpg": jpeg(7)[:200]})
    with pytest.raises(CorruptPictures, match="1 pictures do not decode"):
        make("folder", few, tmp_path / "out")
    write_files(few, {"train/a/p1.jpg": jpeg(7)})
    assert len(make("folder", few, tmp_path / "out")) == 14


# Whole or not at all


def test_the_same_command_again_does_nothing(few, tmp_path, capsys):
    command = {"out": tmp_path / "out", "source": few, "workers": 1}
    assert main("folder", **command) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert main("folder", **command) == 0
    assert "already prepared; nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_other_options_or_another_source_are_refused(few, tmp_path):
    out = tmp_path / "out"
    make("folder", few, out)
    with pytest.raises(ValueError, match=r"with other options .*choose another --out, or remove it"):
        make("folder", few, out, short_side=20)
    write_files(few, {"train/a/new.jpg": jpeg(1)})
    with pytest.raises(ValueError, match="another source"):
        make("folder", few, out)


def test_a_folder_of_something_else_is_not_touched(few, tmp_path):
    out = write_files(tmp_path / "precious", {"thesis.txt": b"years of work"})
    with pytest.raises(ValueError, match="is not a prepared data set"):
        make("folder", few, out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_failed_run_leaves_nothing(tmp_path):
    source = write_files(tmp_path / "in", {"102flowers.tgz": b"not gzip", "imagelabels.mat": mat(labels=[[1]])})
    write_files(source, {"setid.mat": mat(trnid=[[1]], valid=[[1]], tstid=[[1]])})
    with pytest.raises(ValueError, match=r"102flowers.tgz is damaged .*download it again"):
        make("flowers102", source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_killed_run_leaves_nothing_that_looks_whole_and_the_next_one_starts_over(tmp_path):
    source = write_files(tmp_path / "in", {f"{i:03d}.jpg": jpeg(i % 9, 500, 600) for i in range(160)})
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    options = ["--short-side", "32", "--pictures-per-shard", "4", "--workers", "2"]
    command = [sys.executable, "-m", "data_prep.prepare", "folder", "--source", source, "--out", out, *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        wait_until(lambda: len(list(partial.glob("set/*.tar"))) >= 4 or run.poll() is not None)
        assert run.poll() is None, run.stdout.read()
        with pytest.raises(ValueError, match=r"another run is at work in .*out.partial"):
            make("folder", source, out)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert not out.exists() and not list(partial.rglob("dataset.json"))
    wait_until(lambda: not any(alive(int(child)) for child in children))

    again = prepare("folder", source, out, short_side=32, pictures_per_shard=4, workers=1, progress=False)
    assert len(again) == 160 and not partial.exists()
    assert check(out, workers=1, progress=False) == []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_arguments_that_mean_nothing_are_refused(few, tmp_path, capsys):
    for name, source, options, said in (
        ("mnist", few, {}, "unknown data set 'mnist'; known: flowers102"),
        ("digits", few, {}, "--source has no meaning"),
        ("shards", few, {"short_side": 9}, "--short-side has no meaning"),
        ("folder", few, {"short_side": 0}, "--short-side must be at least 1, got 0"),
        ("imagenet", None, {}, r"no public address .*--source FOLDER"),
        ("folder", None, {}, r"--source FOLDER"),
    ):
        with pytest.raises(ValueError, match=said):
            make(name, source, tmp_path / "out", **options)
    assert main("folder", out=tmp_path / "out", source=tmp_path / "nowhere") == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


# The data sets


def test_digits_need_nothing_and_are_stratified(tmp_path):
    index = make("digits", None, tmp_path / "out")
    assert {split: len(rows) for split, rows in index.splits.items()} == {"train": 1198, "val": 299, "test": 300}
    for rows in index.splits.values():
        counts = np.bincount(index.label[rows.start : rows.stop], minlength=10)
        assert counts.max() - counts.min() <= 0.05 * len(rows)
    assert set(index.height) == set(index.width) == {32}
    assert check(index.root, workers=1, progress=False) == []


@pytest.mark.parametrize("packed", [True, False])
def test_flowers102_follows_setid_and_imagelabels(tmp_path, packed):
    pictures = {f"jpg/image_{i:05d}.jpg": jpeg(i) for i in range(1, 8)}
    files = {"102flowers.tgz": tar_of(pictures, compress=True)} if packed else pictures
    mats = {
        "imagelabels.mat": mat(labels=[[3, 1, 2, 3, 1, 2, 1]]),
        "setid.mat": mat(trnid=[[4, 1]], valid=[[2]], tstid=[[7, 3, 5]]),
    }
    index = make("flowers102", write_files(tmp_path / "in", files | mats), tmp_path / "out")
    assert keys(index, "train") == ["image_00001", "image_00004"] and keys(index, "val") == ["image_00002"]
    assert keys(index, "test") == ["image_00003", "image_00005", "image_00007"]
    assert keys(index, "spare") == ["image_00006"]
    assert [labels(index)[f"image_{i:05d}"] for i in range(1, 8)] == [2, 0, 1, 2, 0, 1, 0]
    assert picture(index, "image_00003") == pictures["jpg/image_00003.jpg"]
    assert not (tmp_path / "out.partial").exists()


def test_flowers102_have_their_names(tmp_path):
    files = {f"jpg/image_{i:05d}.jpg": jpeg(0, 8, 8) for i in (1, 2)}
    mats = {"imagelabels.mat": mat(labels=[[77, 102]]), "setid.mat": mat(trnid=[[1]], valid=[[2]], tstid=[[]])}
    index = make("flowers102", write_files(tmp_path / "in", files | mats), tmp_path / "out")
    assert len(index.classes) == 102 and index.classes[index.label[0]] == "passion flower"


@pytest.mark.parametrize("packed", [True, False])
def test_pets_take_a_tenth_of_trainval_for_val_and_keep_what_is_in_no_list(tmp_path, packed):
    breeds = ["Abyssinian", "american_bulldog"]
    listed = [f"{breed}_{i}" for breed in breeds for i in range(20)]
    pictures = {f"images/{key}.jpg": jpeg(i, 16, 20) for i, key in enumerate([*listed, "Abyssinian_100"])}
    lines = {key: f"{key} {1 + (key > 'a')} 1 1\n" for key in listed}
    annotations = {
        "annotations/trainval.txt": "".join(lines[key] for key in listed[::2]).encode(),
        "annotations/test.txt": "".join(lines[key] for key in listed[1::2]).encode(),
        "annotations/trimaps/._Abyssinian_100.png": b"macOS was here",
    }
    pictures["images/Abyssinian_100.mat"] = b"left behind by the authors"
    pictures["images/._Abyssinian_1.jpg"] = b"macOS was here"
    files = {**pictures, **annotations}
    if packed:
        files = {"images.tar.gz": tar_of(pictures, True), "annotations.tar.gz": tar_of(annotations, True)}
    index = make("pets", write_files(tmp_path / "in", files), tmp_path / "out")
    assert index.classes == ("Abyssinian", "american_bulldog")
    assert sorted(keys(index, "train") + keys(index, "val")) == sorted(listed[::2])
    assert len(keys(index, "train")) == 18 and keys(index, "test") == sorted(listed[1::2])
    assert keys(index, "spare") == ["Abyssinian_100"]
    assert all(label == (key > "a") for key, label in labels(index).items())


@pytest.mark.parametrize("packed", [True, False])
def test_food101_takes_a_tenth_of_train_for_val(tmp_path, packed):
    classes = ["apple_pie", "waffles"]
    listed = [f"{name}/{1000 + i}" for name in classes for i in range(15)]
    files = {f"food-101/images/{key}.jpg": jpeg(i, 16, 20) for i, key in enumerate(listed)}
    train = [key for i, key in enumerate(listed) if i % 3]
    test = listed[::3]
    files |= {
        "food-101/meta/classes.txt": "\n".join(classes).encode(),
        "food-101/meta/train.txt": "\n".join(train).encode(),
        "food-101/meta/test.txt": "\n".join(test).encode(),
    }
    source = write_files(tmp_path / "in", {"food-101.tar.gz": tar_of(files, True)} if packed else files)
    index = make("food101", source, tmp_path / "out")
    assert sorted(keys(index, "train") + keys(index, "val")) == sorted(train) and keys(index, "test") == sorted(test)
    assert len(keys(index, "val")) == 2 and index.classes == ("apple_pie", "waffles")
    assert all(label == key.startswith("waffles") for key, label in labels(index).items())
    if not packed:
        inside = make("food101", source / "food-101", tmp_path / "inside")
        assert keys(inside, "val") == keys(index, "val")


def test_food101_with_a_listed_picture_missing_is_refused(tmp_path):
    meta = {"classes.txt": b"a", "train.txt": b"a/1\na/2", "test.txt": b""}
    files = {f"food-101/meta/{name}": text for name, text in meta.items()} | {"food-101/images/a/1.jpg": jpeg(0)}
    with pytest.raises(ValueError, match=r"1 pictures named by meta/train.txt and meta/test.txt .* a/2 first"):
        make("food101", write_files(tmp_path / "in", files), tmp_path / "out")


@pytest.mark.parametrize("listed", [True, False])
def test_sun397_follows_tfds_lists_where_they_are_and_else_seventy_ten_twenty(tmp_path, listed):
    names = [f"/a/abbey/sun_{i}" for i in range(10)] + [f"/c/car_interior/backseat/sun_{i}" for i in range(10)]
    files = {f"SUN397{name}.jpg": jpeg(i, 16, 20) for i, name in enumerate(names)}
    files["SUN397/ClassName.txt"] = b"/a/abbey\n/c/car_interior/backseat\n"
    source = write_files(tmp_path / "in", {"SUN397.tar.gz": tar_of(files, True)})
    if listed:
        for short, part in (("tr", names[::2]), ("va", names[1:4:2]), ("te", names[5::2])):
            (source / f"sun397_tfds_{short}.txt").write_text("".join(f"{name}.jpg\n" for name in part))
    index = make("sun397", source, tmp_path / "out")
    counts = {split: len(rows) for split, rows in index.splits.items()}
    if listed:
        assert keys(index, "train") == [name[1:] for name in names[::2]]
        assert counts == {"train": 10, "val": 2, "test": 8}
    else:
        assert counts == {"train": 14, "val": 2, "test": 4}
    assert index.classes == ("a/abbey", "c/car_interior/backseat")
    assert all(label == key.startswith("c") for key, label in labels(index).items())


def imagenet_files() -> tuple[dict[str, bytes], dict[str, bytes], dict[str, bytes]]:
    """(training pictures, validation pictures, development kit) of a world of two classes."""
    wnids = ("n02000002", "n01000001")  # the kit numbers classes in an order of its own
    train = {f"{wnid}/{wnid}_{i}.JPEG": jpeg(i, 16, 20) for wnid in wnids for i in range(100)}
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(i, 16, 20) for i in range(4)}
    kind = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "i4")]
    rows = [(1, wnids[0], "hen", "", 0), (2, wnids[1], "cock, rooster", "", 0), (3, "n03000003", "bird", "", 2)]
    kit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": mat(synsets=np.array(rows, dtype=kind)),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n2\n1\n",
    }
    return train, val, kit


def test_imagenet_reads_tars_of_tars_and_labels_val_by_the_kit(tmp_path):
    train, val, kit = imagenet_files()
    inner = {}
    for wnid in ("n02000002", "n01000001"):
        inner[f"{wnid}.tar"] = tar_of({Path(n).name: p for n, p in train.items() if n.startswith(wnid)})
    files = {
        "ILSVRC2012_img_train.tar": tar_of(inner),
        "ILSVRC2012_img_val.tar": tar_of(val),
        "ILSVRC2012_devkit_t12.tar.gz": tar_of(kit, compress=True),
    }
    index = make("imagenet", write_files(tmp_path / "in", files), tmp_path / "out")
    assert {split: len(rows) for split, rows in index.splits.items()} == {"train": 196, "val": 2, "test": 4, "spare": 2}
    assert index.classes == ("cock, rooster", "hen")
    found = labels(index)
    assert all(found[key] == key.startswith("n02") for key in found if key.startswith("n0"))
    assert [found[key] for key in keys(index, "test")] == [1, 0, 0, 1]
    for name, contents in train.items():
        assert picture(index, name.removesuffix(".JPEG")) == contents


def test_imagenet_as_class_folders_gives_the_same_members(tmp_path):
    train, val, kit = imagenet_files()
    wnids = ("n02000002", "n01000001", "n01000001", "n02000002")
    tree = {f"train/{name}": p for name, p in train.items()}
    tree |= {f"val/{wnid}/{name}": p for wnid, (name, p) in zip(wnids, val.items(), strict=True)}
    index = make("imagenet", write_files(tmp_path / "tree", tree), tmp_path / "out")
    assert index.classes == ("n01000001", "n02000002")
    assert [labels(index)[key] for key in keys(index, "test")] == [1, 0, 0, 1]
    flat = {f"train/{name}": p for name, p in train.items()} | {f"val/{name}": p for name, p in val.items()}
    with pytest.raises(FileNotFoundError, match=r"lacks ILSVRC2012_devkit_t12.tar.gz"):
        make("imagenet", write_files(tmp_path / "flat", flat), tmp_path / "out2")
    with_kit = make("imagenet", write_files(tmp_path / "flat", kit), tmp_path / "out2")
    assert keys(with_kit, "val") == keys(index, "val") and labels(with_kit) == labels(index)


# Shards that exist


def foreign_shards(folder: Path) -> dict[str, bytes]:
    """Shards as webdataset's own writer makes them, in all the dialects; key -> encoded picture."""
    folder.mkdir()
    image = Image.fromarray(smooth(3))
    kinds = {"jpg": rotated(6), "png": encode(image, "PNG"), "jpeg": jpeg(4), "webp": encode(image, "WEBP")}
    pictures = {}
    (folder / "val").mkdir()
    for shard in (folder / "train-0001.tar", folder / "train-0000.tar", folder / "val" / "0000.tar"):
        with webdataset.TarWriter(str(shard), encoder=False) as writer:
            for kind, encoded in kinds.items():
                key = f"{shard.stem}/{kind}"
                label = {"json": b'{"label": 2, "width": 1}'} if kind == "jpeg" else {"cls": b"1"}
                label = {"txt": b"a caption only"} if kind == "webp" else label
                writer.write({"__key__": key, kind: encoded, **label})
                pictures[key] = encoded
            writer.write({"__key__": f"{shard.stem}/none", "json": b"{}"})
    return pictures


def test_shards_of_webdatasets_own_writer_are_indexed_where_they_are(tmp_path):
    source = tmp_path / "elsewhere"
    pictures = foreign_shards(source)
    before = {path: path.read_bytes() for path in source.rglob("*.tar")}
    index = make("shards", source, tmp_path / "out", workers=2)
    assert [shard.name for shard in index.shards] == ["train-0000.tar", "train-0001.tar", "val-0000.tar"]
    assert dict(index.splits) == {"train": range(8), "val": range(8, 12)} and index.name == "elsewhere"
    assert index.classes == ("0", "1", "2")
    assert [labels(index)[f"train-0000/{kind}"] for kind in ("jpg", "png", "jpeg", "webp")] == [1, 1, 2, -1]
    for key, contents in pictures.items():
        assert picture(index, key) == contents
    assert (index.height[0], index.width[0]) == (80, 60), "the size of the upright picture"
    assert index.prepared["num_without_picture"] == 3
    assert before == {path: path.read_bytes() for path in source.rglob("*.tar")}
    assert (source / "train-0000.tar").samefile(tmp_path / "out" / "train-0000.tar")
    assert check(index.root, workers=1, progress=False) == []


def test_shards_on_another_file_system_are_linked_and_may_be(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if Path(elsewhere).stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm is on the same file system")
        source = write_files(Path(elsewhere), {"a.tar": tar_of({"1.jpg": jpeg(1), "1.cls": b"0"})})
        index = make("shards", source, tmp_path / "out")
        assert (index.root / "a.tar").is_symlink()
        assert Index.open(index.root).read([0])[0].tobytes() == jpeg(1)
        assert check(index.root, workers=1, progress=False) == []
    with pytest.raises(FileNotFoundError, match=r"a.tar is missing"):
        Index.open(index.root)


def test_shards_of_img2dataset_are_indexed(tmp_path):
    source = write_files(tmp_path / "laion", {"00000.parquet": b"PAR1", "00000_stats.json": b"{}"})
    with webdataset.ShardWriter(str(source / "%05d.tar"), maxcount=2, verbose=0) as writer:
        for i in range(5):
            record = {"caption": "x", "url": "https://example.org", "status": "success", "key": f"{i:09d}"}
            writer.write({"__key__": f"{i:09d}", "jpg": jpeg(i), "txt": "a caption", "json": record})
    index = make("shards", source, tmp_path / "out")
    assert len(index.shards) == 3 and set(index.label) == {-1}
    assert [key.decode() for key in index.key.tolist()] == [f"{i:09d}" for i in range(5)]


def test_shards_take_names_from_classes_txt_and_refuse_labels_beyond_them(tmp_path):
    source = tmp_path / "elsewhere"
    foreign_shards(source)
    (source / "classes.txt").write_text("ant\nbee\ncat\n")
    assert make("shards", source, tmp_path / "out").classes == ("ant", "bee", "cat")
    (source / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match="label 2 is beyond the 2 classes"):
        make("shards", source, tmp_path / "out2")


def test_bad_shards_are_refused_by_name(tmp_path):
    packed = write_files(tmp_path / "packed", {"a.tar.gz": tar_of({"1.jpg": jpeg(1)}, True)})
    with pytest.raises(ValueError, match=r"a.tar.gz is compressed .*decompress it"):
        make("shards", packed, tmp_path / "out")
    cut = write_files(tmp_path / "cut", {"a.tar": tar_of({"1.jpg": jpeg(1)})[:900]})
    with pytest.raises(ValueError, match=r"a.tar is not a whole, uncompressed tar"):
        make("shards", cut, tmp_path / "out")
    named = write_files(tmp_path / "named", {"a.tar": tar_of({"1.jpg": jpeg(1), "1.cls": b"cat"})})
    with pytest.raises(ValueError, match=r"sample 1 of .*a.tar has label 'cat', which is not a number"):
        make("shards", named, tmp_path / "out")


def test_a_corrupt_picture_in_a_foreign_shard_is_left_out_of_the_index(tmp_path):
    files = {"1.jpg": jpeg(1), "2.jpg": jpeg(2)[:300], "3.jpg": jpeg(3)}
    source = write_files(tmp_path / "in", {"a.tar": tar_of(files)})
    with pytest.raises(CorruptPictures):
        make("shards", source, tmp_path / "out")
    index = make("shards", source, tmp_path / "out", skip_corrupt=True)
    assert [key.decode() for key in index.key] == ["1", "3"]
    assert [name for name, _ in index.prepared["corrupt"]] == ["a.tar: 2.jpg"]


def test_splits_are_read_from_the_names_of_shards():
    names = {"imagenet-train-{0000..0146}.tar": "train", "imagenet-val-000006.tar": "val", "test/0001.tar": "test"}
    names |= {"validation-00.tar": "val", "00000.tar": "train", "restraint-01.tar": "train"}
    assert {name: split_of_path(name) for name in names} == names


def test_the_command_line_explains_itself():
    run = subprocess.run(
        [sys.executable, "-m", "data_prep.prepare", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for word in ("flowers102", "--source", "--out", "--short-side", "--skip-corrupt", "--workers"):
        assert word in run.stdout
