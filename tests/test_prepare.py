"""Preparing: a folder of pictures becomes shards that webdataset and tar read, whole or not at all."""

import io
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image, ImageOps

from conftest import wait_until
from data_prep.check import check
from data_prep.index import Index
from data_prep.prepare import CorruptPictures, main, prepare
from make_pictures import awkward_pictures, broken_pictures, jpeg, plain_pictures, rotated, smooth, write_files
from preparing import labels, make, mat, picture

ROOT = Path(__file__).resolve().parents[1]


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


def test_the_command_line_explains_itself():
    run = subprocess.run(
        [sys.executable, "-m", "data_prep.prepare", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for word in ("flowers102", "--source", "--out", "--short-side", "--skip-corrupt", "--workers"):
        assert word in run.stdout
