"""What the official archives of each data set hold: which file is which class, and in which split.

One function per data set takes the `Source` folder and returns a `Listing`. Splits are those the paper's
configs train and test on (table 5 and big_vision/configs/proj/distill/):

    flowers102   the official train / val / test (1020 / 1020 / 6149)
    pets         trainval -> train 90 %, val 10 %; test
    food101      train -> train 90 %, val 10 %; test (which TFDS calls `validation`)
    sun397       train 70 %, val 10 %, test 20 %, as TFDS divides it; see `sun397`
    imagenet     train -> train 98 %, spare 1 %, val 1 %; test: the 50,000 validation pictures

The reference takes percentages in the order of TFDS's shuffled files, which only TFDS can reproduce. Ours
are taken over a permutation seeded by SPLIT_SEED: the same for everybody who prepares the set with this
code, but not the reference's members. Pictures that no split uses go to `spare`; nothing is lost.

Rejected: torchvision's data set classes as the readers. They want everything unpacked into single files,
which for ImageNet is 1.3 million of them, and decode what we only want to copy.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from data_prep.archive import Source, Stored, files_below, members_of_tar, one

SPLIT_SEED = 2106_05237  # the paper's arXiv number
SPLITS = ("train", "val", "test", "spare")


class Item(NamedTuple):
    """One picture of a data set, before it is looked at."""

    split: str
    key: str
    label: int
    stored: Stored


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All pictures of a data set, in the source's order within each split."""

    name: str
    classes: tuple[str, ...]
    items: list[Item]
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Files that are not pictures, by their names: how each kind ends -> how many."""


def flowers102(source: Source) -> Listing:
    """Oxford Flowers102: 102flowers.tgz (or its folder jpg/), imagelabels.mat, setid.mat."""
    from scipy.io import loadmat

    labels = loadmat(source.get("imagelabels.mat"))["labels"].ravel()
    sets = loadmat(source.get("setid.mat"))
    pictures = source.members("jpg", "102flowers.tgz", "102flowers.tar")
    by_number = {int(m[1]): p for p in pictures if (m := re.search(r"image_(\d{5})\.jpg$", p.name))}
    split_of = {
        int(number): split
        for split, field in (("train", "trnid"), ("val", "valid"), ("test", "tstid"))
        for number in sets[field].ravel()
    }
    if missing := sorted(split_of.keys() - by_number.keys()):
        raise ValueError(f"{len(missing)} pictures of setid.mat are not in the archive, image_{missing[0]:05d} first")
    items = [
        Item(split_of.get(number, "spare"), f"image_{number:05d}", int(labels[number - 1]) - 1, by_number[number])
        for number in sorted(by_number)
    ]
    return Listing(name="flowers102", classes=_flower_names(int(labels.max())), items=items)


def pets(source: Source) -> Listing:
    """Oxford-IIIT Pet: images.tar.gz and annotations.tar.gz, or their folders images/ and annotations/."""
    annotations = source.members("annotations", "annotations.tar.gz", "annotations.tar")
    by_key = _pictures_by_stem(source.members("images", "images.tar.gz", "images.tar"))
    label_of: dict[str, int] = {}
    split_of: dict[str, str] = {}
    for file, split in (("trainval.txt", "train"), ("test.txt", "test")):
        for line in one(annotations, f"annotations/{file}").text().splitlines():
            key, label, *_ = line.split()
            label_of[key], split_of[key] = int(label) - 1, split
    _check_listed(split_of, by_key, "annotations")
    split_of |= _divide([k for k in sorted(split_of) if split_of[k] == "train"], {"train": 0.9, "val": 1.0})
    names = {label: _breed(key) for key, label in label_of.items()}
    label_of_breed = {breed: label for label, breed in names.items()}
    items = [
        Item(split_of.get(k, "spare"), k, label_of.get(k, label_of_breed.get(_breed(k), -1)), by_key[k])
        for k in sorted(by_key)
    ]
    return Listing(name="pets", classes=tuple(names[label] for label in range(len(names))), items=items)


def food101(source: Source) -> Listing:
    """Food-101: food-101.tar.gz, or the folder food-101/ with images/ and meta/."""
    members = source.members("food-101", "food-101.tar.gz", "food-101.tar", "images")
    meta = members if source.find("meta") is None else source.members("meta")
    classes = tuple(one(meta, "meta/classes.txt").text().split())
    by_key = _pictures_by_tail(members, depth=2)
    listed = {split: one(meta, f"meta/{split}.txt").text().split() for split in ("train", "test")}
    split_of = {key: split for split, keys in listed.items() for key in keys}
    _check_listed(split_of, by_key, "meta/train.txt and meta/test.txt")
    split_of |= _divide(sorted(listed["train"]), {"train": 0.9, "val": 1.0})
    label_of = {name: label for label, name in enumerate(classes)}
    items = [
        Item(split_of.get(key, "spare"), key, label_of.get(key.split("/")[0], -1), by_key[key])
        for key in sorted(by_key)
    ]
    return Listing(name="food101", classes=classes, items=items)


def sun397(source: Source) -> Listing:
    """SUN397: SUN397.tar.gz, or the folder SUN397/ with ClassName.txt.

    The paper uses TFDS's own division of all 108,754 pictures (76,128 / 10,875 / 21,750), not the official
    partitions of 50 + 50 pictures a class, which are not offered here. TFDS publishes its lists: put
    sun397_tfds_tr.txt, sun397_tfds_va.txt and sun397_tfds_te.txt into the source and the members are exactly
    the reference's. Without them the pictures are divided 70 / 10 / 20 % over our seeded permutation.
    """
    members = source.members("SUN397", "SUN397.tar.gz", "SUN397.tar")
    classes = tuple(line.strip("/ ") for line in one(members, "ClassName.txt").text().split())
    label_of = {name: label for label, name in enumerate(classes)}
    # /a/abbey/sun_x.jpg, but also /a/arch/.../: the key is everything below SUN397/
    by_key = {_without_suffix(p.name.rpartition("SUN397/")[2]): p for p in members if p.is_picture}
    lists = {
        split: source.find(f"sun397_tfds_{short}.txt")
        for split, short in (("train", "tr"), ("val", "va"), ("test", "te"))
    }
    if all(lists.values()):
        split_of = {
            _without_suffix(line.strip().strip("/")): split
            for split, file in lists.items()
            if file is not None
            for line in file.read_text(encoding="utf-8").splitlines()
            if line.strip()
        }
        _check_listed(split_of, by_key, "the lists sun397_tfds_*.txt")
    else:
        split_of = _divide(sorted(by_key), {"train": 0.7, "val": 0.8, "test": 1.0})
    items = [
        Item(split_of.get(key, "spare"), key, label_of.get(str(PurePosixPath(key).parent), -1), by_key[key])
        for key in sorted(by_key)
    ]
    return Listing(name="sun397", classes=classes, items=items)


def imagenet(source: Source) -> Listing:
    """ILSVRC 2012: the official tars with the development kit, or a tree of class folders.

    * ILSVRC2012_img_train.tar (a tar per class inside), or train/ with a folder or a tar per class;
    * ILSVRC2012_img_val.tar or a flat val/, both with ILSVRC2012_devkit_t12.tar.gz for the labels;
      or val/ with a folder per class.

    Labels are positions among the sorted WordNet ids, as in every published network. The names of the
    classes are the kit's words; without a kit the ids.
    """
    train = _imagenet_train(source)
    wnids = sorted({name.split("/")[0] for name in train})
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    kit = _imagenet_kit(source)
    keys = sorted(train)
    split_of = _divide(keys, {"train": 0.98, "spare": 0.99, "val": 1.0})
    items = [Item(split_of[key], key, label_of[key.split("/")[0]], train[key]) for key in keys]
    for key, wnid, picture in _imagenet_val(source, kit):
        if wnid not in label_of:
            raise ValueError(f"validation picture {key} is of class {wnid}, which has no training pictures")
        items.append(Item("test", key, label_of[wnid], picture))
    words = {} if kit is None else kit.words
    return Listing(name="imagenet", classes=tuple(words.get(wnid, wnid) for wnid in wnids), items=items)


def folder(source: Source) -> Listing:
    """Class folders, CLASS/picture.jpg, perhaps below train/, val/ and test/.

    Without split folders every picture goes to `train`. A picture outside any class folder has no label
    (-1). Classes are the sorted union over the splits.
    """
    files = files_below(source.root)
    pictures = [file for file in files if file.is_picture]
    tops = {file.name.split("/")[0] for file in pictures if "/" in file.name}
    named_splits = tops & _SPLIT_FOLDERS.keys()
    if all(top.lower() in _SPLIT_FOLDERS for top in tops):  # Train/ alone may be a class of vehicles
        named_splits = tops
    if not named_splits:
        _refuse_splits_further_down(source.root, pictures)
    if named_splits and named_splits != tops:
        raise ValueError(
            f"{source.root} has folders named like splits ({', '.join(sorted(named_splits))}) beside others "
            f"({', '.join(sorted(tops - named_splits)[:5])}); move or rename one or the other"
        )
    found = []
    for picture in pictures:
        *parents, _ = picture.name.split("/")
        split = _SPLIT_FOLDERS[parents.pop(0).lower()] if named_splits and parents else "train"
        found.append((split, parents[0] if parents else None, picture))
    classes = sorted({name for _, name, _ in found if name is not None})
    label_of: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
    items = [Item(split, _without_suffix(p.name), label_of.get(name, -1), p) for split, name, p in found]
    return Listing(
        name=source.root.resolve().name,
        classes=tuple(classes),
        items=items,
        ignored=_kinds(file for file in files if not file.is_picture),
    )


def hold_out(listing: Listing, share: float) -> Listing:
    """The listing with this share of each class, drawn by our seed, in `val`.

    Raises:
        ValueError: it has splits of its own.
    """
    if others := sorted({item.split for item in listing.items} - {"train"}):
        raise ValueError(f"{listing.name} has splits of its own ({', '.join(others)}); leave out --hold-out")
    of_class: dict[int, list[int]] = {}
    for place, item in enumerate(listing.items):
        of_class.setdefault(item.label, []).append(place)
    rng = np.random.default_rng(SPLIT_SEED)
    held = {place for places in of_class.values() for place in rng.permutation(places)[: round(share * len(places))]}
    if not held or len(held) == len(listing.items):
        raise ValueError(f"--hold-out {share:g} leaves one split empty: no class has enough pictures")
    items = [item._replace(split="val") if place in held else item for place, item in enumerate(listing.items)]
    return replace(listing, items=items)


def digits(scratch: Path) -> Listing:
    """scikit-learn's 1797 handwritten digits, 8x8, enlarged to 32x32 (bicubic) grey JPEGs, 1198 / 299 / 300.

    They come with the package, so a first run needs no download. Stratified by class, seeded.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    from data_prep.picture import JPEG_QUALITY

    bunch = load_digits()
    numbers = np.arange(len(bunch.target))
    rest, test = train_test_split(numbers, test_size=300, stratify=bunch.target, random_state=0)
    _, val = train_test_split(rest, test_size=299, stratify=bunch.target[rest], random_state=0)
    split_of = dict.fromkeys(test.tolist(), "test") | dict.fromkeys(val.tolist(), "val")
    scratch.mkdir(parents=True, exist_ok=True)
    file = scratch / "digits.jpegs"  # one after another; a byte range is all that is needed to find each
    items = []
    with file.open("wb") as stream:
        for number, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
            grey = Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8))
            buffer = io.BytesIO()
            grey.resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=JPEG_QUALITY)
            key = f"digit_{number:04d}"
            stored = Stored(f"{key}.jpg", str(file), stream.tell(), len(buffer.getvalue()))
            stream.write(buffer.getvalue())
            items.append(Item(split_of.get(number, "train"), key, int(label), stored))
    return Listing(name="digits", classes=tuple(str(digit) for digit in range(10)), items=items)


