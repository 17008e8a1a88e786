"""The data sets that have a layout of their own: splits, classes and labels are the official ones."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.check import check
from make_pictures import jpeg, write_files
from preparing import keys, labels, make, mat, picture, tar_of


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
