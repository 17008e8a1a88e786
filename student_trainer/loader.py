"""Batches, made ahead: read the pictures, ask the teacher, render the views.

One thread per process runs the plan ahead of the training loop by `depth` batches. The teacher's request leaves
before the student's own decoding starts, so the two overlap; the loop then waits for whichever is later. What a
batch holds is decided by its rows alone (views/draw.py): depth and timing cannot change it.

Rejected: DALI's readers (their shuffling and sharding depend on batch size and world size) and worker processes
(DALI decodes in threads of its own, outside of the GIL).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.index import Index
from student_trainer.teacher_client import Answer, Fleet
from views.render import BadPictureError, Renderer
from views.view import Rows


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one process needs for one step. Legend: R rows, V views."""

    step: int
    rows: Rows
    pixels: torch.Tensor
    """uint8 [V, size, size, 3], the rendered views."""
    answer: Answer | None
    """The teacher's logits, under way; None without a teacher."""


class PictureError(RuntimeError):
    """A picture of the data set cannot be rendered."""


class Source:
    """Turns rows into batches: where pictures come from, how they are rendered, and who is asked about them."""

    def __init__(
        self,
        index: Index,
        renderer: Renderer,
        fleet: Fleet | None,
        teacher_renderer: Renderer | None = None,
        num_audits: Callable[[int], int] | None = None,
    ) -> None:
        """Name the parts.

        Args:
            index: the data set.
            renderer: of the student's views.
            fleet: the teachers, or None.
            teacher_renderer: renders at the teacher's size, for the pixels transport.
            num_audits: how many views of a step the teacher shall vouch for.
        """
        self._index = index
        self._renderer = renderer
        self._fleet = fleet
        self._teacher_renderer = teacher_renderer
        self._num_audits = num_audits

    def batch(self, step: int, rows: Rows) -> Batch:
        """Make one batch, now. The student's renderer is used: one thread at a time.

        Raises:
            PictureError: names the sample, its shard and what is wrong.
        """
        samples, image = np.unique(rows.sample, return_inverse=True)
        pictures = self._index.read(samples)
        try:
            answer = self._ask(step, rows, samples, pictures, image) if self._fleet else None
            pixels = self._renderer.render(pictures, image.astype(np.int32), rows.box, rows.flip)
        except BadPictureError as error:
            sample = int(rows.sample[error.view])
            key = self._index.key[sample].decode()
            raise PictureError(
                f"step {step}: sample {sample} ({key}) of {self._index.root}: {error}. "
                "`python -m data_prep.check` re-reads a data set; prepare it anew if it was damaged."
            ) from error
        return Batch(step, rows, pixels, answer)

    def _ask(
        self,
        step: int,
        rows: Rows,
        samples: NDArray[np.int64],
        pictures: list[NDArray[np.uint8]],
        image: NDArray[np.int64],
    ) -> Answer:
        assert self._fleet is not None
        num_audits = self._num_audits(step) if self._num_audits else 0
        if self._fleet.transport == "encoded":
            place = {int(sample): i for i, sample in enumerate(samples)}
            return self._fleet.ask(rows, picture=lambda s: pictures[place[s]].tobytes(), num_audits=num_audits)
        if self._fleet.transport == "pixels":
            assert self._teacher_renderer is not None
            views = self._teacher_renderer.render(pictures, image.astype(np.int32), rows.box, rows.flip)
            return self._fleet.ask(rows, pixels=views.cpu().numpy(), num_audits=num_audits)
        return self._fleet.ask(rows, num_audits=num_audits)


def run_ahead(source: Source, steps: Iterable[tuple[int, Rows]], depth: int) -> Generator[Batch, None, None]:
    """The batches of the given steps, in order, up to `depth` of them made ahead by a thread.

    An error of the thread is raised here. Closing the generator (or leaving its loop) stops the thread.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def hand_over(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step, rows in steps:
                if stopped.is_set():
                    return
                hand_over(source.batch(step, rows))
            hand_over(None)
        except BaseException as error:  # whatever it is, it belongs to the loop
            hand_over(error)

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