LAYOUTS: dict[str, Callable[[Source], Listing]] = {
    "flowers102": flowers102,
    "pets": pets,
    "food101": food101,
    "sun397": sun397,
    "imagenet": imagenet,
    "folder": folder,
}
"""The data sets that are read from a folder of pictures or archives."""

_SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip


def split_of_path(path: str) -> str:
    """The split that a file's path speaks of, as in `imagenet-val-0001.tar` or `val/0001.tar`; else train."""
    words = re.findall(r"[a-z]+", path.lower())
    return next((_SPLIT_FOLDERS[word] for word in words if word in _SPLIT_FOLDERS), "train")


def unique_keys(items: Iterable[Item]) -> list[Item]:
    """Items with keys as webdataset wants them: no dots (it cuts there), none twice.

    a.b.jpg becomes a_b; the second of cat.jpg and cat.png becomes cat-2.
    """
    taken: set[str] = set()
    renamed = []
    for item in items:
        plain = re.sub(r"[.\s\x00-\x1f\x7f\\]", "_", item.key.encode("utf-8", "replace").decode())
        key, number = plain, 1
        while key in taken:
            number += 1
            key = f"{plain}-{number}"
        taken.add(key)
        renamed.append(item._replace(key=key))
    return renamed


def _refuse_splits_further_down(root: Path, pictures: Sequence[Stored]) -> None:
    """Folders of splits that are not the first thing below the source would quietly become classes, or vanish."""
    parts = [picture.name.split("/") for picture in pictures]
    seconds = {part[1] for part in parts if len(part) > 2}
    if not seconds or not all(second.lower() in _SPLIT_FOLDERS for second in seconds):
        return
    tops = sorted({part[0] for part in parts if len(part) > 2})
    found = ", ".join(sorted(seconds))
    if len(tops) == 1:
        raise ValueError(f"the splits ({found}) lie one folder further down: give --source {root / tops[0]}")
    raise ValueError(
        f"{root} has splits ({found}) inside of folders like {tops[0]}; the split comes first and the class second: "
        f"{sorted(seconds)[0]}/{tops[0]}/picture"
    )


