"""One shard at a time: write it from listed pictures, or index one that exists. This is what workers run.

A job says everything, so its shard's bytes do not depend on which process made it, nor on how many there
are. Keys, files in the tar and time stamps are fixed; webdataset's own TarWriter writes them.

Not here: which pictures go together (making.py), what is done to a picture (picture.py).
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.archive import Stored, members_of_tar
from data_prep.index import Shard, flush_to_disk, sha256_of
from data_prep.layouts import Item
from data_prep.picture import Undecodable, as_viewed, size_as_viewed

PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""What a picture is called inside a foreign shard, in order of preference."""

_WRITTEN_AT = 1_623_196_800  # 2021-06-09, the day of the paper: any fixed time makes equal sets equal files
_OWNER = "funmatch"


@dataclass(frozen=True, slots=True)
class WriteJob:
    """Write `items` as the shard `file`."""

    file: Path
    split: str
    items: Sequence[Item]
    short_side: int | None


@dataclass(frozen=True, slots=True)
class IndexJob:
    """Index the existing shard `file`."""

    file: Path
    split: str


@dataclass(slots=True)
class Report:
    """What is in a finished shard: a row per picture, in the order of the tar, and what was left out."""

    split: str
    shard: Shard | None = None
    """None: not one picture of it decoded, so there is no shard."""
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    height: list[int] = field(default_factory=list)
    width: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    key: list[bytes] = field(default_factory=list)
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    """(picture, what the decoder said) of pictures left out."""
    num_reencoded: int = 0
    num_without_picture: int = 0

    @property
    def num_seen(self) -> int:
        """Pictures looked at, good and bad."""
        return len(self.key) + len(self.corrupt)


def work(job: WriteJob | IndexJob) -> Report:
    """Do one job; the function that a pool of processes maps over."""
    return write_shard(job) if isinstance(job, WriteJob) else index_shard(job)


def write_shard(job: WriteJob) -> Report:
    """Write a shard with webdataset's writer; each sample is KEY.jpg and KEY.cls (-1: no label)."""
    TarWriter = _tar_writer()
    report = Report(job.split)
    with (
        job.file.open("xb") as stream,
        TarWriter(stream, user=_OWNER, group=_OWNER, mtime=_WRITTEN_AT, encoder=False) as writer,
    ):
        for item in job.items:
            encoded = item.stored.read()
            try:
                picture = as_viewed(encoded, job.short_side)
            except Undecodable as error:
                report.corrupt.append((item.stored.name, str(error)))
                continue
            label = str(item.label).encode()
            writer.write({"__key__": item.key, "jpg": picture.encoded, "cls": label})
            _add_row(report, item.key, item.label, (picture.height, picture.width))
            report.num_reencoded += picture.encoded is not encoded
    if not report.key:
        job.file.unlink()
        return report
    # The writer does not say where it put things; the tar does.
    for stored in members_of_tar(job.file):
        if stored.name.endswith(".jpg"):
            report.offset.append(stored.offset)
            report.size.append(stored.size)
    flush_to_disk(job.file)
    report.shard = describe(job.file)
    return report


def index_shard(job: IndexJob) -> Report:
    """Find every sample's picture and label in a shard that somebody else wrote; the file is only read.

    The label is the sample's `cls` (a number as text), or `label` or `cls` in its `json`; else -1.

    Raises:
        ValueError: not a plain tar, a label that is no number, or two pictures in one sample.
    """
    report = Report(job.split)
    for key, parts in samples_of(job.file):
        picture = _picture_of(parts, key, job.file)
        if picture is None:
            report.num_without_picture += 1
            continue
        try:
            size = size_as_viewed(picture.read())
        except Undecodable as error:
            report.corrupt.append((f"{job.file.name}: {picture.name}", str(error)))
            continue
        _add_row(report, key, _label_of(parts, key, job.file), size)
        report.offset.append(picture.offset)
        report.size.append(picture.size)
    report.shard = describe(job.file)
    return report


def samples_of(file: Path) -> Iterator[tuple[str, dict[str, Stored]]]:
    """(key, extension -> member) for each sample; webdataset's rules: adjacent, cut at the first dot."""
    key, parts = "", dict[str, Stored]()
    for member in members_of_tar(file):
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem or not dot:
            continue  # hidden or without extension: not part of any sample
        if folder + slash + stem != key:
            if parts:
                yield key, parts
            key, parts = folder + slash + stem, {}
        parts[extension.lower()] = member
    if parts:
        yield key, parts


def describe(file: Path) -> Shard:
    """A shard's entry in dataset.json."""
    return Shard(name=file.name, size=file.stat().st_size, sha256=sha256_of(file))


def columns_of(reports: Sequence[Report]) -> dict[str, NDArray[Any]]:
    """Reports of finished shards, in order, as the columns of an index."""
    finished = [report for report in reports if report.shard is not None]
    lengths = [len(report.key) for report in finished]
    columns: dict[str, NDArray[Any]] = {"shard": np.repeat(np.arange(len(finished), dtype=np.int32), lengths)}
    for name in ("offset", "size", "height", "width", "label", "key"):
        columns[name] = np.array([value for report in finished for value in getattr(report, name)])
    return columns


def _tar_writer() -> Any:
    """webdataset's TarWriter, without torch in a process that only writes.

    The package imports torch for its readers, where there is one: seconds and 200 MB in each worker.
    """
    alone = multiprocessing.parent_process() is not None and "torch" not in sys.modules
    if alone:
        sys.modules["torch"] = None  # type: ignore[assignment]  # an import now fails, which webdataset expects
    try:
        from webdataset.writer import TarWriter
    finally:
        if alone:
            del sys.modules["torch"]
    return TarWriter


def _add_row(report: Report, key: str, label: int, size: tuple[int, int]) -> None:
    report.key.append(key.encode())
    report.label.append(label)
    report.height.append(size[0])
    report.width.append(size[1])


def _picture_of(parts: dict[str, Stored], key: str, file: Path) -> Stored | None:
    for extension in PICTURE_EXTENSIONS:
        if extension in parts:
            return parts[extension]
    pictures = [part for extension, part in parts.items() if extension.endswith(PICTURE_EXTENSIONS)]
    if len(pictures) > 1:
        raise ValueError(f"sample {key} of {file} has {len(pictures)} pictures; which one is meant?")
    return pictures[0] if pictures else None


def _label_of(parts: dict[str, Stored], key: str, file: Path) -> int:
    label: Any = -1
    if "cls" in parts:
        label = parts["cls"].text().strip()
    elif "json" in parts:
        try:
            record = json.loads(parts["json"].text())
        except ValueError as error:
            raise ValueError(f"sample {key} of {file} has a json that is none: {error}") from error
        if isinstance(record, dict):
            label = record.get("label", record.get("cls", -1))
    try:
        number = int(label)
    except (TypeError, ValueError):
        raise ValueError(f"sample {key} of {file} has label {label!r}, which is not a number") from None
    if not -1 <= number < 2**31:
        raise ValueError(f"sample {key} of {file} has label {number}, which is below -1 or absurd")
    return number
