"""Rows 10, 11 and 12: that they measure what they say, on work small enough for a test."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import growth, logit_store, memory
from benchmarks.curve import FLAT, LINEAR, Curve, draw, short

pytestmark = pytest.mark.suite  # they set what all of torch shares, as a benchmark may


def a_curve(values, **changes) -> Curve:
    sizes = [10.0**i for i in range(len(values))]
    return Curve(
        **({"name": "it", "by": "pictures", "unit": "ms", "sizes": sizes, "values": values, "goal": FLAT} | changes)
    )


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_slope_is_the_power_with_which_a_cost_grows(power):
    curve = a_curve([3.0 * 10 ** (power * i) for i in range(6)])
    assert curve.slope == pytest.approx(power, abs=1e-9)
    assert curve.figure().met is (power <= 0.1)
    assert a_curve(curve.values, goal=LINEAR).figure().met is (power <= 1.1)


def test_points_before_the_first_that_is_fitted_do_not_count():
    assert a_curve([1.0, 50.0, 50.0, 50.0], fitted=1).slope == pytest.approx(0, abs=1e-9)


def test_a_curve_says_its_last_point_and_all_of_them_in_its_note():
    one = a_curve([1.0, 2.0, 4.0], note="by hand").figure()
    assert (one.row, one.value, one.unit) == ("12", 4.0, "ms")
    assert one.note == "judged: slope in log-log; 1: 1, 10: 2, 100: 4; by hand"
    assert [short(number) for number in (7, 1000, 21_843, 1e6, 1e9)] == ["7", "1k", "21.8k", "1M", "1G"]


def test_a_billion_pictures_take_no_more_memory_to_draw_from_than_a_thousand():
    _, at_most = growth.by_pictures(1)
    assert at_most.sizes[-1] == 10**9
    assert max(at_most.values) < 1.05 * min(at_most.values) < 10


def test_the_real_service_answers_for_any_number_of_classes_and_its_reply_is_two_bytes_a_logit():
    request, reply, loss = growth.by_classes(1)
    assert [round(1000 * kb) for kb in reply.values] == pytest.approx(2 * 64 * np.array(reply.sizes), abs=130)
    assert reply.slope < 1.01
    assert min(*request.values, *loss.values) > 0


def test_a_fleet_of_two_delivers_more_than_one():
    curve = growth.by_replicas((1, 2), 1.5)
    assert curve.values[1] > 1.3 * curve.values[0]
    assert curve.alternative == 80


def test_ranks_really_meet():
    curve = growth.by_ranks((1, 2), 3, num_gradients=1000)
    assert len(curve.values) == 2 and min(curve.values) > 0


def test_the_curves_are_drawn(tmp_path):
    draw([a_curve([1.0, 2.0, 4.0]), a_curve([5.0, 5.0])], tmp_path / "deeper" / "growth.png")
    assert (tmp_path / "deeper" / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("mib", "met"),
    [
        ([90.0] * 20 + [100.0] * 60 + [104.9] * 20, True),
        ([90.0] * 20 + [100.0] * 60 + [105.1] * 20, False),
        ([900.0] * 20 + [1000.0] * 60 + [1029.0] * 20, True),
        ([900.0] * 20 + [1000.0] * 60 + [1031.0] * 20, False),
        ([50.0] * 20 + [100.0] * 80, True),
        ([100.0] * 80 + [80.0] * 20, True),
    ],
)
def test_flat_is_within_a_twentieth_and_within_30_mib_after_the_first_fifth(mib, met):
    one = memory.judge("loader", mib, 60, 100.0)
    assert one.met is met
    assert one.value == pytest.approx(mib[-1] / mib[30])


def test_memory_is_watched_of_a_real_server_and_a_real_loader(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_EVERY_S", 0.2)
    mib, rows_per_s = memory.watch(tmp_path, tiny_data, 3.0)
    assert set(mib) == {"server", "loader"}
    assert min(map(len, mib.values())) >= 5
    assert min(map(min, mib.values())) > 100, "torch alone is more"
    assert rows_per_s > 0


def test_the_store_is_filled_read_compared_and_judged():
    figures = list(logit_store.measure(quick=True))
    assert [one.row for one in figures] == ["11"] * 5
    assert all(one.value and one.value > 0 and one.alternative for one in figures)
    (judged,) = [one for one in figures if one.goal]
    assert judged.name.startswith("logit store, Redis: read") and judged.judged == judged.value
    in_hashes = figures[-1]
    assert in_hashes.floor < in_hashes.value < in_hashes.alternative


def test_a_store_that_gives_back_other_logits_is_no_figure():
    table = np.ones((logit_store._DIFFERENT, logit_store._NUM_CLASSES), np.float32)

    class Forgetful:
        def get(self, samples):
            return np.zeros((len(samples), logit_store._NUM_CLASSES), np.float32), np.ones(len(samples), bool)

    with pytest.raises(RuntimeError, match="a sieve gave back other logits"):
        logit_store.read({"a sieve": Forgetful()}, [np.arange(512)], table, 1)
