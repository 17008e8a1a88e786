import numpy as np
import pytest
import torch
from torch.nn import functional

from student_trainer.loss import (
    agreement,
    distillation_loss,
    entropy,
    kl_divergence,
    mixup_cross_entropy,
    one_teacher,
)

TEMPERATURES = [1.0, 2.0, 5.0, 10.0]


def logits(rows: int, classes: int, seed: int, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def slow_softmax(row: np.ndarray) -> np.ndarray:
    e = np.exp(row.astype(np.float64) - row.max())
    return e / e.sum()


def slow_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    """The released code's `distance.py` for one temperature, row by row and class by class, in float64."""
    total = 0.0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        p_s, p_t = slow_softmax(s / temperature), slow_softmax(t / temperature)
        total += sum(-a * np.log(b) + a * np.log(max(a, 1e-8)) for a, b in zip(p_t, p_s, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_equals_the_released_codes_formula(temperature):
    student, teacher = logits(6, 40, 0), logits(6, 40, 1)
    ours = distillation_loss(student, teacher[None], temperature).item()
    assert ours == pytest.approx(slow_loss(student, teacher, temperature), rel=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_equals_torchs_batchmean_kl_times_temperature_squared(temperature):
    student, teacher = logits(8, 100, 2), logits(8, 100, 3)
    log_s, p_t = functional.log_softmax(student / temperature, -1), functional.softmax(teacher / temperature, -1)
    expected = temperature**2 * functional.kl_div(log_s, p_t, reduction="batchmean")
    torch.testing.assert_close(distillation_loss(student, teacher[None], temperature), expected)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_is_temperature_times_the_difference_of_probabilities_over_rows(temperature):
    student, teacher = logits(5, 30, 4).requires_grad_(), logits(5, 30, 5)
    distillation_loss(student, teacher[None], temperature).backward()
    difference = functional.softmax(student / temperature, -1) - functional.softmax(teacher / temperature, -1)
    torch.testing.assert_close(student.grad, temperature * difference.detach() / len(student))


def test_equal_logits_give_zero_loss_and_zero_gradient():
    student = logits(4, 1000, 8).requires_grad_()
    loss = distillation_loss(student, student.detach()[None] + 3.0, 1.0)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert student.grad.abs().max() < 1e-6


def test_loss_is_summed_over_classes_not_averaged():
    student, teacher = logits(4, 10, 9), logits(4, 10, 10)
    # Classes that neither network believes in must not dilute the loss.
    nothing = torch.full((4, 990), -100.0)
    wide = distillation_loss(torch.cat([student, nothing], 1), torch.cat([teacher, nothing], 1)[None], 1.0)
    torch.testing.assert_close(wide, distillation_loss(student, teacher[None], 1.0))


def test_mean_of_equal_sized_ranks_is_the_mean_of_the_global_batch():
    student, teacher = logits(12, 20, 11), logits(12, 20, 12)
    ranks = [distillation_loss(student[i : i + 3], teacher[None, i : i + 3], 2.0) for i in range(0, 12, 3)]
    torch.testing.assert_close(torch.stack(ranks).mean(), distillation_loss(student, teacher[None], 2.0))


def test_direction_is_teacher_to_student():
    sure, unsure = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl_divergence(unsure, sure).item() == pytest.approx(np.log(2), rel=1e-5)
    assert kl_divergence(sure, unsure).item() > 9


def test_half_precision_logits_are_computed_in_float32():
    student, teacher = logits(4, 50, 13).half(), logits(4, 50, 14).half()
    loss = distillation_loss(student, teacher[None], 10.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distillation_loss(student.float(), teacher[None].float(), 10.0))


def test_huge_logits_stay_finite():
    student, teacher = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    assert distillation_loss(student, teacher[None], 1.0).isfinite()


def test_mixed_labels_equal_cross_entropy_with_mixed_one_hots():
    rows, views = 6, 7  # one view is there only as a partner
    partner = torch.tensor([6, 0, 1, 2, 3, 4])
    labels = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    lam = torch.linspace(0, 1, rows)
    student = logits(rows, 10, 15)
    one_hot = functional.one_hot(labels, 10).float()
    assert len(one_hot) == views
    mixed = lam[:, None] * one_hot[:rows] + (1 - lam[:, None]) * one_hot[partner]
    expected = functional.cross_entropy(student, mixed)
    torch.testing.assert_close(mixup_cross_entropy(student, labels, partner, lam), expected)


def test_lambda_one_is_plain_cross_entropy():
    student, labels = logits(5, 10, 16), torch.tensor([0, 1, 2, 3, 4])
    ours = mixup_cross_entropy(student, labels, torch.arange(5), torch.ones(5))
    torch.testing.assert_close(ours, functional.cross_entropy(student, labels))


def test_entropy_runs_from_zero_to_log_of_classes():
    rows = torch.stack([torch.zeros(8), 100.0 * torch.eye(8)[3], logits(1, 8, 17)[0]])
    p = slow_softmax(rows[2].numpy())
    expected = torch.tensor([np.log(8), 0.0, -(p * np.log(p)).sum()], dtype=torch.float32)
    torch.testing.assert_close(entropy(rows), expected)


@pytest.mark.parametrize("k", [1, 5, 50])
def test_agreement_asks_whether_the_teachers_first_is_among_the_students_k(k):
    student, teacher = logits(200, 20, 18), logits(200, 20, 19)
    expected = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        first = max(range(20), key=lambda c: t[c])
        expected.append(float(sum(other > s[first] for other in s) < k))
    assert agreement(student, teacher, k).tolist() == expected


def slow_ensemble(student: np.ndarray, teachers: np.ndarray, temperature: float, ensemble: str) -> float:
    """Row by row, teacher by teacher, in float64."""
    total = 0.0
    for row, s in enumerate(student.astype(np.float64)):
        answers = [teacher[row].astype(np.float64) for teacher in teachers]
        if ensemble == "logits":
            targets = [sum(answers) / len(answers)]
        elif ensemble == "probabilities":
            targets = [np.log(sum(slow_softmax(answer) for answer in answers) / len(answers))]
        else:
            targets = answers
        p_s = slow_softmax(s / temperature)
        for target in targets:
            p_t = slow_softmax(target / temperature)
            total += (p_t * (np.log(p_t) - np.log(p_s))).sum()
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("ensemble", ["logits", "probabilities", "sum_kl"])
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_an_ensembles_loss_equals_a_slow_direct_computation(ensemble, temperature):
    student = logits(6, 40, 20)
    teachers = torch.stack([logits(6, 40, seed) for seed in (21, 22, 23)])
    ours = distillation_loss(student, teachers, temperature, ensemble).item()
    assert ours == pytest.approx(slow_ensemble(student.numpy(), teachers.numpy(), temperature, ensemble), rel=1e-5)


def test_summed_kls_pull_three_times_as_hard_as_the_mean_of_probabilities():
    student = logits(5, 30, 24).requires_grad_()
    teachers = torch.stack([logits(5, 30, seed) for seed in (25, 26, 27)])
    (summed,) = torch.autograd.grad(distillation_loss(student, teachers, 1.0, "sum_kl"), student)
    (averaged,) = torch.autograd.grad(distillation_loss(student, teachers, 1.0, "probabilities"), student)
    torch.testing.assert_close(summed, 3 * averaged)


@pytest.mark.parametrize("ensemble", ["logits", "probabilities", "sum_kl"])
def test_an_ensemble_of_one_is_that_teacher_to_the_last_bit(ensemble):
    teacher = logits(4, 9, 28)
    assert torch.equal(one_teacher(teacher[None], ensemble), teacher)
