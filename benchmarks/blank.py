"""A real teacher server without pictures and network: all that a request costs beside decoding and the model.

Service, admission, fairness, batcher and port are those of teacher_server/server.py; every picture of its data set, as
large as ImageNet, is grey, and the model's answers lie ready. `python -m benchmarks.blank` prints its address and ends
with standard input (benchmarks/echo.py starts it). Rejected: pictures that travel as pixels, which need no decoding
either: a request would weigh 10 MB.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import echo
from data_prep.index import COLUMNS, Index
from teacher_server.batcher import Part
from teacher_server.config import Config
from teacher_server.gate import Report
from teacher_server.loading import Loaded
from teacher_server.model import Scene, Teacher
from teacher_server.pictures import Pictures
from teacher_server.server import Server
from views.wire import Question

_BATCH_ROWS = 128  # the default on a GPU


def imagenet_sized() -> Index:
    """A data set of as many rows that has no pictures: what references are checked against."""
    columns: dict[str, Any] = {
        name: np.broadcast_to(np.zeros(1, dtype), echo.NUM_SAMPLES) for name, dtype in COLUMNS.items()
    }
    columns["height"] = np.full(echo.NUM_SAMPLES, echo.HEIGHT, np.int32)
    columns["width"] = np.full(echo.NUM_SAMPLES, echo.WIDTH, np.int32)
    return Index(
        root=Path(), name="blank", digest=echo.DIGEST, classes=(), splits={"train": range(echo.NUM_SAMPLES)}, shards=(),
        linked=False, prepared={}, **columns,
    )  # fmt: skip


class Blank(Pictures):
    """Checks a question as a teacher does, takes its turns, and finds every picture grey."""

    def __init__(self, index: Index) -> None:
        super().__init__([index], [], max_pixels=2**24, max_bytes=2**24)
        self.renders = True
        self._grey = torch.full((2 * 1024, echo.SIZE, echo.SIZE, 3), 127, dtype=torch.uint8)

    def _render(self, question: Question, part: slice, index: Index | None) -> torch.Tensor:  # noqa: ARG002
        return self._grey[: part.stop - part.start]


class Instant:
    """A network whose answers lie ready."""

    batch_rows = _BATCH_ROWS
    device = torch.device("cpu")

    def __init__(self) -> None:
        self._logits = echo.some_logits(_BATCH_ROWS, echo.NUM_CLASSES)

    def answer(self, parts: Sequence[Part[Scene]]) -> NDArray[np.float32]:
        """[R, K] for the R rows of these parts, at once."""
        return self._logits[: sum(part.stop - part.start for part in parts)]


def main() -> None:
    """Serve, print the address, and end with standard input."""
    torch.set_num_threads(1)
    server = Server(Config(model="echo", address="127.0.0.1:0", device="cpu"))
    server.bind()
    report = Report(num_images=0, finite=True, max_difference=0, mean_kl=0, agreement_top1=1, batch_invariant=True)
    pictures = Blank(imagenet_sized())
    teacher = cast(Teacher, Instant())
    server.serve(Loaded(description=echo.description(), pictures=pictures, teacher=teacher, report=report))
    print(server.address, flush=True)
    sys.stdin.read()
    server.drain()


if __name__ == "__main__":
    main()
