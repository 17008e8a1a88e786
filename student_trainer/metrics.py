"""One JSON line per step in RUN/metrics.jsonl, and the same numbers for TensorBoard in RUN/tensorboard.

The file is the record of the run: append-only, flushed line by line, read by report.py and by anyone's
`jq`. Only rank 0 writes one. What is measured, and when, is the loop's business.

Rejected: one file per kind of line. Train and evaluation lines interleave by step, as they happened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

FILE = "metrics.jsonl"
Number = float | int | None


class Metrics:
    """Writes lines {"step": ..., name: number, ...} for one run; a context manager."""

    def __init__(self, run_dir: Path, resumed_step: int | None = None) -> None:
        """Open the run's record for appending.

        Args:
            run_dir: the run's folder; made if need be.
            resumed_step: the step of the checkpoint that the run goes on from. Lines of later steps, which
                the killed run wrote and this one will write again, are dropped, and so is a last line that
                the kill cut short. None: a new run, whose folder must not hold a record yet.

        Raises:
            ValueError: a new run in a folder that holds another run's record.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE
        if resumed_step is not None:
            _drop_lines_after(path, resumed_step)
        elif path.exists() and path.stat().st_size:
            raise ValueError(f"{path} is another run's record: resume that run or choose another folder")
        self._file = path.open("a", encoding="utf-8")
        # A line that no step can write again stands above the purge; TensorBoard hides the rest.
        purge = None if resumed_step is None else resumed_step + 1
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def write(self, step: int, numbers: Mapping[str, Number]) -> None:
        """Append one line and flush it. Numbers that are not finite become null, which JSON has a word for."""
        finite = {name: _finite(number) for name, number in numbers.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        for name, number in finite.items():
            if number is not None:
                self._board.add_scalar(name if "/" in name else f"train/{name}", number, step)

    def close(self) -> None:
        """Close both files; what was written stays."""
        self._file.close()
        self._board.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