def _kinds(files: Iterable[Stored]) -> dict[str, int]:
    """How files end -> how many do, most frequent first."""
    ends = Counter(PurePosixPath(file.name).suffix.lower() or "no ending" for file in files)
    return dict(ends.most_common())


def _divide(keys: Sequence[str], until: Mapping[str, float]) -> dict[str, str]:
    """Deal keys out over splits by a seeded permutation; `until` holds each split's cumulative share."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(keys))
    split_of: dict[str, str] = {}
    start = 0
    for split, share in until.items():
        stop = round(share * len(keys))
        split_of |= dict.fromkeys((keys[i] for i in order[start:stop]), split)
        start = stop
    return split_of


def _check_listed(listed: Mapping[str, str], found: Mapping[str, Stored], where: str) -> None:
    missing = sorted(listed.keys() - found.keys())
    if missing:
        raise ValueError(f"{len(missing)} pictures named by {where} are not there, {missing[0]} first")


def _pictures_by_stem(members: Iterable[Stored]) -> dict[str, Stored]:
    return {_without_suffix(PurePosixPath(p.name).name): p for p in members if p.is_picture}


def _pictures_by_tail(members: Iterable[Stored], depth: int) -> dict[str, Stored]:
    """Keyed by the last `depth` parts of the path, without suffix."""
    return {_without_suffix("/".join(p.name.split("/")[-depth:])): p for p in members if p.is_picture}


def _without_suffix(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _breed(key: str) -> str:
    """Abyssinian_100 -> Abyssinian."""
    return key.rpartition("_")[0]


def _flower_names(num_classes: int) -> tuple[str, ...]:
    """The archives hold no names; torchvision knows them, in the order of the labels."""
    from torchvision.datasets import Flowers102

    names = tuple(getattr(Flowers102, "classes", ()))
    return names if len(names) == num_classes else tuple(str(label + 1) for label in range(num_classes))


@dataclass(frozen=True)
class _Kit:
    """ImageNet's development kit: the words of each class, and the classes of the validation pictures."""

    words: dict[str, str]
    val_wnids: list[str]


