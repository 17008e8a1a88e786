"""What a recipe asks of machines, and how many of them answer it: the planner's arithmetic (`benchmarks.plan`).

No clock and no network here: rates come from benchmarks/rates.py or from people. What a row costs is taken from the
code that does it: the views of a request from the plan of views, its bytes from the messages themselves (without the
few bytes of HTTP/2 and TCP), the length of a run from the schedule.

Rejected: a queueing model. Replicas that keep up on average keep up: a student asks `--prefetch` batches ahead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protos import teacher_pb2 as pb
from protos.arrays import to_message
from student_trainer.config import Config
from student_trainer.schedule import num_steps
from views.draw import Plan
from views.view import Rows
from views.wire import ask_by_reference

_HEX = "0" * 64  # a fingerprint or a digest
_HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Eye:
    """A teacher, as far as its work depends on it."""

    name: str
    size: int
    """Of its views, in pixels."""
    num_classes: int
    dtype: type[np.floating]
    """In which its logits travel."""


@dataclass(frozen=True, kw_only=True)
class RowCost:
    """What one row costs at one teacher, on average over a request."""

    views: float
    """Decoded and rendered."""
    up: dict[str, float]
    """Bytes of the question, by how pictures travel: reference, encoded, pixels."""
    down: float
    """Bytes of the answer."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """A whole run."""

    recipe: str
    num_pictures: int
    steps: int
    batch: int
    student_views: float
    """Decoded and rendered for a row, by the student's process."""
    teachers: tuple[Eye, ...]
    costs: tuple[RowCost, ...]
    """Of each teacher."""
    fixed_views: int
    """fix/: views of a picture that are answered once, before the first step, and kept. 0: each row is asked."""

    @property
    def images(self) -> int:
        """Rows that the student sees."""
        return self.steps * self.batch


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the machines do, each with nothing else to do."""

    teachers: tuple[float, ...]
    """Rows a second of one GPU, of each teacher."""
    student: float
    """Rows a second of one GPU: forward, backward, update."""
    student_decodes: float
    """Views a second of one core, at the student's size."""
    teacher_decodes: tuple[float, ...]
    """Likewise, at each teacher's."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """For so many student GPUs."""

    student_gpus: int
    replicas: tuple[int, ...]
    """GPUs of each teacher that keep the students busy."""
    images_per_s: float
    wall_s: float
    """Of the training; a fill comes before."""
    fill_gpu_s: float
    """Of teachers, once."""
    student_gpu_hours: float
    teacher_gpu_hours: float
    """With the fill."""
    up: dict[str, float]
    """Bytes a second to all teachers."""
    down: float
    """From all."""
    up_each: tuple[dict[str, float], ...]
    """To one replica of each teacher."""
    down_each: tuple[float, ...]
    student_cores: float
    """That decode, in all."""
    teacher_cores: tuple[float, ...]
    """That decode, beside one replica of each teacher."""

    @property
    def gpu_hours(self) -> float:
        """Of both sides."""
        return self.student_gpu_hours + self.teacher_gpu_hours


def demand_of(
    config: Config, num_pictures: int, teachers: Sequence[Eye], *, picture_bytes: float, ranks: int
) -> Demand:
    """What a recipe asks for.

    Args:
        config: the recipe.
        num_pictures: of its training split.
        teachers: none when it learns from labels.
        picture_bytes: of one file, on average.
        ranks: student processes that share a batch.
    """
    batch = config.optim.batch_size
    share = max(1, batch // ranks)
    plan = Plan(
        seed=0, batch_size=batch, law=config.views.student, samples=range(num_pictures),
        height=np.broadcast_to(np.int32(500), num_pictures), width=np.broadcast_to(np.int32(500), num_pictures),
    )  # fmt: skip
    rows = plan.rows(0, 0, share)
    request = rows.take(0, min(share, config.teacher.rows_per_request))
    return Demand(
        recipe=config.recipe,
        num_pictures=num_pictures,
        steps=num_steps(config.optim.epochs, num_pictures, batch),
        batch=batch,
        student_views=rows.num_views / len(rows),
        teachers=tuple(teachers),
        costs=tuple(_row_cost(request, one, picture_bytes) for one in teachers),
        fixed_views=config.views.fixed.num_views if config.views.kind == "fix" and teachers else 0,
    )


def answer(demand: Demand, rates: Rates, student_gpus: int) -> Answer:
    """How many teacher GPUs so many student GPUs need, and what it comes to."""
    images_per_s = student_gpus * rates.student
    asked = 0.0 if demand.fixed_views else images_per_s  # rows a second, at each teacher
    replicas = tuple(math.ceil(round(asked / rate, 9)) for rate in rates.teachers)
    wall_s = demand.images / images_per_s
    fill_gpu_s = sum(demand.num_pictures * demand.fixed_views / rate for rate in rates.teachers)
    each = [asked / max(1, num) for num in replicas]
    return Answer(
        student_gpus=student_gpus,
        replicas=replicas,
        images_per_s=images_per_s,
        wall_s=wall_s,
        fill_gpu_s=fill_gpu_s,
        student_gpu_hours=student_gpus * wall_s / _HOUR_S,
        teacher_gpu_hours=(sum(replicas) * wall_s + fill_gpu_s) / _HOUR_S,
        up={way: asked * sum(cost.up[way] for cost in demand.costs) for way in ("reference", "encoded", "pixels")},
        down=asked * sum(cost.down for cost in demand.costs),
        up_each=tuple(
            {way: rate * size for way, size in cost.up.items()} for rate, cost in zip(each, demand.costs, strict=True)
        ),
        down_each=tuple(rate * cost.down for rate, cost in zip(each, demand.costs, strict=True)),
        student_cores=images_per_s * demand.student_views / rates.student_decodes,
        teacher_cores=tuple(
            rate * cost.views / decodes
            for rate, cost, decodes in zip(each, demand.costs, rates.teacher_decodes, strict=True)
        ),
    )  # fmt: skip


def with_cores(demand: Demand, rates: Rates, cores: int) -> Rates:
    """The rates of GPUs that have so many cores beside them to decode with, which may be too few to feed them."""
    return dataclasses.replace(
        rates,
        student=min(rates.student, cores * rates.student_decodes / demand.student_views),
        teachers=tuple(
            min(rate, cores * decodes / cost.views)
            for rate, decodes, cost in zip(rates.teachers, rates.teacher_decodes, demand.costs, strict=True)
        ),
    )


def _row_cost(request: Rows, teacher: Eye, picture_bytes: float) -> RowCost:
    num_rows = len(request)
    question = ask_by_reference(request, _HEX)
    question.fingerprint, question.request_id, question.client = _HEX, _HEX[:32], _HEX
    by_reference = question.ByteSize()
    logits = to_message(np.zeros((num_rows, teacher.num_classes), teacher.dtype))
    reply = pb.PredictReply(request_id=_HEX[:32], fingerprint=_HEX, logits=logits)
    num_pictures = len(np.unique(request.sample))
    return RowCost(
        views=request.num_views / num_rows,
        up={
            "reference": by_reference / num_rows,
            "encoded": (by_reference + num_pictures * picture_bytes) / num_rows,
            "pixels": request.num_views * 3 * teacher.size**2 / num_rows,
        },
        down=reply.ByteSize() / num_rows,
    )
