"""A prepared set appears whole: it is made in a folder beside it, OUT.partial, and gets its name by one rename.

A run that was killed leaves only OUT.partial, which the next run clears. Rejected: writing into OUT, with a file that
says it is complete. Whoever forgets to look at that file trains on half a set.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.index import Index, flush_to_disk

MADE = "set"
"""Where below the staging folder the set is made."""
UNPACKED = "unpacked"
"""Where archives are unpacked meanwhile."""


class WaitsForPermission(ValueError):  # noqa: N818  (the sentence is the error)
    """Raised while staging: the set is whole and stays there, until somebody says that it may be published."""


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """The folder OUT.partial, ours alone; removed at the end unless a set waits in it for permission.

    Raises:
        ValueError: it cannot be made, or another run is at work in it.
    """
    folder = out.with_name(f"{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(folder)
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({error.strerror}: {error.filename}); choose another --out") from error
    try:
        yield folder
    except WaitsForPermission:
        shutil.rmtree(folder / UNPACKED, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    else:
        shutil.rmtree(folder)
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


def clear(folder: Path) -> None:
    """Remove what a run that was killed has left."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def publish(index: Index, out: Path) -> Index:
    """One rename; workers and write_index have flushed everything to the disk before."""
    index.root.rename(out)
    flush_to_disk(out.parent)
    return Index.open(out)
