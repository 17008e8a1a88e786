"""How far ahead of the loop teachers are asked: as far as their latency asks for, in bounds, by reference only."""

import itertools
import time

import numpy as np
import torch

from student_trainer.fleet import Answer
from student_trainer.loader import Lesson, Source, run_ahead
from student_trainer.teachers import LiveTeacher
from tests.conftest import wait_until
from views.draw import Plan, ViewLaw
from views.render import Renderer, Rendering

DEPTH, STEPS, FARTHEST = 2, 60, 16


class Fleet:
    """One that answers when it is told to, or at once."""

    def __init__(self, transport, at_once):
        self.transport, self.at_once = transport, at_once
        self.asked = []

    def ask(self, rows, **_):
        answer = Answer(len(rows), 3, 1, lambda _: None)
        self.asked.append(answer)
        if self.at_once:
            answer.fill(0, np.zeros((len(rows), 3), np.float16), None)
        return answer


def batches(index, fleet, steps=STEPS):
    plan = Plan(seed=0, batch_size=4, law=ViewLaw(), samples=range(16), height=index.height, width=index.width)
    lessons = (Lesson(step, rows, rows) for step in range(steps) for rows in [plan.rows(step, 0, 4)])
    source = Source(index, Renderer(Rendering(size=16), 8, None, 1), [LiveTeacher(fleet, None)])
    return run_ahead(source, lessons, DEPTH)


def farthest_ahead(index, fleet):
    """Batches asked for beyond those that the loop has, when the loader has nothing more to do; the most there were."""
    most = 0
    for taken, _ in enumerate(batches(index, fleet), 1):
        settled(fleet)
        most = max(most, len(fleet.asked) - taken)
    return most


def settled(fleet):
    before = -1
    while before != len(fleet.asked):
        before = len(fleet.asked)
        time.sleep(0.02)


def test_teachers_that_answer_in_time_are_asked_no_farther_ahead_than_pixels_are_made(index):
    # Ready batches, and one that waits for room.
    assert farthest_ahead(index, Fleet("reference", at_once=True)) <= DEPTH + 1


def test_teachers_that_answer_late_are_asked_farther_ahead_up_to_a_bound(index):
    assert farthest_ahead(index, Fleet("reference", at_once=False)) == DEPTH + FARTHEST


def test_pictures_are_never_held_farther_ahead(index):
    assert farthest_ahead(index, Fleet("encoded", at_once=False)) <= DEPTH + 1


def test_batches_are_the_same_however_late_the_answers(index):
    pairs = itertools.zip_longest(
        batches(index, Fleet("reference", at_once=True)), batches(index, Fleet("reference", at_once=False))
    )
    for number, (soon, late) in enumerate(pairs):
        assert soon.lesson.step == late.lesson.step == number
        assert torch.equal(soon.pixels, late.pixels)
    assert number == STEPS - 1


def test_leaving_the_loop_early_asks_nothing_more(index):
    fleet = Fleet("reference", at_once=False)
    loop = batches(index, fleet)
    for _ in range(5):
        next(loop)
    wait_until(lambda: len(fleet.asked) > 5)
    loop.close()
    asked = len(fleet.asked)
    time.sleep(0.1)
    assert len(fleet.asked) == asked < STEPS
