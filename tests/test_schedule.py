import math

import numpy as np
import pytest

from student_trainer.schedule import Schedule, num_steps, warmup_of

optax = pytest.importorskip("optax")

# The paper's runs: pictures used for training, global batch, epochs, steps.
TABLE = [
    (1020, 512, 1000, 1_992),
    (1020, 512, 10_000, 19_922),
    (1020, 512, 100_000, 199_219),
    (1020, 512, 1_000_000, 1_992_188),
    (3312, 512, 300, 1_941),
    (3312, 512, 1000, 6_469),
    (3312, 512, 3000, 19_406),
    (3312, 512, 10_000, 64_688),
    (3312, 512, 30_000, 194_062),
    (68_175, 512, 100, 13_315),
    (68_175, 512, 1000, 133_154),
    (68_175, 512, 3000, 399_463),
    (76_128, 512, 100, 14_869),
    (76_128, 512, 1000, 148_688),
    (76_128, 512, 3000, 446_062),
    (1_255_544, 4096, 300, 91_959),
    (1_255_544, 4096, 1200, 367_835),
    (1_255_544, 4096, 4800, 1_471_341),
    (1_255_544, 4096, 9600, 2_942_681),
]


@pytest.mark.parametrize(("num_train", "batch", "epochs", "steps"), TABLE)
def test_epochs_become_the_papers_steps(num_train, batch, epochs, steps):
    assert num_steps(epochs, num_train, batch) == steps


def test_a_run_has_at_least_one_step():
    assert num_steps(0.001, 10, 512) == 1


def test_multiplier_equals_a_scalar_transcription_at_every_step():
    steps, warmup = 1941, 1500
    schedule = Schedule(num_steps=steps, warmup_steps=warmup)
    for t in range(steps + 10):
        x = (t - warmup) / (steps - warmup)
        x = 0 if x < 0 else 1 if x > 1 else x
        expected = (t / warmup if t < warmup else 1) * 0.5 * (1 + math.cos(math.pi * x))
        assert schedule(t) == pytest.approx(expected, abs=1e-12)


def test_multiplier_equals_optax_warm_up_joined_with_its_cosine():
    steps, warmup = 400, 150
    schedule = Schedule(num_steps=steps, warmup_steps=warmup)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps)
    at = np.arange(0, steps, 7)
    np.testing.assert_allclose([schedule(int(t)) for t in at], np.asarray(theirs(at)), atol=1e-6)


def test_first_update_is_zero_the_peak_follows_the_warm_up_and_the_end_is_zero():
    schedule = Schedule(num_steps=100, warmup_steps=10)
    assert schedule(0) == 0
    assert schedule(10) == 1 == max(map(schedule, range(100)))
    assert 0 < schedule(99) < 1e-3
    assert schedule(100) == schedule(10_000) == 0


def test_without_warm_up_the_first_update_is_a_full_one():
    assert Schedule(num_steps=10, warmup_steps=0)(0) == 1


@pytest.mark.parametrize("warmup", [-1, 100, 1500])
def test_a_warm_up_that_does_not_fit_is_refused_with_both_numbers(warmup):
    with pytest.raises(ValueError, match=f"warmup_steps is {warmup}, but the run has 100 steps"):
        Schedule(num_steps=100, warmup_steps=warmup)


def test_a_warm_up_is_steps_or_a_share_of_the_run_that_no_run_is_too_short_for():
    assert [warmup_of(given, 2000) for given in (0, 1, 150, 0.05)] == [0, 1, 150, 100]
    for steps in range(1, 200):
        Schedule(num_steps=steps, warmup_steps=warmup_of(0.05, steps))


def test_the_quadratic_decay_of_appendix_d_follows_a_linear_warm_up():
    schedule = Schedule(num_steps=10_000, warmup_steps=1800, decay="quadratic")
    assert schedule(900) == pytest.approx(0.5)
    for step in range(1800, 10_000, 97):
        assert schedule(step) == pytest.approx(((10_000 - step) / 8200) ** 2)
    assert schedule(10_000) == 0


def test_stairs_divide_by_ten_at_30_60_and_90_percent():
    schedule = Schedule(num_steps=500, warmup_steps=50, decay="staircase")
    expected = {0: 0.0, 25: 0.5, 50: 1.0, 150: 1.0, 151: 0.1, 300: 0.1, 301: 0.01, 450: 0.01, 451: 0.001, 499: 0.001}
    assert {step: schedule(step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("supports", "stairs"), [
    ([100, 200, 300, 400, 500], (0.4, 0.6, 0.8)),
    ([500, 3000, 6000, 9000, 10_000], (0.3, 0.6, 0.9)),
    ([500, 6000, 12_000, 18_000, 20_000], (0.3, 0.6, 0.9)),
])  # fmt: skip
def test_stairs_are_those_of_bit_hyperrule_at_every_step(supports, stairs):
    warmup, *borders, steps = supports
    schedule = Schedule(num_steps=steps, warmup_steps=warmup, decay="staircase", stairs=stairs)
    for step in range(steps):
        passed = sum(border < step for border in borders)
        expected = step / warmup if step < warmup else 10.0**-passed
        assert schedule(step) == pytest.approx(expected), step
