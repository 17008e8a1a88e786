"""Replicas that fail, hang, are busy or slow, become others, or lie: a row is answered rightly, or given up by name."""

from __future__ import annotations

import itertools
import logging
import time

import grpc
import numpy as np
import pytest

from conftest import wait_until
from protos.arrays import to_message
from scripted_teacher import NUM_CLASSES, ScriptedTeacher, batch, expected_logits, fleet, serving
from student_trainer.fleet import TeacherRefusedError, TeachersGoneError


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL]
)
def test_a_failed_part_is_asked_again(code):
    teacher = ScriptedTeacher()
    teacher.fail_next = [code] * 3
    with serving(teacher) as address, fleet(address) as teachers:
        rows = batch()
        assert np.array_equal(teachers.ask(rows).result(), expected_logits(rows))
        assert teachers.state().retries == 3


def test_a_teacher_that_dies_and_comes_back_costs_no_row():
    first = ScriptedTeacher(delay_s=0.05)
    with serving(first) as address:
        teachers = fleet(address)
        batches = [batch(step) for step in range(10)]
        answers = [teachers.ask(rows) for rows in batches]
        answers[0].result()
    time.sleep(0.5)  # nobody is there
    with serving(ScriptedTeacher(), address), teachers:
        for rows, answer in zip(batches, answers, strict=True):
            assert np.array_equal(answer.result(), expected_logits(rows))


def test_a_hung_teacher_loses_its_parts_to_another_after_the_deadline():
    hung = ScriptedTeacher(delay_s=3.0)
    with serving(hung) as one, serving(ScriptedTeacher()) as two, fleet(one, two, deadline_s=0.3) as teachers:
        rows = batch()
        assert np.array_equal(teachers.ask(rows).result(), expected_logits(rows))


def test_a_teacher_that_is_another_one_is_refused_with_both_fingerprints(caplog):
    with serving(ScriptedTeacher("mine")) as one, fleet(one) as alone:
        assert alone.description.fingerprint == "mine"
        with serving(ScriptedTeacher("other")) as two:
            teachers = fleet(one, two) if alone else None
            with teachers:
                while len(caplog.records) == 0:
                    time.sleep(0.02)
                first = teachers.description.fingerprint
                rows = batch()
                assert np.array_equal(teachers.ask(rows).result(), expected_logits(rows))
    sentence = caplog.records[0].getMessage()
    assert "refused" in sentence and "mine" in sentence and "other" in sentence
    assert first in ("mine", "other")


def test_a_teacher_restarted_with_other_weights_is_not_believed():
    with serving(ScriptedTeacher("mine")) as address:
        teachers = fleet(address, patience_s=1.5)
        teachers.ask(batch()).result()
    with teachers, serving(ScriptedTeacher("changed"), address):
        with pytest.raises(TeachersGoneError, match=r"its fingerprint is changed.*this run's teacher is mine"):
            teachers.ask(batch()).result()


def test_nobody_there_ends_after_the_patience_with_what_each_said():
    with pytest.raises(TeachersGoneError, match=r"(?s)no teacher has answered for.*127.0.0.1:1: UNAVAILABLE"):
        fleet("127.0.0.1:1", patience_s=0.6)


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE])
def test_a_request_that_is_wrong_is_not_asked_again(code):
    teacher = ScriptedTeacher()
    teacher.fail_next = [code]
    with serving(teacher) as address, fleet(address) as teachers:
        with pytest.raises(TeacherRefusedError, match=f"{code.name}: told to fail"):
            teachers.ask(batch()).result()


def test_a_part_that_breaks_every_teacher_is_given_up_by_name():
    teacher = ScriptedTeacher()
    teacher.fail_next = [grpc.StatusCode.INTERNAL] * 100
    with serving(teacher) as address, fleet(address) as teachers:
        with pytest.raises(TeacherRefusedError, match="INTERNAL"):
            teachers.ask(batch(num_rows=4)).result()


def filled(reply, number):
    return to_message(np.full((reply.logits.shape[0], NUM_CLASSES), number, np.float32))


