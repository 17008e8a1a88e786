"""The fleet, against real gRPC servers whose logits are a known function of the rows they are asked about."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest

from conftest import wait_until
from scripted_teacher import ScriptedTeacher, averaged, batch, expected_logits, fleet, serving
from student_trainer.fleet import TeacherRefusedError
from views.draw import ViewLaw
from views.setting import FixedViews


def test_a_batch_comes_back_whole_and_in_order_however_it_was_cut():
    with serving(ScriptedTeacher()) as address:
        for rows_per_request in (1, 7, 16, 50, 1000):
            with fleet(address, rows_per_request=rows_per_request) as teachers:
                rows = batch()
                assert np.array_equal(teachers.ask(rows).result(), expected_logits(rows))


def test_many_batches_under_way_are_not_confused():
    with serving(ScriptedTeacher(delay_s=0.01)) as one, serving(ScriptedTeacher()) as two, fleet(one, two) as teachers:
        batches = [batch(step) for step in range(12)]
        answers = [teachers.ask(rows) for rows in batches]
        for rows, answer in reversed(list(zip(batches, answers, strict=True))):
            assert np.array_equal(answer.result(), expected_logits(rows))


def test_the_faster_teacher_answers_more_rows():
    slow, fast = ScriptedTeacher(delay_s=0.2), ScriptedTeacher(delay_s=0.02)
    with serving(slow) as one, serving(fast) as two, fleet(one, two) as teachers:
        for answer in [teachers.ask(batch(step)) for step in range(12)]:
            answer.result()
    assert fast.answered_rows > 3 * slow.answered_rows
    assert fast.answered_rows + slow.answered_rows == 12 * 50, "every row once"


def test_requests_are_no_larger_than_the_teacher_takes():
    with serving(ScriptedTeacher(max_rows=5)) as address, fleet(address, rows_per_request=16) as teachers:
        rows = batch()
        assert np.array_equal(teachers.ask(rows).result(), expected_logits(rows))


def test_audits_come_with_the_first_part():
    with serving(ScriptedTeacher()) as address, fleet(address) as teachers:
        answer = teachers.ask(batch(), num_audits=3)
        answer.result()
        assert answer.audit().digests.shape == (3, 16)
        without = teachers.ask(batch())
        without.result()
        assert without.audit() is None


def test_pictures_travel_by_reference_only_where_the_teacher_sees_the_same_data():
    with serving(ScriptedTeacher()) as address, fleet(address) as teachers:
        assert teachers.transport == "reference"
    with serving(ScriptedTeacher(data_digest="e" * 64)) as address:
        with fleet(address) as teachers:
            assert teachers.transport == "encoded"
        with pytest.raises(TeacherRefusedError, match="does not see this data set"):
            fleet(address, transport="reference")


@pytest.mark.parametrize("rows_per_request", [1, 5, 12, 1000])
def test_rows_to_be_averaged_travel_together_however_the_batch_is_cut(rows_per_request):
    sizes = np.full(500, 90, np.int32)
    views = FixedViews(law=ViewLaw(crop="ic", mixup=False), num_views=5)
    rows = views.rows(np.arange(7), sizes, sizes)
    with serving(ScriptedTeacher()) as address, fleet(address, rows_per_request=rows_per_request) as teachers:
        answer = teachers.ask(rows, mean_of=5, average="logits").result()
    np.testing.assert_array_equal(answer, averaged(expected_logits(rows), 5))


def test_more_views_than_a_teacher_takes_in_a_request_are_refused_with_the_cure():
    sizes = np.full(500, 90, np.int32)
    rows = FixedViews(law=ViewLaw(crop="ic", mixup=False), num_views=3000).rows(np.arange(1), sizes, sizes)
    with serving(ScriptedTeacher()) as address, fleet(address) as teachers:
        with pytest.raises(TeacherRefusedError, match="--max-rows 3000 or more"):
            teachers.ask(rows, mean_of=3000)


def test_many_rows_that_must_travel_together_get_as_much_more_time():
    """50 rows where 5 are usual: 10 s until another teacher is asked, and not 1; and patience does not end before."""
    sizes = np.full(500, 90, np.int32)
    rows = FixedViews(law=ViewLaw(crop="ic", mixup=False), num_views=50).rows(np.arange(1), sizes, sizes)
    slow = ScriptedTeacher(delay_s=3.5)
    with serving(slow) as address, fleet(address, rows_per_request=5, deadline_s=1, patience_s=2) as teachers:
        answer = teachers.ask(rows, mean_of=50).result()
        assert teachers.state().retries == 0
    np.testing.assert_array_equal(answer, averaged(expected_logits(rows), 50))


def test_a_fleet_of_64_replicas_shares_the_rows_evenly():
    teachers = [ScriptedTeacher(delay_s=0.02) for _ in range(64)]
    with contextlib.ExitStack() as cleanup:
        addresses = [cleanup.enter_context(serving(one)) for one in teachers]
        together = cleanup.enter_context(fleet(*addresses, rows_per_request=1))
        wait_until(lambda: sum(one.serves for one in together.state().replicas) == 64)
        num_threads = threading.active_count()
        answers = [together.ask(batch(step, num_rows=64)) for step in range(30)]
        assert threading.active_count() - num_threads <= 64 * 9, "one a replica, and the servers' own"
        for step, answer in enumerate(answers):
            assert np.array_equal(answer.result(), expected_logits(batch(step, num_rows=64)))
    counts = [one.answered_rows for one in teachers]
    assert sum(counts) == 30 * 64 and min(counts) > 10, counts


def test_teachers_hear_which_run_asks():
    teacher = ScriptedTeacher()
    with serving(teacher) as address, fleet(address, client="flowers:run:1f") as teachers:
        teachers.ask(batch()).result()
    assert teacher.clients == {"flowers:run:1f"}


def test_a_fleet_says_how_it_does():
    with serving(ScriptedTeacher(delay_s=0.2)) as address, fleet(address, window=3) as teachers:
        answer = teachers.ask(batch(num_rows=96))
        wait_until(lambda: teachers.state().replicas[0].in_flight == 3)
        assert teachers.state().waiting == 3
        answer.result()
        state = teachers.state()
        (replica,) = state.replicas
        assert (replica.target, replica.serves, replica.window, replica.rows) == (address, True, 3, 96)
        assert replica.latency_s >= 0.2 and replica.words == "answered" and state.rows == 96 and not state.waiting


@pytest.fixture
def name(monkeypatch):
    """A name that stands for what the test says."""
    monkeypatch.setattr("student_trainer.fleet.addresses.LOOK_UP_EVERY_S", 0.1)
    known: set[str] = set()

    def look_up(_name, _port):
        if not known:
            raise OSError("no such name")
        return frozenset(known)

    return known, look_up


def test_a_replica_that_a_name_begins_to_stand_for_gets_rows_and_one_it_does_not_gets_no_more(name):
    known, look_up = name
    first, second = ScriptedTeacher(delay_s=0.05), ScriptedTeacher(delay_s=0.05)
    with serving(first) as one, serving(second) as two:
        threading.Timer(0.5, known.add, [one]).start()  # at first the name does not resolve: it is waited for
        with fleet("dns:///teachers:1", look_up=look_up) as teachers:
            answers = [teachers.ask(batch(step)) for step in range(8)]
            known.add(two)
            answers += [teachers.ask(batch(step)) for step in range(8, 40)]
            wait_until(lambda: second.answered_rows)
            known.discard(one)
            wait_until(lambda: len(teachers.state().replicas) == 1)
            until_then = first.answered_rows
            for step, answer in enumerate(answers):
                assert np.array_equal(answer.result(), expected_logits(batch(step)))
            assert first.answered_rows == until_then
            assert teachers.state().rows == 40 * 50
    assert first.answered_rows + second.answered_rows == 40 * 50, "what was under way was finished, and taken once"
