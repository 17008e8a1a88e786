"""`python -m data_prep.prepare NAME --source DIR --out DIR`: a data set as shards with an index.

An OUT that exists is whole (staging.py); a run that finds the wanted OUT says so and does nothing.

Pictures that do not decode are named, counted and left out. Unless --skip-corrupt says that this is fine,
nothing is published: the finished set waits in OUT.partial, and the same command with --skip-corrupt
publishes it at once.

Not here: how a set is made (making.py), the layouts of the archives (layouts.py), a picture (picture.py), a shard
(shards.py), the processes (pool.py), the format (index.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep import staging
from data_prep.archive import Source
from data_prep.download import download
from data_prep.index import DATASET_FILE, Index
from data_prep.layouts import LAYOUTS
from data_prep.making import make_set, most_frequent

Name = Literal["flowers102", "pets", "food101", "sun397", "imagenet", "digits", "folder", "shards"]

PICTURES_PER_SHARD = 1000
"""~100 MB at ImageNet's sizes: enough shards to share among workers, few enough to copy around."""


class CorruptPictures(staging.WaitsForPermission):
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
    with staging.beside(out) as folder:
        made = folder / staging.MADE
        if skip_corrupt and (made / DATASET_FILE).exists():
            # The last run ended with CorruptPictures: its set is whole and waits for this permission.
            waiting = Index.open(made)
            if _same(waiting, wanted, source):
                return staging.publish(waiting, out)
        staging.clear(folder)
        made.mkdir()
        index = make_set(name, source, made, folder / staging.UNPACKED, wanted, workers, progress)
        corrupt = index.prepared["corrupt"]
        if corrupt and not skip_corrupt:
            raise CorruptPictures([tuple(pair) for pair in corrupt], out)
        return staging.publish(index, out)


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
        lines.append(f"ignored were, by their ends: {most_frequent(kinds)}")
    if index.splits.keys() == {"train"}:
        lines.append("there is no split to evaluate on: prepare with --hold-out 0.1, or give --data.evaluate-root")
    return "\n".join(lines)


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


def _print_corrupt(corrupt: Sequence[Sequence[str]]) -> None:
    for picture, reason in corrupt:
        print(f"does not decode: {picture}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
