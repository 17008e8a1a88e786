"""The view audit and the loader, with a real teacher server in this process."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from conftest import serve
from data_prep.index import Index
from protos import teacher_pb2 as pb
from student_trainer.audit import ViewAudit, teacher_rendering
from student_trainer.fleet import Fleet, TeacherRefusedError
from student_trainer.loader import Lesson, Source, run_ahead
from student_trainer.pictures import PictureError
from student_trainer.teachers import LiveTeacher
from views.draw import Plan, ViewLaw
from views.render import RENDER_VERSION, Renderer, Rendering


@pytest.fixture(scope="module")
def address(tiny_model, tiny_data):
    with serve((tiny_model, tiny_data)) as (address,):
        yield address


def rows_of(index: Index, step: int = 0):
    plan = Plan(seed=0, batch_size=24, law=ViewLaw(), samples=index.splits["train"],
                height=index.height, width=index.width)  # fmt: skip
    return plan.rows(step, 0, 12)


def lesson_of(index: Index, step: int = 0) -> Lesson:
    rows = rows_of(index, step)
    return Lesson(step, rows, rows)


def source_of(index: Index, fleet: Fleet, size: int = 32, teacher_size: int = 32) -> Source:
    student, teacher = (Renderer(Rendering(size=s), 16, None, 1) for s in (size, teacher_size))
    return Source(index, student, [LiveTeacher(fleet, teacher, num_audits=lambda step: 4)])


@pytest.mark.parametrize("transport", ["reference", "encoded", "pixels"])
@pytest.mark.parametrize("size", [32, 24])
def test_the_same_views_have_no_mismatch_whatever_travels(index, address, transport, size):
    with Fleet([address], data_digest=index.digest, transport=transport, rows_per_request=5) as fleet:
        batch = source_of(index, fleet, size).batch(lesson_of(index))
        (target,) = batch.targets
        target.result()
        audit = ViewAudit(index, fleet, Rendering(size=size), None)
        assert audit.mismatch(batch.lesson, target.audit(), batch.pixels) == 0


def test_the_three_transports_give_the_same_logits(index, address):
    logits = []
    for transport in ("reference", "encoded", "pixels"):
        with Fleet([address], data_digest=index.digest, transport=transport) as fleet:
            logits.append(source_of(index, fleet).batch(lesson_of(index)).targets[0].result())
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])


def test_a_student_that_sees_other_pixels_is_told_how_far_off_it_is(index, address, caplog):
    with Fleet([address], data_digest=index.digest) as fleet:
        batch = source_of(index, fleet).batch(lesson_of(index, 7))
        (target,) = batch.targets
        target.result()
        batch.pixels[2, 5, 5, 1] ^= 16
        audit = ViewAudit(index, fleet, Rendering(size=32), None)
        assert audit.mismatch(batch.lesson, target.audit(), batch.pixels) == 16
    warning = caplog.records[-1].getMessage()
    assert "VIEWS DIFFER at step 7 by up to 16 grey levels (allowed: 0)" in warning
    assert str(batch.rows.sample[:4].tolist()) in warning


def test_the_sheet_shows_the_teachers_own_pixels(index, address):
    with Fleet([address], data_digest=index.digest) as fleet:
        batch = source_of(index, fleet).batch(lesson_of(index))
        sheet = ViewAudit(index, fleet, Rendering(size=32), None).sheet(batch.lesson, 3)
        assert np.array_equal(sheet, batch.pixels[:3].numpy())


def test_a_teacher_that_renders_by_another_law_is_refused():
    described = pb.Description(
        renders=True, rendering=pb.Rendering(size=32, interpolation="cubic", version=RENDER_VERSION)
    )
    with pytest.raises(TeacherRefusedError, match=r"interpolation cubic.*interpolation linear"):
        teacher_rendering(described, Rendering(size=32))
    assert teacher_rendering(described, Rendering(size=16, interpolation="cubic")).size == 32


def test_batches_come_in_order_and_no_more_than_depth_are_made_ahead(index):
    made = []

    class Counting(Source):
        def batch(self, lesson):
            made.append(lesson.step)
            return super().batch(lesson)

    source = Counting(index, Renderer(Rendering(size=16), 16, None, 1), [])
    batches = run_ahead(source, (lesson_of(index, step) for step in range(50)), depth=2)
    for expected in range(3):
        assert next(batches).lesson.step == expected
    time.sleep(0.5)
    assert len(made) <= 3 + 2 + 1
    batches.close()
    count = len(made)
    time.sleep(0.2)
    assert len(made) == count, "closing stops the thread"


def test_what_a_batch_holds_does_not_depend_on_the_depth(index):
    def pixels(depth):
        source = Source(index, Renderer(Rendering(size=16), 16, None, 1), [])
        lessons = (lesson_of(index, step) for step in range(4))
        return torch.stack([batch.pixels for batch in run_ahead(source, lessons, depth)])

    assert torch.equal(pixels(1), pixels(4))


def test_a_damaged_picture_ends_the_run_with_its_name(index):
    class Damaged(Index):
        def read(self, samples):
            pictures = super().read(samples)
            return [picture[: len(picture) // 2] if s == 3 else picture
                    for s, picture in zip(samples, pictures, strict=True)]  # fmt: skip

    damaged = Damaged.open(index.root)
    source = Source(damaged, Renderer(Rendering(size=16), 32, None, 1), [])
    plan = Plan(seed=0, batch_size=18, law=ViewLaw(), samples=index.splits["train"],
                height=index.height, width=index.width)  # fmt: skip
    rows = plan.rows(9)
    with pytest.raises(PictureError, match=r"sample 3 \(.*data_prep.check"):
        list(run_ahead(source, [Lesson(9, rows, rows)], depth=1))
