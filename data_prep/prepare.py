"""`python -m data_prep.prepare NAME --source DIR --out DIR`: a data set as shards with an index.

The work is done in a folder beside the output, OUT.partial, and OUT appears by one rename when everything
is on the disk: an OUT that exists is whole. A run that was killed leaves only OUT.partial, which the next
run clears; one that finds the wanted OUT says so and does nothing.

Pictures that do not decode are named, counted and left out. Unless --skip-corrupt says that this is fine,
nothing is published: the finished set waits in OUT.partial, and the same command with --skip-corrupt
publishes it at once.

Not here: the layouts of the archives (layouts.py), a picture (picture.py), a shard (shards.py), the
processes (pool.py), the format (index.py).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from data_prep import layouts, pool
from data_prep.archive import PICTURE_SUFFIXES, Source, files_below
from data_prep.download import download
from data_prep.index import DATASET_FILE, Index, flush_to_disk, write_index
from data_prep.layouts import LAYOUTS, SPLITS, Listing
from data_prep.shards import IndexJob, Report, WriteJob, columns_of, work

Name = Literal["flowers102", "pets", "food101", "sun397", "imagenet", "digits", "folder", "shards"]

PICTURES_PER_SHARD = 1000
"""~100 MB at ImageNet's sizes: enough shards to share among workers, few enough to copy around."""


class CorruptPictures(ValueError):  # noqa: N818  (the sentence is the error)
    """Some pictures do not decode, and nobody said that leaving them out is fine."""

    def __init__(self, corrupt: Sequence[tuple[str, str]], out: Path) -> None:
        self.corrupt = tuple(corrupt)
        super().__init__(
            f"{len(corrupt)} pictures do not decode, so {out} was not published; repair the source, or run "
            "the same command with --skip-corrupt to leave them out (the rest is done and need not be redone)"
        )


def prepare(
    name: str,
    source: str | Path | None,
    out: str | Path,
    *,
    short_side: int | None = None,
    skip_corrupt: bool = False,
    workers: int | None = None,
    pictures_per_shard: int = PICTURES_PER_SHARD,
    hold_out: float = 0.0,
    progress: bool = True,
) -> Index:
    """Prepare a data set, or open it where it is already; the command line in one call.

    With more than one worker, call it from a module that is guarded by `if __name__ == "__main__"`: the
    workers are spawned and import the main module.

    Args:
        name: one of `Name`.
        source: folder with the official files; None downloads them to NAME-source beside `out`, where a
            public address exists. `digits` needs none.
        out: the folder to make.
        short_side: shrink larger pictures to this short side, in pixels.
        skip_corrupt: leave out pictures that do not decode, and go on.
        workers: processes; None: one per core. The result does not depend on it.
        pictures_per_shard: at most so many in one shard.
        hold_out: share of the pictures (of whole shards, where shards are indexed) that becomes `val`, for a source
            without splits.
        progress: show a bar, if standard error is a terminal.

    Raises:
        CorruptPictures: see `skip_corrupt`.
        ValueError, FileNotFoundError: the source is not what the name says, or `out` is something else.
    """
    source = None if source is None else Path(source)
    out = Path(out).absolute()
    _check_arguments(name, source, short_side, workers, pictures_per_shard, hold_out)
    wanted = {
        "data_set": name, "short_side": short_side, "pictures_per_shard": pictures_per_shard,
        "hold_out": hold_out or None,
    }  # fmt: skip
    if (out / DATASET_FILE).exists():
        return _already_prepared(out, wanted, source, skip_corrupt)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a prepared data set; choose another --out or remove it")
    if source is None and name != "digits":
        source = out.parent / f"{name}-source"
        download(name, source)
    if source is not None and not source.is_dir():
        raise ValueError(f"--source {source} is not a folder; give the one that holds the pictures or archives")
    with _staging(out) as staging:
        made = staging / "set"
        if skip_corrupt and (made / DATASET_FILE).exists():
            # The last run ended with CorruptPictures: its set is whole and waits for this permission.
            waiting = Index.open(made)
            if _same(waiting, wanted, source):
                return _publish(waiting, out)
        _clear(staging)
        made.mkdir()
        index = _make(name, source, made, staging / "unpacked", wanted, workers, progress)
        corrupt = index.prepared["corrupt"]
        if corrupt and not skip_corrupt:
            raise CorruptPictures([tuple(pair) for pair in corrupt], out)
        return _publish(index, out)


def main(
    name: Annotated[tyro.conf.Positional[Name], tyro.conf.arg(metavar="NAME")],
    /,
    out: Path,
    source: Path | None = None,
    short_side: int | None = None,
    skip_corrupt: bool = False,
    workers: int | None = None,
    pictures_per_shard: int = PICTURES_PER_SHARD,
    hold_out: float = 0.0,
) -> int:
    """Write a data set as WebDataset shards with an index beside them.

    flowers102, pets, food101, sun397: the official archives, packed or unpacked; without --source they are
    downloaded. imagenet: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz, or
    class folders below train/ and val/. folder: CLASS/picture, perhaps below train/, val/, test/. shards:
    WebDataset shards that exist; they are linked and indexed, not rewritten. digits: needs nothing.

    Args:
        name: which data set, or which kind of source.
        out: folder to make; it appears when it is complete, not before.
        source: folder with what was downloaded.
        short_side: shrink larger pictures to this short side in pixels (RGB JPEG, quality 95).
        skip_corrupt: leave out pictures that do not decode, and still succeed.
        workers: processes; by default one per core. The result does not depend on it.
        pictures_per_shard: at most so many pictures in one shard.
        hold_out: folder, shards: this share becomes the split `val`, 0 to 1, where the source has no splits: of each
            class's pictures, or of whole shards. Training wants something to evaluate on; 0.1 is usual.
    """
    there = (out / DATASET_FILE).exists()
    try:
        index = prepare(
            name,
            source,
            out,
            short_side=short_side,
            skip_corrupt=skip_corrupt,
            workers=workers,
            pictures_per_shard=pictures_per_shard,
            hold_out=hold_out,
        )
    except CorruptPictures as error:
        _print_corrupt(error.corrupt)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, BrokenProcessPool) as error:
        if os.environ.get("FUNMATCH_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {out} was not made", file=sys.stderr)
        return 130
    if there:
        print(f"{out} is already prepared; nothing to do")
    _print_corrupt(index.prepared["corrupt"])
    print(summary(index))
    return 0


