"""Checks of what a run reads and keeps: prepared data sets, the store of logits, the run's folder."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.index import Index
from data_prep.picture import Undecodable, size_as_viewed
from funmatch.finding import Finding, broken, look, ok
from student_trainer.config import FREE_ON_RESUME, Config, settings

if TYPE_CHECKING:
    from student_trainer.redis_store import Memory

_FULL = 0.98  # of maxmemory: a batch more may not fit
_MOST_SHARDS = 64  # of which a picture is decoded: spread over all, so that a thousand shards take a second


def open_index(root: Path) -> tuple[Index | None, Finding]:
    """The data set there, and what is to be said of it."""
    try:
        index = Index.open(root)
    except FileNotFoundError as error:
        return None, broken("data", str(error), "give the folder that `funmatch prepare` wrote, whole")
    except (ValueError, OSError) as error:
        return None, broken("data", str(error), "prepare or copy the set again")
    splits = ", ".join(f"{name} {len(rows)}" for name, rows in index.splits.items())
    return index, ok("data", f"{root}: {len(index)} pictures ({splits}), {len(index.classes)} classes")


def check_pictures(index: Index) -> Iterator[Finding]:
    """One picture of each shard, read and decoded; of very many shards, of some."""
    firsts = np.unique(index.shard, return_index=True)[1]
    chosen = firsts[np.unique(np.linspace(0, len(firsts) - 1, _MOST_SHARDS).astype(int))]
    bad = []
    for sample in chosen.tolist():
        try:
            size = size_as_viewed(index.read([sample])[0].tobytes())
            if size != (index.height[sample], index.width[sample]):
                bad.append(f"{index.where(sample)} is not the picture that was written there")
        except (Undecodable, OSError) as error:
            bad.append(f"{index.where(sample)} does not decode: {error}")
    if bad:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        cure = f"python -m data_prep.check {index.root} says all that is wrong; prepare or copy the set again"
        yield broken("pictures", f"{index.root}: {bad[0]}{more}", cure)
    else:
        yield ok("pictures", f"{index.root}: one of each of {len(chosen)} shards decodes")


def check_store(url: str) -> Iterator[Finding]:
    """Whether the store of a fixed teacher's logits can be used; a Redis server is asked, nothing is written."""
    from student_trainer.logit_store import StoreGoneError, StoreKey, redacted
    from student_trainer.redis_store import RedisStore
    from views.setting import ViewSetting

    if "://" not in url:
        yield ok("store", f"{url} is a folder; its disk is below")
        return
    views = ViewSetting(setting="fix/cc").fixed
    key = StoreKey(fingerprint="", data_digest="", views=views, num_samples=1, num_classes=1, dtype="float32")
    try:
        with contextlib.closing(RedisStore(url, key)) as store:
            memory = store.memory()
    except StoreGoneError as error:
        yield broken("store", str(error), "see that the address is right and can be reached from this machine")
    else:
        yield _full(redacted(url), memory)


def _full(name: str, memory: Memory | None) -> Finding:
    """How much more a Redis server takes, and whether it forgets."""
    if memory is None:
        return ok("store", f"{name} answers; this user may not ask how full it is")
    if not memory.most:
        return ok("store", f"{name} holds {_mb(memory.used)}, and has no maxmemory: it may take all of its machine's")
    says = f"{name} holds {_mb(memory.used)} of {_mb(memory.most)}"
    if memory.policy != "noeviction":
        cure = "config set maxmemory-policy noeviction, and room for all pictures"
        return look("store", f"{says}; when it is full it forgets ({memory.policy}) what is asked for next", cure)
    if memory.used > _FULL * memory.most:
        return broken("store", f"{says}: it is full", "raise its maxmemory, or choose another store")
    return ok("store", says)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def check_run(
    run_dir: Path, config: Config | None, indexes: Sequence[Index], teachers: Sequence[str]
) -> Iterator[Finding]:
    """Whether a run could go on in its folder: a whole checkpoint, of these settings, data and teachers.

    Args:
        run_dir: the folder.
        config: the settings that the run would be started with, if they are known.
        indexes: the data sets it would be started with; the first one is learned from.
        teachers: fingerprints of the teachers, one each.
    """
    from student_trainer import checkpoint

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            saved = checkpoint.load_latest(run_dir)
    except (checkpoint.DamagedError, OSError) as error:
        yield broken("run folder", str(error), "delete its checkpoints, or choose another --run-dir")
        return
    if saved is None:
        yield ok("run folder", f"{run_dir} has no checkpoint: a run would begin there")
        return
    for one in caught:
        yield look("run folder", str(one.message), "nothing, if the steps in between may be learned again")
    differing = _differing(saved, config, indexes, teachers)
    for says in differing:
        yield broken("run folder", f"{run_dir}: {says}", "choose another --run-dir, or give the run what it had")
    if not differing:
        yield ok("run folder", f"{run_dir}: a run goes on from step {saved['step']}")


def _differing(
    saved: dict[str, dict[str, str]], config: Config | None, indexes: Sequence[Index], teachers: Sequence[str]
) -> list[str]:
    from student_trainer import checkpoint

    found = []
    if config is not None:
        try:
            checkpoint.refuse_other_settings(saved["config"], settings(config), FREE_ON_RESUME)
        except ValueError as error:
            found.append(str(error).rpartition("\n")[0])  # without its cure: that one is ours to say
    if indexes and saved["identity"]["data"] != indexes[0].digest:
        found.append(f"it learned from another data set than {indexes[0].root}")
    if teachers and saved["identity"]["teacher"] not in ("", " ".join(teachers)):
        found.append("it learned from other teachers (their fingerprints differ)")
    return found
