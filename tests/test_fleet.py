"""The fleet, against real gRPC servers whose logits are a known function of the rows they are asked about."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from conftest import wait_until
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from protos.arrays import to_message
from student_trainer.fleet import Fleet, TeacherRefusedError, TeachersGoneError
from views.draw import Plan, ViewLaw
from views.setting import FixedViews
from views.view import Rows
from views.wire import read_question

DIGEST = "d" * 64
NUM_CLASSES = 3


def expected_logits(rows: Rows) -> np.ndarray:
    """What the scripted teacher answers: numbers that change with every part of a row."""

    def view(v):
        y, x, h, w = rows.box[v].T.astype(np.float64)
        return rows.sample[v] + y / 7 + x / 11 + h / 13 + w / 17 + rows.flip[v]

    own, partner = view(np.arange(len(rows))), view(rows.partner)
    mixed = rows.lam * own + (1 - rows.lam) * partner
    return np.stack([mixed, -mixed, mixed**2 / 1000], axis=1).astype(np.float32)


class ScriptedTeacher(pb_grpc.TeacherServicer):
    """Answers by formula; fails the way a test asks it to."""

    def __init__(self, fingerprint: str = "f1", delay_s: float = 0.0, data_digest: str = DIGEST, max_rows: int = 1024):
        self.fingerprint = fingerprint
        self.delay_s = delay_s
        self.data_digest = data_digest
        self.max_rows = max_rows
        self.fail_next: list[grpc.StatusCode] = []
        self.push_back_ms = None
        self.spoil = None  # called with each reply
        self.answered_rows = 0
        self.calls: list[float] = []  # when
        self.clients: set[str] = set()
        self.lock = threading.Lock()

    def Describe(self, request, context):
        return pb.Description(
            fingerprint=self.fingerprint, model="scripted", num_classes=NUM_CLASSES, precision="float32",
            rendering=pb.Rendering(size=8, interpolation="linear", version="v"), max_rows=self.max_rows,
            data_sets=[pb.DataSet(name="tiny", digest=self.data_digest)], renders=True,
        )  # fmt: skip

    def Predict(self, request, context):
        with self.lock:
            code = self.fail_next.pop() if self.fail_next else None
            self.calls.append(time.monotonic())
            self.clients.add(request.client)
        if code is not None:
            if self.push_back_ms is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", str(self.push_back_ms)),))
            context.abort(code, "told to fail")
        if request.fingerprint != self.fingerprint:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"I am {self.fingerprint}")
        time.sleep(self.delay_s)
        question = read_question(request, 8)
        rows = Rows(
            sample=question.sample[question.image], box=question.box, flip=question.flip, partner=question.partner,
            lam=question.lam,
        )  # fmt: skip
        reply = pb.PredictReply(
            request_id=request.request_id,
            fingerprint=self.fingerprint,
            logits=to_message(averaged(expected_logits(rows), question.mean_of)),
        )
        if len(question.audit):
            reply.audit_digest.CopyFrom(to_message(np.full((len(question.audit), 16), 7, np.uint8)))
        with self.lock:
            self.answered_rows += len(rows)
        if self.spoil:
            self.spoil(reply)
        return reply


def averaged(logits: np.ndarray, mean_of: int) -> np.ndarray:
    return logits.reshape(-1, mean_of, logits.shape[1]).mean(axis=1)


@contextmanager
def serving(teacher: ScriptedTeacher, address: str = "127.0.0.1:0"):
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_TeacherServicer_to_server(teacher, server)
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def batch(step: int = 0, num_rows: int = 50) -> Rows:
    sizes = np.full(500, 90, np.int32)
    plan = Plan(seed=1, batch_size=2 * num_rows, law=ViewLaw(), samples=range(500), height=sizes, width=sizes)
    return plan.rows(step, 0, num_rows)


def fleet(*addresses: str, **settings) -> Fleet:
    settings = {"data_digest": DIGEST, "rows_per_request": 16, "patience_s": 20, "deadline_s": 10} | settings
    return Fleet(addresses, **settings)


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


def test_requests_are_no_larger_than_the_teacher_takes():
    with serving(ScriptedTeacher(max_rows=5)) as address, fleet(address, rows_per_request=16) as teachers:
        rows = batch()
        assert np.array_equal(teachers.ask(rows).result(), expected_logits(rows))


def test_a_dead_teacher_among_the_addresses_only_costs_a_warning(caplog):
    with serving(ScriptedTeacher()) as address, fleet("127.0.0.1:1", address) as teachers:
        rows = batch()
        assert np.array_equal(teachers.ask(rows).result(), expected_logits(rows))
        deadline = time.monotonic() + 20
        while not any("127.0.0.1:1" in record.getMessage() for record in caplog.records):
            assert time.monotonic() < deadline, "nobody said that a teacher is dead"
            time.sleep(0.02)


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
