"""The format of a prepared data set, writer and reader side by side.

    ROOT/dataset.json        what this is: name, classes, splits, shards, digest (a few kB)
    ROOT/columns/NAME.npy    one value per picture: shard, offset, size, height, width, label, key, split
    ROOT/*.tar               the shards: plain tars that webdataset and `tar` read

A *sample* is a row number, the same everywhere: in a view, on the wire, in a log line. The rows of a split
are contiguous. Columns are memory-mapped, so opening costs the same at a thousand rows and at a hundred
million, and the processes of one machine share the pages. The reader needs numpy and the standard library.

Not here: how a picture gets into a shard (shards.py), how it becomes pixels (views/render.py).

Rejected: parquet or sqlite for the columns (a dependency and a decoding step, to read one row of fixed
width), and webdataset's own .idx text files (parsed whole at every start, no picture sizes).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
DATASET_FILE = "dataset.json"
COLUMNS_FOLDER = "columns"

COLUMNS: dict[str, np.dtype[Any]] = {
    "shard": np.dtype("<i4"),
    "offset": np.dtype("<i8"),
    "size": np.dtype("<i4"),
    "height": np.dtype("<i4"),
    "width": np.dtype("<i4"),
    "label": np.dtype("<i4"),
    "key": np.dtype("S"),  # as wide as the longest key
    "split": np.dtype("u1"),
}
"""The columns and their dtypes; what each one means is said at the fields of `Index`."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
_MAX_OPEN_SHARDS = 256  # below the usual limit of 1024 descriptors, with room for everything else


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar file of the set."""

    name: str
    """Plain file name below the root."""
    size: int
    """Bytes."""
    sha256: str
    """Hex digest of the whole file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """A prepared data set, opened for reading. `Index.open(root)` is the door.

    Indexing arrays are read-only memory maps of length N = len(index).
    """

    root: Path
    name: str
    digest: str
    """SHA-256 (hex) over name, classes, splits and the contents of every shard and every column."""
    classes: tuple[str, ...]
    splits: Mapping[str, range]
    """Split name -> its rows, in row order; usually train, val, test."""
    shards: tuple[Shard, ...]
    linked: bool
    """The shards belong to somebody else and may be symbolic links (making.py, data set `shards`)."""
    prepared: Mapping[str, Any]
    """How the set was made, for people and for prepare.py; not part of the digest."""

    shard: NDArray[np.int32]
    """[N] position in `shards`."""
    offset: NDArray[np.int64]
    """[N] where the encoded picture begins in its shard, bytes."""
    size: NDArray[np.int32]
    """[N] length of the encoded picture, bytes."""
    height: NDArray[np.int32]
    """[N] pixels, of the upright picture (after EXIF rotation)."""
    width: NDArray[np.int32]
    """[N] pixels, of the upright picture."""
    label: NDArray[np.int32]
    """[N] position in `classes`; -1: the picture has no label."""
    key: NDArray[np.bytes_]
    """[N] the sample's webdataset key, UTF-8."""
    split: NDArray[np.uint8]
    """[N] position of the row's split in `splits`."""

    @classmethod
    def open(cls, root: str | Path) -> Index:
        """Open the set below `root`; reads dataset.json and the heads of the columns, no rows.

        Raises:
            FileNotFoundError: there is no set, or a file of it is missing.
            ValueError: the set is not what its dataset.json says, or a shard's name leads out of `root`.
        """
        root = Path(root)
        described = _read_description(root)
        num_rows = described["num_rows"]
        shards = tuple(Shard(**shard) for shard in described["shards"])
        for shard in shards:
            _check_shard(root, shard, described["linked"])
        return cls(
            root=root,
            name=described["name"],
            digest=described["digest"],
            classes=tuple(described["classes"]),
            splits=_splits(described["splits"], num_rows, root),
            shards=shards,
            linked=described["linked"],
            prepared=described.get("prepared", {}),
            **{name: _open_column(root, name, num_rows) for name in COLUMNS},
        )

    def __post_init__(self) -> None:
        # The one thing that changes after opening: descriptors of the shards read from lately.
        object.__setattr__(self, "_open_shards", _OpenShards(self.root, self.linked))

    def __len__(self) -> int:
        return len(self.shard)

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that receives an index maps the files itself; descriptors and pages do not travel.
        return type(self).open, (self.root,)

    def read(self, samples: Sequence[int] | NDArray[np.integer[Any]]) -> list[NDArray[np.uint8]]:
        """The encoded pictures of these rows, [size] uint8 each, in the order asked for. Thread-safe.

        Raises:
            IndexError: a row number outside [0, N).
            OSError: a shard is missing or shorter than the index says; names shard and key.
        """
        return [self._read_one(int(sample)) for sample in samples]

    def where(self, sample: int) -> str:
        """A sample in words, for messages: 'sample 7 (train-000000.tar, key image_00008)'."""
        key = bytes(self.key[sample]).decode("utf-8", "replace")
        return f"sample {sample} ({self.shards[self.shard[sample]].name}, key {key})"

    def _read_one(self, sample: int) -> NDArray[np.uint8]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is outside data set {self.name!r} of {len(self)} pictures")
        size, offset = int(self.size[sample]), int(self.offset[sample])
        picture = np.empty(size, dtype=np.uint8)
        opened: _OpenShards = self.__dict__["_open_shards"]
        try:
            descriptor = opened.get(self.shards[self.shard[sample]].name)
            num_read = _pread_into(descriptor.number, picture.data, offset)
        except OSError as error:
            raise OSError(f"cannot read {self.where(sample)} below {self.root}: {error}") from error
        if num_read != size:
            raise OSError(
                f"{self.where(sample)} should be {size} bytes at offset {offset}, but its shard ends after "
                f"{num_read} of them; run `python -m data_prep.check {self.root}`"
            )
        return picture


