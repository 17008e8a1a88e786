"""Shards that somebody else wrote are indexed where they are, and nothing in them is changed."""

import tempfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from data_prep.check import check
from data_prep.index import Index
from data_prep.layouts import split_of_path
from data_prep.prepare import CorruptPictures
from make_pictures import encode, jpeg, rotated, smooth, write_files
from preparing import labels, make, picture, tar_of


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
