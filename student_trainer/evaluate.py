"""How good the student is, and how close to its teacher: sums over examples, each counted once.

Which examples a rank looks at (`shard_of`) and the accumulation (`Score`) live here. Rendering the
evaluation views and asking the teacher is the loop's work; the distances themselves are loss.py's.

Rejected: padding every rank to equally many examples, as DistributedSampler does. It counts some examples
twice, and the result then depends on the number of ranks.

Shape legend: B examples of a batch, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from student_trainer.loss import agreement, kl_divergence
from student_trainer.world import World

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
