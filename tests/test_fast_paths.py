"""What is done to many numbers at once gives what the slow way gives, number by number."""

import numpy as np
import pytest

from protos.arrays import all_finite
from student_trainer.fleet import Answer
from teacher_server import pictures
from teacher_server.service import travelling
from views.wire import Question

EVERY_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype):
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        for place in (0, 7, 299):
            numbers = np.linspace(-60000, 60000, 300).astype(dtype).reshape(30, 10)
            assert all_finite(numbers)
            numbers.flat[place] = bad
            assert not all_finite(numbers)
    assert all_finite(np.zeros((0, 10), dtype))


def test_every_number_in_half_precision_is_finite_or_not_as_numpy_has_it():
    assert [all_finite(EVERY_HALF[i : i + 1]) for i in range(2**16)] == np.isfinite(EVERY_HALF).tolist()


@pytest.mark.parametrize("num_parts", [1, 4])
def test_every_number_in_half_precision_comes_to_the_student_exactly(num_parts):
    logits = EVERY_HALF[np.isfinite(EVERY_HALF)].reshape(-1, 32)
    answer = Answer(len(logits), 32, num_parts, lambda _: None)
    size = len(logits) // num_parts
    for start in range(0, len(logits), size):
        part = logits[start : start + size].copy()
        part.flags.writeable = False  # as it is when it comes from a message
        answer.fill(start, part, None)
    assert np.array_equal(answer.result().view(np.uint32), logits.astype(np.float32).view(np.uint32))


def test_logits_travel_as_numpy_rounds_them():
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 2**32, (70, 1000), dtype=np.uint32)
    halves = np.sort(EVERY_HALF[np.isfinite(EVERY_HALF)].astype(np.float32))
    edges = np.nextafter(halves, np.float32(np.inf))
    ties = halves[:-1] / 2 + halves[1:] / 2
    for numbers in (bits.view(np.float32), edges[None], ties[None], rng.normal(0, 5, (64, 1000)).astype(np.float32)):
        with np.errstate(over="ignore", invalid="ignore"):
            expected = numbers.astype(np.float16)
        sent = travelling(numbers, np.float16)
        assert np.array_equal(np.isnan(sent), np.isnan(expected))
        known = ~np.isnan(expected)
        assert np.array_equal(sent.view(np.uint16)[known], expected.view(np.uint16)[known])
        assert travelling(numbers, np.float32) is numbers


def a_question(rng, num_views, num_pictures):
    none = np.zeros(0, np.int64)
    return Question(
        transport="reference", partner=none.astype(np.int32), lam=none.astype(np.float32), mean_of=1,
        average="logits", audit=none.astype(np.int32), sample=np.arange(num_pictures), encoded=(),
        image=rng.integers(0, num_pictures, num_views).astype(np.int32),
        box=rng.integers(1, 9, (num_views, 4)).astype(np.int32), flip=np.zeros(num_views, np.bool_), pixels=None,
    )  # fmt: skip


def test_a_request_that_fits_one_portion_is_counted_as_the_walk_over_its_views_counts_it(monkeypatch):
    rng = np.random.default_rng(6)
    for num_views, num_pictures in [(1, 1), (2, 1), (5, 5), (20, 3), (20, 10), (20, 11), (40, 40)] * 5:
        question = a_question(rng, num_views, num_pictures)
        sizes = rng.integers(1, 1000, num_pictures)
        at_once = list(pictures._portions(question, sizes))
        with monkeypatch.context() as slow:
            slow.setattr(pictures, "_in_one_go", lambda *_: None)
            assert at_once == list(pictures._portions(question, sizes)) != []


def test_requests_that_do_not_fit_are_cut_as_before(monkeypatch):
    question = a_question(np.random.default_rng(7), 30, 30)
    sizes = np.full(30, 100)
    monkeypatch.setattr(pictures, "_PIXELS_AT_ONCE", 1000)
    parts = list(pictures._portions(question, sizes))
    assert len(parts) > 3
    assert [part.start for part, _ in parts[1:]] == [part.stop for part, _ in parts[:-1]]
    assert all(pixels <= 1000 for _, pixels in parts)
