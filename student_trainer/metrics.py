"""One JSON line per step in RUN/metrics.jsonl, and the same numbers for TensorBoard in RUN/tensorboard, and for others.

The file is the record of the run: append-only, flushed line by line, read by report.py and by anyone's
`jq`. Only rank 0 writes one. What is measured, and when, is the loop's business. A disk that is full ends no run:
what found no room waits in memory, and is written when there is some.

Rejected: one file per kind of line. Train and evaluation lines interleave by step, as they happened.
Rejected: torch's SummaryWriter. Its thread dies of a full disk, with the events that it held.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
Number = float | int | None


class Metrics:
    """Writes lines {"step": ..., name: number, ...} for one run; a context manager."""

    def __init__(
        self, run_dir: Path, resumed_step: int | None = None,
        also: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:  # fmt: skip
        """Open the run's record for appending.

        Args:
            run_dir: the run's folder; made if need be.
            resumed_step: the step of the checkpoint that the run goes on from. Lines of later steps, which
                the killed run wrote and this one will write again, are dropped, and so is a last line that
                the kill cut short. None: a new run, whose folder must not hold a record yet.
            also: who is told the step and finite numbers of each line, too, under TensorBoard's names.

        Raises:
            ValueError: a new run in a folder that holds another run's record.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE
        if resumed_step is not None:
            _drop_lines_after(path, resumed_step)
        elif path.exists() and path.stat().st_size:
            raise ValueError(f"{path} is another run's record: resume that run or choose another folder")
        self._also = also
        self._lines = _Appender(path)
        (run_dir / "tensorboard").mkdir(exist_ok=True)
        # A name that no earlier start of this run has used, and that sorts after theirs.
        self._events = _Appender(run_dir / "tensorboard" / f"events.out.tfevents.{time.time_ns()}")
        self._board = RecordWriter(self._events)
        self._event(file_version="brain.Event:2")
        if resumed_step is not None:  # TensorBoard hides what an earlier start wrote of this step and later ones
            self._event(step=resumed_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, numbers: Mapping[str, Number]) -> None:
        """Append one line, at once. Numbers that are not finite become null, which JSON has a word for."""
        finite = {name: _finite(number) for name, number in numbers.items()}
        self._lines.write(json.dumps({"step": step, **finite}, allow_nan=False).encode() + b"\n")
        points = {
            name if "/" in name else f"train/{name}": number for name, number in finite.items() if number is not None
        }
        values = [Summary.Value(tag=name, simple_value=number) for name, number in points.items()]
        self._event(step=step, summary=Summary(value=values))
        if self._also:
            self._also(step, points)

    def close(self) -> None:
        """Close both files; what was written stays."""
        self._lines.close()
        self._events.close()

    def _event(self, **fields: Any) -> None:
        self._board.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Appender:
    """A file that is written at its end, without a buffer of ours; bytes that find no room wait for some."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._is_full = False

    def write(self, data: bytes) -> None:
        self._waiting += data
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]  # a full disk may take a part
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self._is_full:
                log.error("no room on the disk of %s: what belongs there waits in memory until there is", self._path)
        self._is_full = bool(self._waiting)

    def close(self) -> None:
        self.write(b"")
        if self._waiting:
            log.error("still no room on the disk of %s: its last %d bytes are lost", self._path, len(self._waiting))
        self._file.close()


def read(run_dir: Path) -> list[dict[str, Number]]:
    """All whole lines of a run's record, in the order written. Without a record, none."""
    path = run_dir / FILE
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    # A kill can cut the last line short: without its newline it does not count.
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _drop_lines_after(path: Path, step: int) -> None:
    kept = [line for line in read(path.parent) if (line["step"] or 0) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _finite(number: Number) -> Number:
    if number is None or isinstance(number, int):
        return number
    return float(number) if math.isfinite(number) else None
