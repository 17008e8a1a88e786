"""Does the teacher really see what the student sees? Checked during training, not trusted.

With some batches the teacher is asked to vouch for the views it rendered: it answers with their digests. The
student renders the same boxes at the teacher's size with its own decoder and compares. Only when digests differ
are the pixels themselves fetched, to say by how much.
"""

from __future__ import annotations

import logging

import numpy as np

from data_prep.index import Index
from protos import teacher_pb2 as pb
from student_trainer.loader import Batch
from student_trainer.teacher_client import Fleet, TeacherRefusedError
from views.render import MAX_PIXEL_DIFFERENCE, RENDER_VERSION, Renderer, Rendering
from views.view import view_digest

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
        # Rendered anew unless both see the same size: then the very pixels that are trained on are compared.
        self._renderer = None if theirs == student else Renderer(theirs, 64, device_id, num_threads=1)
        on_gpu = device_id is not None or fleet.description.rendering.decoder == "gpu"
        self._bound = MAX_PIXEL_DIFFERENCE["cuda" if on_gpu else "cpu"]

    def mismatch(self, batch: Batch) -> int:
        """Largest difference in grey levels over the audited views of a batch whose answer has arrived.

        Warns when the difference is beyond the stated bound.
        """
        assert batch.answer is not None
        audit = batch.answer.audit()
        assert audit is not None, "only an audited batch has digests to compare"
        own = self._own_pixels(batch, len(audit.digests))
        digests = np.stack([np.frombuffer(view_digest(view), np.uint8) for view in own])
        if np.array_equal(digests, audit.digests):
            return 0
        worst = self._largest_difference(batch, own)
        if worst > self._bound:
            samples = batch.rows.sample[: len(own)].tolist()
            log.warning(
                "VIEWS DIFFER at step %d by up to %d grey levels (allowed: %d): teacher and student do not see the "
                "same picture. Samples %s. Compare decoders, data sets and versions on both sides.",
                batch.step, worst, self._bound, samples,
            )  # fmt: skip
        return worst

    def _largest_difference(self, batch: Batch, own: np.ndarray) -> int:
        theirs = teacher_pixels(self._fleet, self._index, batch, own)
        return int(np.abs(own.astype(np.int16) - theirs.astype(np.int16)).max())

    def _own_pixels(self, batch: Batch, num_views: int) -> np.ndarray:
        if self._renderer is None:
            return batch.pixels[:num_views].cpu().numpy()
        rows = batch.rows
        samples, image = np.unique(rows.sample[:num_views], return_inverse=True)
        pictures = self._index.read(samples)
        views = self._renderer.render(pictures, image.astype(np.int32), rows.box[:num_views], rows.flip[:num_views])
        return views.cpu().numpy()

    def sheet(self, batch: Batch, num_views: int) -> np.ndarray:
        """The first views of a batch as the teacher sees them: uint8 [num_views, size, size, 3], its own pixels."""
        num_views = min(num_views, len(batch.rows))
        return teacher_pixels(self._fleet, self._index, batch, self._own_pixels(batch, num_views))


def teacher_pixels(fleet: Fleet, index: Index, batch: Batch, own: np.ndarray) -> np.ndarray:
    """Ask for the first len(own) views of a batch, as the teacher rendered them.

    own: uint8 [A, size, size, 3], sent where the teacher renders nothing itself.
    """
    rows = batch.rows.alone(0, len(own))
    answer = fleet.ask(
        rows,
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
