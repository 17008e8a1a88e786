"""The law of the window, on servers that are a few lines of arithmetic: a queue in time, with a line in front."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from student_trainer.fleet.window import FIRST, LARGEST, Window


class Simulated:
    """A server that answers `at_once` requests together in `work_s`, `line_s` away."""

    def __init__(self, work_s: float, line_s: float = 0.0, jitter: float = 0.0, at_once: int = 1) -> None:
        self.work_s, self.line_s, self.jitter, self.at_once = work_s, line_s, jitter, at_once
        self.window = Window()
        self.rng = np.random.default_rng(5)
        self.free = 0.0
        self.answers: list[tuple[float, float, int]] = []
        self.answered = 0
        self.now = 1.0

    def run(self, seconds: float) -> float:
        """Always something to ask; the share of what the server could have answered."""
        end, before = self.now + seconds, self.answered
        while self.now < end:
            while len(self.answers) < self.window.size:
                work_s = self.work_s / self.at_once * (1 + self.jitter * self.rng.uniform())
                self.free = max(self.free, self.now + self.line_s / 2) + work_s
                waits_s = work_s * (self.at_once - 1)  # for those that are answered with it
                heapq.heappush(self.answers, (self.free + waits_s + self.line_s / 2, self.now, len(self.answers) + 1))
            self.now, sent, num_under_way = heapq.heappop(self.answers)
            self.window.answered(self.now - sent, 16, num_under_way, self.now)
            self.answered += 1
        could = seconds / (self.work_s / self.at_once * (1 + self.jitter / 2))
        return (self.answered - before) / could


@pytest.mark.parametrize("work_s", [0.002, 0.05, 1.0])
def test_a_server_nearby_is_kept_busy_by_few_requests_whatever_its_speed(work_s):
    server = Simulated(work_s)
    server.run(50 * work_s)
    assert server.run(1000 * work_s) > 0.98
    assert FIRST <= server.window.size <= 4


def test_a_server_far_away_gets_as_many_as_fill_the_line():
    server = Simulated(work_s=0.02, line_s=0.1)  # 6 fill it
    server.run(10)
    assert server.run(120) > 0.97, "also while the least latency is measured anew"
    assert 6 <= server.window.size <= 10


def test_a_line_that_is_longer_than_any_window_gets_the_largest():
    server = Simulated(work_s=0.001, line_s=0.5)
    server.run(60)
    assert server.window.size == LARGEST


def test_a_server_whose_times_vary_is_kept_busy():
    server = Simulated(work_s=0.02, jitter=2.0)
    server.run(10)
    assert server.run(100) > 0.97


def test_a_server_that_answers_several_together_is_kept_busy():
    server = Simulated(work_s=0.04, at_once=2)
    server.run(10)
    assert server.run(100) > 0.97


def test_a_server_that_others_use_too_is_not_crowded_for_ever():
    """Its latency grows tenfold and stays: the least is forgotten, and the window does not run away."""
    server = Simulated(work_s=0.02)
    server.run(40)
    server.work_s = 0.2
    server.run(300)
    assert FIRST <= server.window.size <= 4


def test_small_requests_say_nothing_about_usual_ones():
    window = Window()
    for number in range(20):
        window.answered(0.1, 64, 1, float(number))
    size = window.size
    for number in range(20):
        window.answered(0.001, 2, 1, 20.0 + number)
        window.answered(0.1, 64, window.size, 20.0 + number)
    assert window.size >= size, "with 1 ms for the least latency it would have shrunk to 3"


def test_a_refusal_halves_a_window_and_a_fixed_one_never_changes():
    window = Window(first=8)
    window.refused()
    assert window.size == 4
    for _ in range(5):
        window.refused()
    assert window.size == 1
    fixed = Window(fixed=5)
    fixed.refused()
    for number in range(200):
        fixed.answered(0.1 * number, 16, 5, float(number))
    assert fixed.size == 5
