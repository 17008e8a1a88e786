from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from student_trainer.evaluate import Score, shard_of
from student_trainer.world import World

EXAMPLES, CLASSES, BATCH = 103, 12, 8


@dataclass(frozen=True, kw_only=True)
class Simulated(World):
    """A world whose other ranks' sums are already known; tests/test_world.py has the real one."""

    others: tuple[Tensor, ...] = ()

    def all_sum(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor, *self.others]).sum(dim=0)


def examples() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(EXAMPLES, CLASSES, generator=generator)
    teacher = student + torch.randn(EXAMPLES, CLASSES, generator=generator)
    labels = torch.randint(-1, CLASSES, (EXAMPLES,), generator=generator)
    labels[::2] = teacher[::2].argmax(1)
    assert (labels == -1).any()
    return student, teacher, labels


def direct(student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, float]:
    """Example by example, in float64."""
    rows: dict[str, list[float]] = {}
    for s, t, label in zip(student.double().numpy(), teacher.double().numpy(), labels.tolist(), strict=True):
        p_s, p_t = np.exp(s) / np.exp(s).sum(), np.exp(t) / np.exp(t).sum()
        rows.setdefault("eval/agreement_top1", []).append(s.argmax() == t.argmax())
        rows.setdefault("eval/agreement_top5", []).append(t.argmax() in np.argsort(-s)[:5])
        rows.setdefault("eval/kl", []).append((p_t * np.log(p_t / p_s)).sum())
        if label >= 0:
            rows.setdefault("eval/student_top1", []).append(s.argmax() == label)
            rows.setdefault("eval/teacher_top1", []).append(t.argmax() == label)
            rows.setdefault("eval/student_xent", []).append(-np.log(p_s[label]))
    return {name: float(np.mean(values)) for name, values in rows.items()} | {"eval/examples": len(student)}


def scores_of(num_ranks: int, with_teacher: bool = True) -> list[Score]:
    student, teacher, labels = examples()
    scores = []
    for rank in range(num_ranks):
        score = Score(torch.device("cpu"), with_teacher)
        mine = shard_of(range(EXAMPLES), rank, num_ranks)
        for start in range(0, len(mine), BATCH):
            batch = torch.from_numpy(mine[start : start + BATCH])
            score.update(student[batch], labels[batch], teacher[batch] if with_teacher else None)
        scores.append(score)
    return scores


def result_of(scores: list[Score]) -> dict[str, float]:
    return scores[0].result(Simulated(others=tuple(score._sums for score in scores[1:])))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_score_equals_direct_computation_on_any_number_of_ranks(num_ranks):
    result, expected = result_of(scores_of(num_ranks)), direct(*examples())
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-5), name


def test_counts_do_not_depend_on_the_number_of_ranks_at_all():
    one, four = result_of(scores_of(1)), result_of(scores_of(4))
    for name in ("student_top1", "teacher_top1", "agreement_top1", "agreement_top5"):
        assert one[f"eval/{name}"] == four[f"eval/{name}"], name


def test_without_a_teacher_only_the_students_own_numbers_are_there():
    result = result_of(scores_of(2, with_teacher=False))
    assert result.keys() == {"eval/examples", "eval/student_top1", "eval/student_xent"}
    assert result["eval/student_top1"] == pytest.approx(direct(*examples())["eval/student_top1"])


def test_without_labels_only_the_agreement_is_there():
    student, teacher, _ = examples()
    score = Score(torch.device("cpu"), with_teacher=True)
    score.update(student, torch.full((EXAMPLES,), -1), teacher)
    assert score.result(World()).keys() == {
        "eval/examples", "eval/agreement_top1", "eval/agreement_top5", "eval/kl",
    }  # fmt: skip


def test_a_rank_without_examples_takes_part():
    scores = [*scores_of(1), Score(torch.device("cpu"), with_teacher=True)]
    assert result_of(scores) == result_of(scores_of(1))


def test_a_missing_teacher_is_an_error_and_not_a_zero():
    student, teacher, labels = examples()
    with pytest.raises(ValueError, match="with_teacher=True"):
        Score(torch.device("cpu"), with_teacher=True).update(student, labels, None)
    with pytest.raises(ValueError, match="with_teacher=False"):
        Score(torch.device("cpu"), with_teacher=False).update(student, labels, teacher)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("samples", [range(0), range(3), range(1000, 1103)])
def test_shards_cover_every_sample_once_and_differ_by_at_most_one(num_ranks, samples):
    shards = [shard_of(samples, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(np.concatenate(shards).tolist()) == list(samples)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert all(shard.dtype == np.int64 for shard in shards)