def write_index(
    root: Path,
    *,
    name: str,
    classes: Sequence[str],
    splits: Mapping[str, range],
    shards: Sequence[Shard],
    columns: Mapping[str, NDArray[Any]],
    linked: bool = False,
    prepared: Mapping[str, Any] | None = None,
) -> Index:
    """Write columns and, last of all, dataset.json below `root`, where the shards already are.

    Everything is flushed to the disk before dataset.json appears: a folder that has one is whole.

    Args:
        columns: every column of COLUMNS but `split`, which follows from `splits`.
    """
    columns = {**columns, "split": _split_column(splits)}
    (root / COLUMNS_FOLDER).mkdir(exist_ok=True)
    column_digests = {}
    for column, dtype in COLUMNS.items():
        # dtype "S" asks for the width of the longest key.
        file = root / COLUMNS_FOLDER / f"{column}.npy"
        np.save(file, np.ascontiguousarray(columns[column], dtype=dtype), allow_pickle=False)
        flush_to_disk(file)
        column_digests[column] = sha256_of(file)
    flush_to_disk(root / COLUMNS_FOLDER)
    content = {
        "format": FORMAT,
        "name": name,
        "num_rows": len(columns["shard"]),
        "splits": {split: [rows.start, rows.stop] for split, rows in splits.items()},
        "linked": linked,
        "classes": list(classes),
        "columns": column_digests,
        "shards": [{"name": s.name, "size": s.size, "sha256": s.sha256} for s in shards],
    }
    described = {"digest": _digest(content), **content, "prepared": dict(prepared or {})}
    file = root / DATASET_FILE
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    flush_to_disk(partial)
    partial.replace(file)
    flush_to_disk(root)
    return Index.open(root)


def content_errors(index: Index) -> list[str]:
    """Re-read every shard and column and compare with the digests; a sentence for each that differs."""
    described = _read_description(index.root)
    expected = [(index.root / COLUMNS_FOLDER / f"{c}.npy", sha) for c, sha in described["columns"].items()]
    expected += [(index.root / shard.name, shard.sha256) for shard in index.shards]
    return [
        f"{file.relative_to(index.root)} is not the file that was written: its SHA-256 has changed"
        for file, sha256 in expected
        if sha256_of(file) != sha256
    ]


