"""Batches, made ahead: read the pictures, ask the teacher, render the views.

One thread per process runs the plan ahead of the training loop by `depth` batches. The teacher's request leaves
before the student's own decoding starts, so the two overlap; the loop then waits for whichever is later. What a
batch holds is decided by its rows alone (views/draw.py): depth and timing cannot change it.

Requests by reference leave further ahead than pixels are made, as far as the teachers' latency asks for: each time the
loop gets a batch before its logits, by one batch more, up to _FARTHEST. A batch asked for and not rendered costs its
rows and its logits (4096 of 1000 classes: 16 MB), a rendered one its pixels (0.6 GB at 224). If the teachers are too
slow and not too far away, nothing is lost: what they have no room for waits in the fleet.

Rejected: DALI's readers (their shuffling and sharding depend on batch size and world size) and worker processes
(DALI decodes in threads of its own, outside of the GIL).
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import torch

from data_prep.index import Index
from student_trainer.fleet import Answer
from student_trainer.pictures import Pictures
from student_trainer.teachers import LiveTeacher, Target, Teacher
from views.render import Renderer
from views.view import Rows

_FARTHEST = 16  # batches that are asked for before they are rendered


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


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A lesson that the teachers know of, and nobody has rendered yet."""

    lesson: Lesson
    pictures: Pictures
    targets: tuple[Target, ...]


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
        by_reference = all(isinstance(one, LiveTeacher) and one.fleet.transport == "reference" for one in teachers)
        self.farthest = _FARTHEST if teachers and by_reference else 1
        """Batches that may be asked for ahead; others than references hold pictures meanwhile."""

    def batch(self, lesson: Lesson) -> Batch:
        """Make one batch, now. The renderers are used: one thread at a time.

        Raises:
            PictureError: names the sample and what is wrong.
        """
        return self.render(self.ask(lesson))

    def ask(self, lesson: Lesson) -> _Asked:
        """Begin a batch: the teachers are asked."""
        pictures = Pictures(self._index, lesson.rows)
        targets = tuple(teacher.ask(lesson.step, lesson.asked, pictures) for teacher in self._teachers)
        return _Asked(lesson, pictures, targets)

    def render(self, asked: _Asked) -> Batch:
        """Finish it: its views are rendered."""
        return Batch(asked.lesson, asked.pictures.render(self._renderer, asked.lesson.rows), asked.targets)


def run_ahead(source: Source, lessons: Iterable[Lesson], depth: int) -> Generator[Batch, None, None]:
    """The batches of the given lessons, in order, up to `depth` of them made ahead by a thread, and more asked for.

    An error of the thread is raised here. Closing the generator (or leaving its loop) stops the thread.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()
    reach = 1  # batches that are asked for and not rendered, the one at work included

    def hand_over(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            coming, asked = iter(lessons), deque[_Asked]()
            while not stopped.is_set():
                asked.extend(source.ask(lesson) for lesson in itertools.islice(coming, reach - len(asked)))
                if not asked:
                    hand_over(None)
                    return
                hand_over(source.render(asked.popleft()))
        except BaseException as error:  # whatever it is, it belongs to the loop
            hand_over(error)

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if _comes_before_its_logits(item):
                reach = min(reach + 1, source.farthest)
            yield item
    finally:
        stopped.set()
        thread.join()


def _comes_before_its_logits(batch: Batch) -> bool:
    return any(isinstance(target, Answer) and not target.is_there for target in batch.targets)
