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
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import torch

from data_prep.index import Index
from student_trainer.pictures import Pictures
from student_trainer.teachers import Target, Teacher
from views.render import Renderer
from views.view import Rows


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """What one step of one process looks at."""

    step: int
    rows: Rows
    """What the student sees."""
    asked: Rows
    """What live teachers see: the same samples; the same object where the views are the same."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one process needs for one step. Legend: V views."""

    lesson: Lesson
    pixels: torch.Tensor
    """uint8 [V, size, size, 3], the student's views, rendered."""
    targets: tuple[Target, ...]
    """Each teacher's logits, under way; none when learning from labels."""

    @property
    def rows(self) -> Rows:
        """What the student sees."""
        return self.lesson.rows


class Source:
    """Turns lessons into batches: where pictures come from, how they are rendered, and who is asked about them."""

    def __init__(self, index: Index, renderer: Renderer, teachers: Sequence[Teacher]) -> None:
        """Name the parts.

        Args:
            index: the data set.
            renderer: of the student's views.
            teachers: who is asked; none when learning from labels.
        """
        self._index = index
        self._renderer = renderer
        self._teachers = teachers

    def batch(self, lesson: Lesson) -> Batch:
        """Make one batch, now. The renderers are used: one thread at a time.

        Raises:
            PictureError: names the sample and what is wrong.
        """
        pictures = Pictures(self._index, lesson.rows)
        targets = tuple(teacher.ask(lesson.step, lesson.asked, pictures) for teacher in self._teachers)
        return Batch(lesson, pictures.render(self._renderer, lesson.rows), targets)


def run_ahead(source: Source, lessons: Iterable[Lesson], depth: int) -> Generator[Batch, None, None]:
    """The batches of the given lessons, in order, up to `depth` of them made ahead by a thread.

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
            for lesson in lessons:
                if stopped.is_set():
                    return
                hand_over(source.batch(lesson))
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
