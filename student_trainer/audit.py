"""Does the teacher really see what the student sees? Checked during training, not trusted.

With some batches the teacher is asked to vouch for the views it rendered: it answers with their digests. The
student renders the same boxes at the teacher's size with its own decoder and compares. Only when digests differ
are the pixels themselves fetched, to say by how much.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.index import Index
from protos import teacher_pb2 as pb
from student_trainer.fleet import Audit, Fleet, TeacherRefusedError
from student_trainer.loader import Lesson
from student_trainer.pictures import Pictures
from views.render import MAX_PIXEL_DIFFERENCE, RENDER_VERSION, Renderer, Rendering
from views.view import Rows, view_digest

log = logging.getLogger(__name__)


def teacher_rendering(description: pb.Description, student: Rendering) -> Rendering:
    """How the teacher renders, once it is clear that it follows the same law as the student.

    Raises:
        TeacherRefusedError: another interpolation, antialiasing or version of the renderer; says both.
    """
    theirs = description.rendering
    ours = (student.interpolation, student.antialias, RENDER_VERSION)
    # A teacher without a renderer looks at what we render for it.
    if description.renders and (theirs.interpolation, theirs.antialias, theirs.version) != ours:
        raise TeacherRefusedError(
            "the teacher would not see the same views: it renders with "
            f"interpolation {theirs.interpolation}, antialias {theirs.antialias}, version {theirs.version}; "
            f"this run with interpolation {ours[0]}, antialias {ours[1]}, version {ours[2]}. "
            "Start it with the same --interpolation and --antialias, from the same release."
        )
    return Rendering(size=theirs.size, interpolation=student.interpolation, antialias=student.antialias)


class ViewAudit:
    """Compares the student's views with the digests that come with the teacher's answers."""

    def __init__(self, index: Index, fleet: Fleet, student: Rendering, device_id: int | None) -> None:
        self._index = index
        self._fleet = fleet
        theirs = teacher_rendering(fleet.description, student)
        self._same_size = theirs == student
        self._renderer = Renderer(theirs, 64, device_id, num_threads=1)
        on_gpu = device_id is not None or fleet.description.rendering.decoder == "gpu"
        self._bound = MAX_PIXEL_DIFFERENCE["cuda" if on_gpu else "cpu"]

    def mismatch(self, lesson: Lesson, audit: Audit, pixels: torch.Tensor | None = None) -> int:
        """Largest difference in grey levels over the views that the teacher vouched for.

        Warns when the difference is beyond the stated bound.

        Args:
            lesson: what the teacher was asked about.
            audit: what it vouched for: the first views.
            pixels: the student's views, where they are at hand; used only if they should be the very same.
        """
        own = self._own_pixels(lesson, len(audit.digests), pixels)
        digests = np.stack([np.frombuffer(view_digest(view), np.uint8) for view in own])
        if np.array_equal(digests, audit.digests):
            return 0
        theirs = teacher_pixels(self._fleet, self._index, lesson.asked, own)
        worst = int(np.abs(own.astype(np.int16) - theirs.astype(np.int16)).max())
        if worst > self._bound:
            log.warning(
                "VIEWS DIFFER at step %d by up to %d grey levels (allowed: %d): teacher and student do not see the "
                "same picture. Samples %s. Compare decoders, data sets and versions on both sides.",
                lesson.step, worst, self._bound, lesson.asked.sample[: len(own)].tolist(),
            )  # fmt: skip
        return worst

    def _own_pixels(self, lesson: Lesson, num_views: int, pixels: torch.Tensor | None) -> NDArray[np.uint8]:
        if self._same_size and pixels is not None and lesson.asked is lesson.rows:
            return pixels[:num_views].cpu().numpy()
        rows = lesson.asked.alone(0, num_views)
        return Pictures(self._index, rows).render(self._renderer, rows).cpu().numpy()

    def sheet(self, lesson: Lesson, num_views: int) -> NDArray[np.uint8]:
        """The first views as the teacher sees them: uint8 [num_views, size, size, 3], its own pixels."""
        num_views = min(num_views, len(lesson.asked))
        return teacher_pixels(self._fleet, self._index, lesson.asked, self._own_pixels(lesson, num_views, None))


def teacher_pixels(fleet: Fleet, index: Index, asked: Rows, own: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Ask for the first len(own) views of some rows, as the teacher renders them.

    own: uint8 [A, size, size, 3], sent where the teacher renders nothing itself.
    """
    answer = fleet.ask(
        asked.alone(0, len(own)),
        picture=lambda sample: index.read([sample])[0].tobytes(),
        pixels=own,
        num_audits=len(own),
        audit_pixels=True,
    )
    answer.result()
    audit = answer.audit()
    assert audit is not None
    assert audit.pixels is not None
    return audit.pixels