SPOILS = {
    "another request's id": lambda reply: setattr(reply, "request_id", "x"),
    "another fingerprint": lambda reply: setattr(reply, "fingerprint", "x"),
    "a row too few": lambda reply: reply.logits.CopyFrom(to_message(np.zeros((1, NUM_CLASSES), np.float32))),
    "no number": lambda reply: reply.logits.CopyFrom(filled(reply, np.nan)),
    "infinity": lambda reply: reply.logits.CopyFrom(filled(reply, np.inf)),
    "a class too many": lambda reply: reply.logits.CopyFrom(to_message(np.zeros((16, 4), np.float32))),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_wrong_answer_is_never_taken(name):
    liar = ScriptedTeacher()
    liar.spoil = SPOILS[name]
    with serving(liar) as one, fleet(one, patience_s=1.0) as teachers:
        with pytest.raises(TeachersGoneError, match="a wrong answer"):
            teachers.ask(batch(num_rows=16)).result()


def test_a_dead_teacher_among_the_addresses_only_costs_a_warning(caplog):
    with serving(ScriptedTeacher()) as address, fleet("127.0.0.1:1", address) as teachers:
        rows = batch()
        assert np.array_equal(teachers.ask(rows).result(), expected_logits(rows))
        deadline = time.monotonic() + 20
        while not any("127.0.0.1:1" in record.getMessage() for record in caplog.records):
            assert time.monotonic() < deadline, "nobody said that a teacher is dead"
            time.sleep(0.02)


def test_patience_counts_from_the_question_and_not_from_the_last_answer():
    """A run of fixed targets asks nothing for hours; then a slow answer is no reason to give up."""
    with serving(ScriptedTeacher(delay_s=2.5)) as address, fleet(address, patience_s=4) as teachers:
        teachers._dispatcher._last_answer -= 3600
        assert len(teachers.ask(batch(num_rows=5)).result()) == 5


def test_a_replica_that_lies_is_left_alone_and_spoken_of_once(caplog):
    liar = ScriptedTeacher()
    liar.spoil = SPOILS["no number"]
    with serving(liar) as one, serving(ScriptedTeacher(delay_s=0.01)) as two, fleet(one, two) as teachers:
        for step in range(40):
            assert np.array_equal(teachers.ask(batch(step)).result(), expected_logits(batch(step)))
            time.sleep(0.02)
        (state,) = [one for one in teachers.state().replicas if one.rows == 0]
    assert "not finite" in state.words
    said = [record.getMessage() for record in caplog.records if "wrong answer" in record.getMessage()]
    assert len(said) == 1 and "(request " in said[0]
    rests = np.diff(np.sort([0.0, *liar.calls]))
    assert len(liar.calls) <= 8 and rests[-1] > rests[2], "longer each time in a row"


def test_rows_that_no_teacher_can_answer_are_given_up_and_not_asked_for_ever():
    one, two = ScriptedTeacher(), ScriptedTeacher()
    one.spoil = two.spoil = SPOILS["no number"]
    with serving(one) as here, serving(two) as there, fleet(here, there) as teachers:
        with pytest.raises(TeacherRefusedError, match=r"no teacher can answer.*not finite.*\(request "):
            teachers.ask(batch(num_rows=16)).result()
    assert len(one.calls) + len(two.calls) == 5


def test_a_busy_replica_is_asked_again_when_it_says_and_only_then():
    busy = ScriptedTeacher()
    busy.push_back_ms = 700
    busy.fail_next = [grpc.StatusCode.RESOURCE_EXHAUSTED]
    with serving(busy) as address, fleet(address, window=1) as teachers:
        teachers.ask(batch(num_rows=16)).result()
    first, second = busy.calls
    assert second - first > 0.69


def test_a_straggler_is_hedged_where_asked_for_and_every_row_is_taken_once():
    slow, fast = ScriptedTeacher(), ScriptedTeacher(delay_s=0.02)
    with serving(slow) as one, serving(fast) as two, fleet(one, two, hedge=4) as teachers:
        for step in range(10):
            teachers.ask(batch(step)).result()
        slow.delay_s = 3.0
        began = time.monotonic()
        for step in range(10, 14):
            assert np.array_equal(teachers.ask(batch(step)).result(), expected_logits(batch(step)))
        assert time.monotonic() - began < 2.5
        state = teachers.state()
        assert state.hedges > 0
        assert state.rows == 14 * 50


def test_without_hedging_nothing_is_sent_twice():
    slow, fast = ScriptedTeacher(delay_s=0.3), ScriptedTeacher()
    with serving(slow) as one, serving(fast) as two, fleet(one, two) as teachers:
        for step in range(12):
            teachers.ask(batch(step)).result()
        assert teachers.state().hedges == teachers.state().retries == 0
    assert slow.answered_rows + fast.answered_rows == 12 * 50


def test_a_run_that_waits_says_so_and_what_each_replica_said(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("student_trainer.fleet.dispatch._SAY_AFTER_S", 0.3)
    with serving(ScriptedTeacher()) as address:
        teachers = fleet(address)
        teachers.ask(batch()).result()
    with teachers:
        answer = teachers.ask(batch())
        wait_until(lambda: any("waiting up to 20 s" in record.getMessage() for record in caplog.records))
        with serving(ScriptedTeacher(), address):
            answer.result()
    said = [record.getMessage() for record in caplog.records]
    (waiting,) = [sentence for sentence in said if "waiting up to 20 s (--teacher.patience-s)" in sentence]
    assert f"{address}: UNAVAILABLE" in waiting
    assert any("the run goes on" in sentence for sentence in said)


def test_a_run_that_was_told_to_stop_does_not_wait_for_its_patience():
    with serving(ScriptedTeacher()) as address:
        teachers = fleet(address, patience_s=600)
    with teachers:
        answer = teachers.ask(batch())
        began = time.monotonic()
        teachers.hurry(0.5)
        with pytest.raises(TeachersGoneError):
            answer.result()
        assert time.monotonic() - began < 5


def test_a_part_is_not_sent_back_to_where_it_failed_while_another_serves():
    broken, fine = ScriptedTeacher(), ScriptedTeacher(delay_s=0.4)
    with serving(broken) as one, serving(fine) as two, fleet(one, two, window=1, rows_per_request=4) as teachers:
        wait_until(lambda: sum(replica.serves for replica in teachers.state().replicas) == 2)
        broken.fail_next = [grpc.StatusCode.INTERNAL] * 100
        for step in itertools.count():
            answer = teachers.ask(batch(step, num_rows=12))
            assert np.array_equal(answer.result(), expected_logits(batch(step, num_rows=12)))
            if len(broken.calls) >= 3:
                break
    assert fine.answered_rows == 12 * (step + 1)
