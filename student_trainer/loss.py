"""What the student is pulled towards, and the few numbers that say how close it is.

Pure functions of logits: nothing here knows of ranks, views or optimizers.
Everything is computed in float32 whatever the logits' dtype: at temperature 1 a teacher's tail carries
probabilities of 1e-6, which half precision flushes.

Rejected: `torch.nn.KLDivLoss()` with its default reduction. It divides by the number of classes too, so
that the same recipe would train 1000 classes ten times more slowly than 100.

Shape legend: M teachers, R rows, V views (V >= R), K classes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Ensemble = Literal["logits", "probabilities", "sum_kl"]


def kl_divergence(student_logits_RK: Tensor, teacher_logits_RK: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of each row, in nats; float32 [R].

    Both distributions are softmax(logits / temperature). The paper's code clips the teacher's probability at
    1e-8 inside its own entropy; that moves the value by less than K * 4e-9, its gradient not at all, and is
    left out, so that equal logits give zero.
    """
    log_student_RK = functional.log_softmax(student_logits_RK.float() / temperature, dim=-1)
    log_teacher_RK = functional.log_softmax(teacher_logits_RK.float() / temperature, dim=-1)
    # One difference, then one sum. Cross-entropy minus entropy would lose the digits at high temperature.
    return (log_teacher_RK.exp() * (log_teacher_RK - log_student_RK)).sum(dim=-1)


def distillation_loss(
    student_logits_RK: Tensor, teacher_logits_MRK: Tensor, temperature: float, ensemble: Ensemble = "logits"
) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T, summed over classes, averaged over rows; scalar float32.

    Paper section 2, equation 1, and `distance.py` of the released code, which has the T^2 that the equation
    does not show: it keeps the gradient's size when T changes. There is no term for the labels.

    Several teachers (section 3.6) give one target, or with "sum_kl" each a loss of its own, added up as in the released
    `distill.py`. That has M times the gradient of "probabilities" at temperature 1, and is no mean of logits.

    The mean is over this rank's rows. DDP averages gradients over ranks, and all ranks hold equally many
    rows, so the gradient is that of the mean over the global batch.
    """
    if ensemble == "sum_kl":
        kl_R = torch.stack(
            [kl_divergence(student_logits_RK, one_RK, temperature) for one_RK in teacher_logits_MRK]
        ).sum(0)
    else:
        kl_R = kl_divergence(student_logits_RK, one_teacher(teacher_logits_MRK, ensemble), temperature)
    return temperature**2 * kl_R.mean()


def one_teacher(teacher_logits_MRK: Tensor, ensemble: Ensemble) -> Tensor:
    """What an ensemble says as one teacher: float32 logits [R, K].

    "logits": their mean (the paper, section 3.6). "probabilities" and "sum_kl": the log of the mean of the softmaxes at
    temperature 1, as the released code evaluates its ensemble.
    """
    logits_MRK = teacher_logits_MRK.float()
    if len(logits_MRK) == 1:
        return logits_MRK[0]
    if ensemble == "logits":
        return logits_MRK.mean(dim=0)
    return functional.log_softmax(logits_MRK, dim=-1).logsumexp(dim=0) - math.log(len(logits_MRK))


def mixup_cross_entropy(logits_RK: Tensor, labels_V: Tensor, partner_R: Tensor, lam_R: Tensor) -> Tensor:
    """Cross-entropy with labels mixed like the pictures (views/view.py), averaged over rows; scalar float32.

    Row r shows lam[r] * view[r] + (1 - lam[r]) * view[partner[r]], and its target mixes those views' labels
    in the same way; lam = 1 is plain cross-entropy. Labels are int64 in [0, K): a picture without a label
    (-1) has no place in supervised training.
    """
    num_rows = len(logits_RK)
    own_R = functional.cross_entropy(logits_RK.float(), labels_V[:num_rows], reduction="none")
    other_R = functional.cross_entropy(logits_RK.float(), labels_V[partner_R], reduction="none")
    return (lam_R * own_R + (1 - lam_R) * other_R).mean()


def entropy(logits_RK: Tensor) -> Tensor:
    """Entropy of each row's softmax at temperature 1, in nats; float32 [R], between 0 and log K."""
    log_p_RK = functional.log_softmax(logits_RK.float(), dim=-1)
    return -(log_p_RK.exp() * log_p_RK).sum(dim=-1)


def agreement(student_logits_RK: Tensor, teacher_logits_RK: Tensor, k: int = 1) -> Tensor:
    """1 where the teacher's first choice is among the student's k first, else 0; float32 [R].

    Not symmetric: the `agree` of the released code's distance evaluator. With fewer than k classes every
    row agrees.
    """
    first_R1 = teacher_logits_RK.argmax(dim=-1, keepdim=True)
    top_Rk = student_logits_RK.topk(min(k, student_logits_RK.shape[-1]), dim=-1).indices
    return torch.any(top_Rk == first_R1, dim=-1).float()
