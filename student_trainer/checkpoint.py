"""Checkpoints: everything the next step depends on, in one file, whole or not there at all.

    RUN/checkpoints/step_00001200.pt     {"step": 1200, "student": ..., "optimizer": ..., "config": ..., ...}

The step in the name is the number of updates done; the newest file is the one with the largest number.
Student and optimizer are the same on all ranks, so rank 0 alone writes. Views, order and mixup are functions
of (seed, step): there is no state of loaders or generators to keep.

Rejected: a `latest` pointer beside the files. Two truths can disagree after a crash; a name cannot.
Rejected: torch.distributed.checkpoint. It is for states that one process cannot hold, and its files are not
promised to be readable by the next torch.
"""

from __future__ import annotations

import errno
import os
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

_FOLDER = "checkpoints"
_ABSENT = "(absent)"


class DamagedError(ValueError):
    """A checkpoint file that cannot be read back whole."""


class FullDiskError(OSError):
    """There was no room for a checkpoint; those before it are as they were."""


def save(run_dir: Path, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write a checkpoint of state["step"] updates, then delete all but the newest `keep`; return its path.

    Args:
        run_dir: the run's folder.
        state: tensors, numbers, strings, and dicts, lists, tuples of them: what `torch.load(weights_only=True)`
            accepts. "step" must be there.
        keep: how many files stay, this one included; at least 1.

    A kill at any moment, or a full disk, leaves the older checkpoints as they were: the file gets its name only once
    it is whole and on disk.

    Raises:
        FullDiskError: there is no room for it.
    """
    folder = run_dir / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{state['step']:08d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        if _is_full(error):
            kept = [str(_step_of(other)) for other in _newest_first(folder)]
            raise FullDiskError(
                f"no room on the disk of {folder} for the checkpoint of step {state['step']}; there are whole ones of "
                f"step {' and '.join(kept) or '(none)'}: make room, or move the run's folder"
            ) from error
        raise
    _sync(folder)
    _prune(folder, state["step"], keep)
    return path


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint to the CPU, after checking every byte of it.

    Raises:
        DamagedError: the file is cut short, was altered, or holds things that only pickle could load.
    """
    try:
        # torch does not check the checksums that its own files carry; a flipped bit would load quietly.
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise DamagedError(f"checkpoint {path} is damaged: wrong checksum of {bad}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedError:
        raise
    except FileNotFoundError:
        raise
    except Exception as error:
        raise DamagedError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
    return dict(state)


def load_latest(run_dir: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run, or None when it has none.

    A damaged newest file is passed over for the one before it, with a warning: every step is a function of
    its number, so going back costs time and changes nothing. Let rank 0 load and broadcast, or let
    all ranks load and compare their steps: which file is whole must not be each rank's own opinion.

    Raises:
        DamagedError: there are checkpoints, and none of them is whole. Starting over must be someone's decision.
    """
    paths = _newest_first(run_dir / _FOLDER)
    for path in paths:
        try:
            return load(path)
        except DamagedError as damage:
            warnings.warn(f"{damage}. GOING BACK to the checkpoint before it.", RuntimeWarning, stacklevel=2)
    if paths:
        raise DamagedError(
            f"all {len(paths)} checkpoints in {run_dir / _FOLDER} are damaged: delete that folder to start anew"
        )
    return None


def refuse_other_settings(saved: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str] = ()) -> None:
    """Raise unless a run's settings are those it was started with.

    Args:
        saved: the settings in the checkpoint, nested dicts of plain values.
        now: the settings of this start.
        may_change: dotted names that may differ on resume; a name covers all beneath it.

    Raises:
        ValueError: every other setting that differs, one a line, with both values.
    """
    before, after = _flat(saved), _flat(now)
    differing = [
        f"  {name}: {before.get(name, _ABSENT)!r} in the checkpoint, {after.get(name, _ABSENT)!r} now"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, _ABSENT) != after.get(name, _ABSENT) and not _covered(name, may_change)
    ]
    if differing:
        lines = "\n".join(differing)
        raise ValueError(
            f"this run was started with other settings, and would not be the same run:\n{lines}\n"
            f"Give it the settings it had, or start a new run in another folder."
        )


def _is_full(error: BaseException | None) -> bool:
    """torch puts an error of its own in front of the file's, of an archive that does not end where it should."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to plain values; tuples as lists, as JSON would have them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _covered(name: str, names: Collection[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in names)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.pt"), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _prune(folder: Path, step: int, keep: int) -> None:
    """Keep the newest files up to `step`; later ones were damaged and passed over, or of an undone future."""
    newest = _newest_first(folder)
    upto = [path for path in newest if _step_of(path) <= step]
    for path in set(newest) - set(upto[: max(1, keep)]) | set(folder.glob("step_*.tmp")):
        path.unlink()


def _sync(folder: Path) -> None:
    """Make the new name durable as well as the bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