def sha256_of(file: Path) -> str:
    """Hex SHA-256 of a file's contents."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Make a file's contents, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(content: Mapping[str, Any]) -> str:
    """The digest of the whole: it covers the digests of shards and columns, and all that is said of them.

    Everything but the file's own digest and the history in `prepared`; keys sorted, no white space.
    """
    content = {key: value for key, value in content.items() if key not in ("digest", "prepared")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_description(root: Path) -> dict[str, Any]:
    file = root / DATASET_FILE
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{root} holds no prepared data set (no {DATASET_FILE}); make one with "
            f"`python -m data_prep.prepare NAME --out {root}`"
        ) from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise ValueError(f"{file} is not of format {FORMAT}, which this version reads; prepare the set again")
    if described.get("digest") != _digest(described):
        raise ValueError(f"{file} does not agree with its own digest: it was edited or damaged")
    return described


def _check_shard(root: Path, shard: Shard, linked: bool) -> None:
    """A shard is a regular file of the size that was written, directly below the root."""
    if not _PLAIN_NAME.fullmatch(shard.name):
        raise ValueError(f"{root / DATASET_FILE} lists shard {shard.name!r}, which is not a plain file name")
    file = root / shard.name
    try:
        status = file.lstat()
        if stat.S_ISLNK(status.st_mode):
            if not linked:
                raise ValueError(f"shard {file} is a symbolic link; a set that was written here has none")
            status = file.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"shard {file} is missing; prepare or copy the set again") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size != shard.size:
        raise ValueError(f"shard {file} has {status.st_size} bytes, {shard.size} were written; prepare it again")


def _splits(described: Mapping[str, Sequence[int]], num_rows: int, root: Path) -> dict[str, range]:
    splits = {name: range(*rows) for name, rows in sorted(described.items(), key=lambda item: list(item[1]))}
    borders = [0, *(rows.stop for rows in splits.values())]
    if [rows.start for rows in splits.values()] != borders[:-1] or borders[-1] != num_rows:
        raise ValueError(f"{root / DATASET_FILE}: the splits {dict(described)} do not tile {num_rows} rows")
    return splits


def _split_column(splits: Mapping[str, range]) -> NDArray[np.uint8]:
    lengths = [len(rows) for rows in splits.values()]
    return np.repeat(np.arange(len(lengths), dtype=np.uint8), lengths)


def _open_column(root: Path, name: str, num_rows: int) -> NDArray[Any]:
    file = root / COLUMNS_FOLDER / f"{name}.npy"
    try:
        column: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"column {file} is missing; prepare or copy the set again") from None
    except ValueError as error:
        raise ValueError(f"column {file} is damaged: {error}") from error
    expected = COLUMNS[name]
    same = column.dtype.kind == "S" if expected.kind == "S" else column.dtype == expected
    if not same or column.shape != (num_rows,):
        raise ValueError(f"column {file} is {column.dtype}{list(column.shape)}, not {expected}[{num_rows}]")
    # A plain view: the same mapped pages without np.memmap's cost per scalar.
    return column.view(np.ndarray)


def _pread_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill the buffer from the file's offset on; returns the bytes read, fewer only at the file's end."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


class _Descriptor:
    """A file descriptor that closes when nobody holds it any more."""

    def __init__(self, path: Path, flags: int) -> None:
        self.number = os.open(path, flags)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _OpenShards:
    """The shards read from most recently, opened at first need.

    Dropping one from the list never closes it under a thread that is reading: that thread holds the object.
    """

    def __init__(self, root: Path, linked: bool) -> None:
        self._root = root
        # A link that replaced a shard after the set was opened is refused here too.
        self._flags = os.O_RDONLY | os.O_CLOEXEC | (0 if linked else os.O_NOFOLLOW)
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[str, _Descriptor] = OrderedDict()

    def get(self, name: str) -> _Descriptor:
        with self._lock:
            if name in self._descriptors:
                self._descriptors.move_to_end(name)
            else:
                self._descriptors[name] = _Descriptor(self._root / name, self._flags)
            if len(self._descriptors) > _MAX_OPEN_SHARDS:
                self._descriptors.popitem(last=False)
            return self._descriptors[name]