def summary(index: Index) -> str:
    """A prepared set in a few lines."""
    splits = ", ".join(f"{split} {len(rows)}" for split, rows in index.splits.items())
    num_bytes = sum(shard.size for shard in index.shards)
    lines = [
        f"{index.name}: {len(index)} pictures ({splits}) of {len(index.classes)} classes",
        f"{len(index.shards)} shards, {num_bytes / 1e6:.1f} MB, below {index.root}",
        f"digest {index.digest}",
    ]
    prepared = index.prepared
    notes = {
        "pictures left out because they do not decode": len(prepared.get("corrupt", ())),
        "pictures encoded anew (the others were copied byte for byte)": prepared.get("num_reencoded", 0),
        "files ignored because they are not pictures": prepared.get("num_ignored", 0),
        "samples without a picture ignored": prepared.get("num_without_picture", 0),
    }
    lines += [f"{count} {what}" for what, count in notes.items() if count]
    if kinds := prepared.get("ignored"):
        lines.append(f"ignored were, by their ends: {_few(kinds)}")
    if index.splits.keys() == {"train"}:
        lines.append("there is no split to evaluate on: prepare with --hold-out 0.1, or give --data.evaluate-root")
    return "\n".join(lines)


def _few(kinds: Mapping[str, int]) -> str:
    """The most frequent kinds of files."""
    return ", ".join(f"{kind} {count}" for kind, count in list(kinds.items())[:5])


def _make(
    name: str,
    source: Path | None,
    made: Path,
    scratch: Path,
    wanted: dict[str, Any],
    workers: int | None,
    progress: bool,
) -> Index:
    """The whole work, into the folder `made`."""
    jobs: Sequence[WriteJob | IndexJob]
    ignored: dict[str, int]
    if name == "shards":
        assert source is not None
        jobs, classes, ignored = _held_out(_link_shards(source, made), wanted["hold_out"]), _listed_classes(source), {}
        title, total = source.resolve().name, None
    else:
        listing = layouts.digits(scratch) if source is None else LAYOUTS[name](Source(source, scratch))
        if not listing.items:
            kinds = f"; files there are {_few(listing.ignored)}" if listing.ignored else ""
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


def _check_arguments(
    name: str,
    source: Path | None,
    short_side: int | None,
    workers: int | None,
    pictures_per_shard: int,
    hold_out: float,
) -> None:
    if name not in (*LAYOUTS, "digits", "shards"):
        raise ValueError(f"unknown data set {name!r}; known: {', '.join([*LAYOUTS, 'digits', 'shards'])}")
    if name == "digits" and source is not None:
        raise ValueError("digits come with scikit-learn; --source has no meaning for them")
    if name == "shards" and short_side is not None:
        raise ValueError("shards are indexed, not rewritten; --short-side has no meaning for them")
    if hold_out and name not in ("folder", "shards"):
        raise ValueError(f"{name} has official splits; --hold-out has no meaning for it")
    if not 0 <= hold_out < 1:
        raise ValueError(f"--hold-out is a share of the pictures, at least 0 and less than 1, got {hold_out:g}")
    for flag, value in (
        ("--short-side", short_side),
        ("--workers", workers),
        ("--pictures-per-shard", pictures_per_shard),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")


def _already_prepared(out: Path, wanted: dict[str, Any], source: Path | None, skip_corrupt: bool) -> Index:
    index = Index.open(out)
    if not _same(index, wanted, source):
        had = {key: index.prepared.get(key) for key in wanted}
        raise ValueError(
            f"{out} was prepared from another source or with other options ({had}, now {wanted}); choose "
            "another --out, or remove it first"
        )
    if index.prepared["corrupt"] and not skip_corrupt:
        raise CorruptPictures([tuple(pair) for pair in index.prepared["corrupt"]], out)
    return index


def _same(index: Index, wanted: dict[str, Any], source: Path | None) -> bool:
    """Whether a set was made from this source with these options. A source that is gone is not compared."""
    if any(index.prepared.get(key) != value for key, value in wanted.items()):
        return False
    return source is None or index.prepared.get("source") == Source(source, source).fingerprint()


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """The folder OUT.partial, ours alone; removed at the end unless a set waits in it for permission."""
    staging = out.with_name(f"{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(staging)
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({error.strerror}: {error.filename}); choose another --out") from error
    try:
        yield staging
    except CorruptPictures:
        shutil.rmtree(staging / "unpacked", ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(staging)
        raise
    else:
        shutil.rmtree(staging)
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """Make the folder and lock it; the lock dies with the process, however that ends."""
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"another run is at work in {folder}; wait for it, or stop it") from None
        # It may have been removed and made anew by the run that held the lock until now.
        if folder.exists() and os.path.samestat(folder.stat(), os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _publish(index: Index, out: Path) -> Index:
    """One rename; workers and write_index have flushed everything to the disk before."""
    index.root.rename(out)
    flush_to_disk(out.parent)
    return Index.open(out)


def _print_corrupt(corrupt: Sequence[Sequence[str]]) -> None:
    for picture, reason in corrupt:
        print(f"does not decode: {picture}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
