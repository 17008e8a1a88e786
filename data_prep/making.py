"""From a source to a set: which pictures go into which shard, the processes that write them, and the index of it all.

Nothing here depends on the number of processes. Not here: what OUT may be and when it appears (prepare.py, staging.py),
the layouts of archives (layouts.py), one shard (shards.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep import layouts, pool
from data_prep.archive import PICTURE_SUFFIXES, Source, files_below
from data_prep.index import Index, write_index
from data_prep.layouts import LAYOUTS, SPLITS, Listing
from data_prep.shards import IndexJob, Report, WriteJob, columns_of, work


def make_set(
    name: str,
    source: Path | None,
    made: Path,
    scratch: Path,
    wanted: dict[str, Any],
    workers: int | None,
    progress: bool,
) -> Index:
    """The whole work: an index and its shards in the folder `made`.

    Args:
        name: which data set, or which kind of source.
        source: folder with its files; None for digits.
        made: an empty folder.
        scratch: where archives may be unpacked.
        wanted: the options that decide what the set is, by name.
        workers: processes; None: one per core. The result does not depend on it.
        progress: show a bar, if standard error is a terminal.

    Raises:
        ValueError: the source is not what the name says.
    """
    jobs: Sequence[WriteJob | IndexJob]
    ignored: dict[str, int]
    if name == "shards":
        assert source is not None
        jobs, classes, ignored = _held_out(_link_shards(source, made), wanted["hold_out"]), _listed_classes(source), {}
        title, total = source.resolve().name, None
    else:
        listing = layouts.digits(scratch) if source is None else LAYOUTS[name](Source(source, scratch))
        if not listing.items:
            kinds = f"; files there are {most_frequent(listing.ignored)}" if listing.ignored else ""
            raise ValueError(f"no pictures ({', '.join(PICTURE_SUFFIXES)}) found below {source}{kinds}")
        if wanted["hold_out"]:
            listing = layouts.hold_out(listing, wanted["hold_out"])
        jobs = _write_jobs(listing, made, wanted["short_side"], wanted["pictures_per_shard"])
        classes, ignored = listing.classes, dict(listing.ignored)
        title, total = listing.name, len(listing.items)
    reports = _run(jobs, workers, total, progress)
    columns = columns_of(reports)
    if not len(columns["shard"]):
        first = next(f"{name}: {reason}" for report in reports for name, reason in report.corrupt)
        raise ValueError(f"not one picture of {source} decodes; the first: {first}")
    classes = classes or tuple(str(label) for label in range(int(columns["label"].max()) + 1))
    if int(columns["label"].max()) >= len(classes):
        raise ValueError(f"label {columns['label'].max()} is beyond the {len(classes)} classes of classes.txt")
    return write_index(
        made,
        name=title,
        classes=classes,
        splits=_split_ranges(reports),
        shards=[report.shard for report in reports if report.shard is not None],
        columns=columns,
        linked=name == "shards",
        prepared={
            **wanted,
            "source": None if source is None else Source(source, scratch).fingerprint(),
            "corrupt": [pair for report in reports for pair in report.corrupt],
            "num_reencoded": sum(report.num_reencoded for report in reports),
            "num_ignored": sum(ignored.values()),
            "ignored": ignored,
            "num_without_picture": sum(report.num_without_picture for report in reports),
        },
    )


def most_frequent(kinds: Mapping[str, int]) -> str:
    """The five most frequent kinds of files, with their numbers."""
    return ", ".join(f"{kind} {count}" for kind, count in list(kinds.items())[:5])


def _write_jobs(listing: Listing, made: Path, short_side: int | None, pictures_per_shard: int) -> list[WriteJob]:
    """Cut each split into shards of consecutive pictures. Nothing here depends on the number of workers."""
    items = layouts.unique_keys(listing.items)
    jobs = []
    for split in SPLITS:
        of_split = [item for item in items if item.split == split]
        for number, start in enumerate(range(0, len(of_split), pictures_per_shard)):
            file = made / f"{split}-{number:06d}.tar"
            jobs.append(WriteJob(file, split, of_split[start : start + pictures_per_shard], short_side))
    return jobs


def _link_shards(source: Path, made: Path) -> list[IndexJob]:
    """Give the source's shards a plain name below the set, without copying them.

    A hard link where the file system allows one: the set then stands by itself. Else a symbolic link, and
    the source must stay where it is. A shard in a subfolder, val/0001.tar, becomes val-0001.tar.
    """
    files = [stored for stored in files_below(source) if stored.name.endswith(".tar")]
    if not files:
        packed = [s.name for s in files_below(source) if s.name.endswith((".tgz", ".tar.gz"))]
        cure = f"{packed[0]} is compressed and has no offsets; decompress it" if packed else "nothing to index"
        raise ValueError(f"no .tar files below {source}: {cure}")
    jobs = []
    for stored in files:
        link = made / re.sub(r"[^A-Za-z0-9._+-]", "_", stored.name.replace("/", "-")).lstrip("-.+")
        if link.exists():
            raise ValueError(f"{source} has two shards that would both be called {link.name}; rename one")
        target = Path(stored.file).resolve()
        try:
            link.hardlink_to(target)
        except OSError:  # another file system, or somebody else's file
            link.symlink_to(target)
        jobs.append(IndexJob(link, layouts.split_of_path(stored.name)))
    return sorted(jobs, key=lambda job: (SPLITS.index(job.split), job.file.name))


def _held_out(jobs: list[IndexJob], share: float | None) -> list[IndexJob]:
    """The same shards, some of them in `val`: the rows of a split are contiguous, so a shard belongs to one."""
    if not share:
        return jobs
    if others := sorted({job.split for job in jobs} - {"train"}):
        raise ValueError(f"the shards have splits of their own ({', '.join(others)}); leave out --hold-out")
    num_held = max(1, round(share * len(jobs)))
    if num_held >= len(jobs):
        raise ValueError(f"--hold-out takes whole shards, and of {len(jobs)} none would be left; write smaller ones")
    held = set(np.random.default_rng(layouts.SPLIT_SEED).permutation(len(jobs))[:num_held].tolist())
    divided = [replace(job, split="val") if place in held else job for place, job in enumerate(jobs)]
    return sorted(divided, key=lambda job: SPLITS.index(job.split))


def _listed_classes(source: Path) -> tuple[str, ...]:
    """Names of the classes of foreign shards: classes.txt in the source, one a line, if there is one."""
    file = source / "classes.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines()) if file.exists() else ()


def _run(jobs: Sequence[WriteJob | IndexJob], workers: int | None, total: int | None, progress: bool) -> list[Report]:
    """Do the jobs in processes; reports in the order of the jobs."""
    # disable=None: no bar into a log file
    with tqdm(total=total, unit="picture", smoothing=0.05, disable=None if progress else True) as bar:
        reports, num_corrupt = [], 0
        for report in pool.run(work, jobs, workers):
            reports.append(report)
            bar.update(report.num_seen)
            num_corrupt += len(report.corrupt)
            if num_corrupt:
                bar.set_postfix_str(f"{num_corrupt} do not decode")
    return reports


def _split_ranges(reports: Sequence[Report]) -> dict[str, range]:
    lengths = {split: sum(len(r.key) for r in reports if r.split == split) for split in SPLITS}
    ranges, start = {}, 0
    for split, length in lengths.items():
        if length:
            ranges[split] = range(start, start + length)
        start += length
    return ranges
