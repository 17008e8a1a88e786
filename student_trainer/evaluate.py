"""How good the student is, and how close to its teacher: sums over examples, each counted once.

Which examples a rank looks at (`shard_of`), the accumulation (`Score`) and the pass over a split (`Evaluation`)
live here; the distances themselves are loss.py's. The teacher is evaluated through its own wire, on its own
rendering of the same views.

Rejected: padding every rank to equally many examples, as DistributedSampler does. It counts some examples
twice, and the result then depends on the number of ranks.

Shape legend: B examples of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from data_prep.index import Index
from models import ModelCard
from student_trainer.config import Config
from student_trainer.fleet import TeacherError
from student_trainer.loader import Batch, Lesson, Source, run_ahead
from student_trainer.loss import agreement, kl_divergence, one_teacher
from student_trainer.teachers import LiveTeacher
from student_trainer.world import World
from views.draw import ViewLaw
from views.mix import mix
from views.render import Renderer
from views.setting import FixedViews

_LABELLED = ("student_top1", "student_xent", "teacher_top1")
_PAIRED = ("agreement_top1", "agreement_top5", "kl")


def shard_of(samples: range, rank: int, world_size: int) -> NDArray[np.int64]:
    """This rank's share of `samples`, every world_size-th one: together the ranks hold each exactly once.

    Shares differ by at most one example, so ranks may need different numbers of batches: no collective may
    stand inside the loop over them.
    """
    return np.asarray(samples[rank::world_size], dtype=np.int64)


class Score:
    """Sums over a rank's examples; `result` adds up the ranks and divides.

    An example without a label (-1) counts for the agreement with the teacher and not for accuracy.
    """

    def __init__(self, device: torch.device, with_teacher: bool) -> None:
        """Start from nothing. `with_teacher` is the same on all ranks, also on one without any example."""
        self._with_teacher = with_teacher
        # One float64 vector on the device: no synchronisation per batch, one all-reduce at the end, and
        # counts that stay exact. The last two entries count examples: all, and those with a label.
        self._sums = torch.zeros(len(_LABELLED) + len(_PAIRED) + 2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, student_logits_BK: Tensor, labels_B: Tensor, teacher_logits_BK: Tensor | None) -> None:
        """Count a batch: logits of any float dtype [B, K], labels int64 [B] with -1 for none."""
        if (teacher_logits_BK is not None) != self._with_teacher:
            raise ValueError(f"this score was made for with_teacher={self._with_teacher}")
        # ignore_index leaves a zero for an example without a label, and -1 never equals a prediction.
        xent_B = functional.cross_entropy(student_logits_BK.float(), labels_B, reduction="none", ignore_index=-1)
        rows = [student_logits_BK.argmax(-1) == labels_B, xent_B]
        if teacher_logits_BK is None:
            rows += [torch.zeros_like(xent_B)] * (1 + len(_PAIRED))
        else:
            rows += [
                teacher_logits_BK.argmax(-1) == labels_B,
                agreement(student_logits_BK, teacher_logits_BK, k=1),
                agreement(student_logits_BK, teacher_logits_BK, k=5),
                kl_divergence(student_logits_BK, teacher_logits_BK),
            ]
        rows += [torch.ones_like(xent_B), labels_B >= 0]
        self._sums += torch.stack([row.double() for row in rows]).sum(dim=1)

    def result(self, world: World) -> dict[str, float]:
        """Means over all ranks' examples, named eval/...; what was never counted is absent. All ranks call it.

        Keys: eval/student_top1, eval/student_xent (nats), eval/teacher_top1, eval/agreement_top1,
        eval/agreement_top5, eval/kl (nats, teacher to student, temperature 1), eval/examples (a count).
        """
        *sums, examples, labelled = world.all_sum(self._sums).tolist()
        result = {"eval/examples": examples}
        for name, total in zip(_LABELLED + _PAIRED, sums, strict=True):
            count = labelled if name in _LABELLED else examples
            about_teacher = name in _PAIRED or name == "teacher_top1"
            if count and (self._with_teacher or not about_teacher):
                result[f"eval/{name}"] = total / count
        return result


class Evaluation:
    """One fixed view of every picture of the evaluation split, through student and teacher."""

    def __init__(
        self,
        config: Config,
        world: World,
        index: Index,
        renderer: Renderer,
        teachers: Sequence[LiveTeacher],
        card: ModelCard,
    ) -> None:
        """Name the parts.

        Args:
            config: split, crop and batch size of the evaluation; precision of the student; kind of ensemble.
            world: who shares the work.
            index: the data set.
            renderer: of the student's views; not the one that training uses.
            teachers: whom the student is compared with; none when it learns from labels.
            card: how the student's input is normalised.
        """
        self._config = config
        self._world = world
        self._index = index
        self._with_teacher = bool(teachers)
        self._source = Source(index, renderer, teachers)
        self._without = Source(index, renderer, [])
        self._kept: list[Tensor] = []
        self._card = card

    @torch.no_grad()
    def run(self, student: nn.Module) -> dict[str, float]:
        """Evaluate now; the same numbers on all ranks, which must all call it. The student goes on in train mode.

        All ranks look through rank 0's batch statistics, which are those of the checkpoint.

        Raises:
            TeacherError: a teacher does not answer one of the ranks; on all of them, so that none waits for another.
        """
        device = self._world.device
        self._world.broadcast_(student.buffers())
        score = Score(device, self._with_teacher)
        student.eval()
        gone: TeacherError | None = None
        try:
            self._count(score, student)
        except TeacherError as error:
            gone = error
        student.train()
        if someones := self._world.any_error(gone):
            raise gone or someones
        return score.result(self._world)

    def _count(self, score: Score, student: nn.Module) -> None:
        device = self._world.device
        for batch in run_ahead(self._without if self._kept else self._source, self._lessons(), self._config.prefetch):
            partner = torch.from_numpy(batch.rows.partner).long()
            lam = torch.from_numpy(batch.rows.lam)
            images = mix(batch.pixels.to(device), partner, lam, self._card.mean, self._card.std)
            precision = self._config.precision
            with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
                student_logits = student(images).float()
            labels = torch.from_numpy(self._index.label[batch.rows.sample]).long().to(device)
            score.update(student_logits, labels, self._teacher_logits(batch) if self._with_teacher else None)

    def _teacher_logits(self, batch: Batch) -> Tensor:
        """A frozen teacher always says the same of a fixed view: it is asked once in a run, and its words are kept."""
        if batch.targets:
            answers_MRK = torch.stack([torch.from_numpy(target.result()) for target in batch.targets])
            self._kept.append(one_teacher(answers_MRK, self._config.teacher.ensemble))
        return self._kept[batch.lesson.step].to(self._world.device)

    def _lessons(self) -> Iterator[Lesson]:
        config, index = self._config.data, self._index
        law = ViewLaw(crop=config.eval_crop, flip=False, mixup=False, keep=config.eval_keep)
        views = FixedViews(law=law)
        own = shard_of(index.splits[config.evaluate], self._world.rank, self._world.size)
        for number, start in enumerate(range(0, len(own), self._config.eval_batch)):
            rows = views.rows(own[start : start + self._config.eval_batch], index.height, index.width)
            yield Lesson(number, rows, rows)