def _imagenet_train(source: Source) -> dict[str, Stored]:
    """n01440764/n01440764_10026 -> picture."""
    members = source.members("ILSVRC2012_img_train", "train", "ILSVRC2012_img_train.tar")
    tars = [member for member in members if re.search(r"n\d{8}\.tar$", member.name)]
    found = _pictures_by_tail(members, depth=2)
    for tar in tars:
        wnid = PurePosixPath(tar.name).stem
        for picture in members_of_tar(Path(tar.file), tar.offset):
            found[f"{wnid}/{_without_suffix(PurePosixPath(picture.name).name)}"] = picture
    if strange := next((key for key in found if not re.fullmatch(r"n\d{8}/[^/]+", key)), None):
        raise ValueError(f"training picture {strange} is not in a folder or tar named like n01440764")
    if not found:
        raise ValueError(f"no training pictures below {source.root}")
    return found


def _imagenet_val(source: Source, kit: _Kit | None) -> list[tuple[str, str, Stored]]:
    """(key, WordNet id, picture), sorted by key."""
    members = source.members("ILSVRC2012_img_val", "val", "ILSVRC2012_img_val.tar")
    found = []
    for picture in members:
        if not picture.is_picture:
            continue
        *_, parent, file = f"/{picture.name}".split("/")
        key = _without_suffix(file)
        if re.fullmatch(r"n\d{8}", parent):
            found.append((key, parent, picture))
        elif number := re.fullmatch(r"ILSVRC2012_val_(\d{8})", key):
            if kit is None:
                raise FileNotFoundError(
                    f"{source.root} lacks ILSVRC2012_devkit_t12.tar.gz, which says what the validation pictures show"
                )
            found.append((key, kit.val_wnids[int(number[1]) - 1], picture))
        else:
            raise ValueError(f"validation picture {picture.name} has no class folder and no official name")
    return sorted(found)


def _imagenet_kit(source: Source) -> _Kit | None:
    from scipy.io import loadmat

    names = ("ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12.tar.gz")
    if source.find(*names) is None:
        return None
    members = source.members(*names)
    meta: Any = loadmat(io.BytesIO(one(members, "data/meta.mat").read()), squeeze_me=True)["synsets"]
    # Inner nodes of the WordNet tree stand in the same table; the 1000 classes are its leaves.
    leaves = [row for row in meta if int(row["num_children"]) == 0]
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    truth = one(members, "data/ILSVRC2012_validation_ground_truth.txt").text().split()
    return _Kit(
        words={str(row["WNID"]): str(row["words"]) for row in leaves},
        val_wnids=[wnid_of[int(number)] for number in truth],
    )
