"""teacher_server/batcher.py: order, splitting, bounds, withdrawal, failure, closing. No model, no wire."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from teacher_server.batcher import Batcher, Launch, Part
from teacher_server.ticket import ClosedError, DeviceError, ModelError, OverloadedError, Ticket, WithdrawnError


class Model:
    """Answers the payload's rows doubled; runs one batch per permit, and remembers what ran."""

    def __init__(self, permits: int | None = None) -> None:
        self.batches: list[list[tuple[int, ...]]] = []
        self.started = queue.SimpleQueue[None]()
        self.permit = threading.Semaphore(permits or 0)
        self.free = permits is None
        self.fail_on: float | None = None

    def __call__(self, parts: list[Part[np.ndarray]]) -> np.ndarray:
        rows = np.concatenate([part.payload[part.start : part.stop] for part in parts])
        self.batches.append([tuple(part.payload[part.start : part.stop].tolist()) for part in parts])
        self.started.put(None)
        if not self.free:
            self.permit.acquire()
        if self.fail_on is not None and self.fail_on in rows:
            raise RuntimeError("out of memory")
        return np.stack([rows * 2, rows], axis=1).astype(np.float32)

    def rows_run(self) -> list[int]:
        return [row for batch in self.batches for part in batch for row in part]


@pytest.fixture
def make() -> Iterator:
    made: list[tuple[Batcher, Model]] = []

    def build(model: Model, batch_rows: int = 4, max_pending_rows: int = 100) -> Batcher:
        made.append((Batcher(model, batch_rows=batch_rows, max_pending_rows=max_pending_rows), model))
        return made[-1][0]

    yield build
    for batcher, model in made:
        model.free = True
        model.permit.release(1000)
        batcher.close()


def payload(first: int, num: int) -> np.ndarray:
    return np.arange(first, first + num)


def ask(batcher: Batcher, rows: np.ndarray) -> np.ndarray:
    with batcher.reserve(len(rows)) as ticket:
        ticket.submit(rows)
        return ticket.result()


def test_a_request_alone_runs_at_once(make):
    model = Model()
    answers = ask(make(model), payload(5, 3))
    assert answers.tolist() == [[10, 5], [12, 6], [14, 7]]
    assert model.batches == [[(5, 6, 7)]]


def test_requests_that_wait_share_a_batch_in_their_order_and_split_where_they_do_not_fit(make):
    model = Model(permits=0)
    batcher = make(model, batch_rows=4)
    tickets = [batcher.reserve(num) for num in (1, 2, 5, 1)]
    tickets[0].submit(payload(0, 1))
    model.started.get()  # the first runs, the others gather
    for ticket, rows in zip(tickets[1:], (payload(10, 2), payload(20, 5), payload(30, 1)), strict=True):
        ticket.submit(rows)
    model.permit.release(10)
    answers = [ticket.result()[:, 1].tolist() for ticket in tickets]
    for ticket in tickets:
        ticket.__exit__(None, None, None)
    assert model.batches == [[(0,)], [(10, 11), (20, 21)], [(22, 23, 24), (30,)]]
    assert answers == [[0], [10, 11], [20, 21, 22, 23, 24], [30]]


def test_a_large_request_is_split_and_joined_in_order(make):
    model = Model()
    assert ask(make(model, batch_rows=4), payload(0, 11))[:, 1].tolist() == list(range(11))
    assert [len(part) for batch in model.batches for part in batch] == [4, 4, 3]


def test_too_many_waiting_rows_are_refused_with_a_time_to_come_back(make):
    batcher = make(Model(), batch_rows=4, max_pending_rows=10)
    with batcher.reserve(8):
        with batcher.reserve(2):
            assert batcher.pending_rows == 10
            with pytest.raises(OverloadedError, match="10 rows are in progress, of at most 10") as refusal:
                batcher.reserve(1)
            assert 0 < refusal.value.retry_after_s <= 10
        batcher.reserve(1).__exit__(None, None, None)
    assert batcher.pending_rows == 0


def test_a_request_larger_than_the_bound_is_answered_when_it_is_alone(make):
    batcher = make(Model(), batch_rows=4, max_pending_rows=6)
    assert len(ask(batcher, payload(0, 9))) == 9
    with batcher.reserve(1), pytest.raises(OverloadedError):
        batcher.reserve(9)


def test_the_time_to_come_back_follows_the_models_speed(make):
    def slow(parts: list[Part[np.ndarray]]) -> np.ndarray:
        time.sleep(0.05)
        return np.zeros((sum(p.stop - p.start for p in parts), 1), np.float32)

    batcher = Batcher(slow, batch_rows=1, max_pending_rows=100)
    ask(batcher, payload(0, 3))
    with batcher.reserve(100):
        assert 2.0 < batcher.retry_after_s() < 10.0
    batcher.close()


def test_a_withdrawn_request_is_dropped_before_launch(make):
    model = Model(permits=0)
    batcher = make(model)
    with batcher.reserve(1) as first, batcher.reserve(2) as dead, batcher.reserve(1) as last:
        first.submit(payload(0, 1))
        model.started.get()
        dead.submit(payload(10, 2))
        last.submit(payload(20, 1))
        dead.withdraw()
        model.permit.release(10)
        assert last.result()[:, 1].tolist() == [20]
        with pytest.raises(WithdrawnError):
            dead.result()
    assert model.rows_run() == [0, 20]


def test_withdrawal_in_the_middle_stops_the_rows_that_have_not_run(make):
    model = Model(permits=0)
    batcher = make(model, batch_rows=2)
    with batcher.reserve(6) as ticket:
        ticket.submit(payload(0, 6))
        model.started.get()
        ticket.withdraw()
    model.permit.release(10)
    assert ask(batcher, payload(50, 1))[:, 1].tolist() == [50]
    assert model.rows_run() == [0, 1, 50]


def test_leaving_the_context_by_an_exception_gives_the_place_back(make):
    batcher = make(Model(), max_pending_rows=4)
    for _ in range(3):
        with pytest.raises(KeyError), batcher.reserve(4):
            raise KeyError
    assert batcher.pending_rows == 0


def test_a_failure_of_the_model_fails_only_the_requests_of_that_batch(make):
    model = Model(permits=0)
    model.fail_on = 11
    batcher = make(model, batch_rows=4)
    with batcher.reserve(1) as first, batcher.reserve(7) as bad, batcher.reserve(2) as good:
        first.submit(payload(0, 1))
        model.started.get()
        bad.submit(payload(10, 7))
        good.submit(payload(20, 2))
        model.permit.release(10)
        with pytest.raises(ModelError, match="out of memory") as failure:
            bad.result()
        assert isinstance(failure.value.__cause__, RuntimeError)
        assert good.result()[:, 1].tolist() == [20, 21]
        assert first.result()[:, 1].tolist() == [0]
    assert model.rows_run() == [0, 10, 11, 12, 13, 20, 21], "the rest of a failed request is not run"
    assert batcher.consecutive_failures == 0, "the last batch was good"


def test_closing_answers_everything_reserved_and_refuses_what_comes_later(make):
    model = Model(permits=0)
    batcher = make(model)
    with ThreadPoolExecutor() as pool:
        with batcher.reserve(3) as submitted, batcher.reserve(2) as reserved:
            submitted.submit(payload(0, 3))
            model.started.get()
            closing = pool.submit(batcher.close)
            while not batcher._closing:
                time.sleep(0.001)
            with pytest.raises(ClosedError):
                batcher.reserve(1)
            reserved.submit(payload(10, 2))
            model.permit.release(10)
            assert submitted.result()[:, 1].tolist() == [0, 1, 2]
            assert reserved.result()[:, 1].tolist() == [10, 11]
            assert not closing.done()
        closing.result(timeout=10)
    assert not batcher._thread.is_alive()


def test_many_threads_get_exactly_their_own_rows(make):
    """400 requests of 5 clients, 1 to 30 rows, from 16 threads, some withdrawn: nothing lost, doubled or exchanged."""
    model = Model()
    batcher = make(model, batch_rows=8, max_pending_rows=200)

    def one(number: int) -> bool:
        rng = np.random.default_rng((7, number))
        rows = payload(number * 100, int(rng.integers(1, 31)))
        while True:
            try:
                with batcher.reserve(len(rows), f"client {number % 5}") as ticket:
                    ticket.submit(rows)
                    if number % 10 == 3:
                        threading.Timer(rng.random() * 1e-3, ticket.withdraw).start()
                    answers = ticket.result()
            except OverloadedError as refusal:
                time.sleep(refusal.retry_after_s)
            except WithdrawnError:
                return False
            else:
                np.testing.assert_array_equal(answers, np.stack([rows * 2, rows], axis=1))
                return True

    with ThreadPoolExecutor(16) as pool:
        answered = list(pool.map(one, range(400)))
    assert all(done or number % 10 == 3 for number, done in enumerate(answered))
    assert max(sum(map(len, batch)) for batch in model.batches) <= 8
    assert len(set(model.rows_run())) == len(model.rows_run()), "no row ran twice"
    assert batcher.pending_rows == 0


# --- several clients ------------------------------------------------------------------------------------------------


def submit(batcher: Batcher, client: str, rows: np.ndarray) -> Ticket:
    ticket = batcher.reserve(len(rows), client)
    ticket.submit(rows)
    return ticket


def leave(*tickets: Ticket) -> None:
    for ticket in tickets:
        ticket.result()
        ticket.__exit__(None, None, None)


def test_one_small_request_runs_after_the_batch_in_progress_however_long_anothers_queue_is(make):
    model = Model(permits=0)
    batcher = make(model, batch_rows=4, max_pending_rows=1000)
    long = [submit(batcher, "long", payload(100 * i, 20)) for i in range(8)]
    model.started.get()
    small = submit(batcher, "small", payload(9000, 2))
    model.permit.release(2)
    assert small.result()[:, 1].tolist() == [9000, 9001]
    assert len(model.batches) <= 3, "one in progress, its own, and perhaps one that began meanwhile"
    model.permit.release(1000)
    leave(small, *long)


def test_clients_with_long_queues_get_equal_shares_whatever_the_size_of_their_requests(make):
    model = Model(permits=0)
    batcher = make(model, batch_rows=8, max_pending_rows=10_000)
    sizes = {"one": 1, "seven": 7, "forty": 40, "hundred": 100}
    tickets = [submit(batcher, "first", payload(0, 1))]
    model.started.get()
    for first, (client, size) in enumerate(sizes.items(), 1):
        tickets += [submit(batcher, client, payload(10_000 * first + i, size)) for i in range(0, 400, size)]
    model.permit.release(1000)
    leave(*tickets)
    rows = np.array(model.rows_run()[1:]) // 10_000
    for until in range(100, 1600, 100):  # each has at least 400 rows: nobody has run out before 1600
        served = np.bincount(rows[:until], minlength=5)[1:]
        assert served.max() - served.min() <= 2 * 8, "two batches apart at most"


def test_nobody_can_hold_all_rows_while_others_want_some_and_one_alone_can(make):
    batcher = make(Model(), batch_rows=4, max_pending_rows=40)
    alone = [batcher.reserve(10, "greedy") for _ in range(4)]
    with pytest.raises(OverloadedError, match="40 rows are in progress, of at most 40"):
        batcher.reserve(10, "modest")
    alone.pop().__exit__(None, None, None)
    with pytest.raises(OverloadedError, match="greedy has 30 rows, and others wait for their share of 40"):
        batcher.reserve(10, "greedy")
    modest = batcher.reserve(10, "modest")
    for ticket in (modest, *alone):
        ticket.__exit__(None, None, None)
    assert (batcher.pending_rows, batcher.num_clients) == (0, 0)


# --- the end of everything ------------------------------------------------------------------------------------------


def test_a_broken_device_ends_every_request_at_once_and_is_told(make):
    told: list[DeviceError] = []
    permit = threading.Semaphore(0)

    def broken(parts: list[Part[np.ndarray]]) -> np.ndarray:
        permit.acquire()
        raise DeviceError("CUDA error: an illegal memory access was encountered")

    batcher = Batcher(broken, batch_rows=2, max_pending_rows=100, on_broken=told.append)
    with batcher.reserve(1) as running, batcher.reserve(3) as queued, batcher.reserve(1) as reserved:
        running.submit(payload(0, 1))
        queued.submit(payload(0, 3))
        permit.release()
        for ticket in (running, queued, reserved):
            with pytest.raises(ClosedError, match="this teacher's device is broken: CUDA error"):
                ticket.result()
        with pytest.raises(ClosedError, match="illegal memory"):
            batcher.reserve(1)
    assert batcher.close(10)
    assert [str(error) for error in told] == ["CUDA error: an illegal memory access was encountered"]


def test_closing_abandons_what_a_hanging_model_holds_when_the_time_is_over():
    end = threading.Event()
    batcher = Batcher(lambda parts: end.wait() and np.zeros((1, 1)), batch_rows=2, max_pending_rows=100)
    with batcher.reserve(1) as ticket:
        ticket.submit(payload(0, 1))
        assert not batcher.close(0.05)
        with pytest.raises(ClosedError, match="no time left"):
            ticket.result()
    end.set()
    assert batcher.close(10)


def test_a_batch_is_reported_with_its_rows_and_how_long_its_requests_waited(make):
    reports: list[Launch] = []
    model = Model(permits=0)
    batcher = Batcher(model, batch_rows=4, max_pending_rows=100, on_launch=reports.append)
    first, second = batcher.reserve(1), batcher.reserve(6)
    first.submit(payload(0, 1))
    model.started.get()
    second.submit(payload(0, 6))
    assert batcher.at_work
    time.sleep(0.05)
    model.permit.release(10)
    leave(first, second)
    batcher.close()
    assert [report.num_rows for report in reports] == [1, 4, 2]
    assert [len(report.waits_s) for report in reports] == [1, 1, 0], "a split request waited once"
    assert reports[1].waits_s[0] >= 0.05
    assert batcher.num_ended == 3
    assert not batcher.at_work


@pytest.mark.parametrize(("batch_rows", "max_pending_rows"), [(0, 5), (6, 5)])
def test_impossible_bounds_are_refused(batch_rows, max_pending_rows):
    with pytest.raises(ValueError, match="batch_rows"):
        Batcher(lambda parts: np.zeros((0, 1)), batch_rows=batch_rows, max_pending_rows=max_pending_rows)


class DeviceModel(Model):
    """Begins a batch at once, and answers it when it is waited for."""

    def __call__(self, parts: list[Part[np.ndarray]]):
        self.batches.append([tuple(part.payload[part.start : part.stop].tolist()) for part in parts])
        self.started.put(None)

        def wait() -> np.ndarray:
            rows = np.concatenate([part.payload[part.start : part.stop] for part in parts])
            self.permit.acquire()
            if self.fail_on is not None and self.fail_on in rows:
                raise RuntimeError("out of memory")
            return np.stack([rows * 2, rows], axis=1).astype(np.float32)

        return wait


def test_a_device_is_given_the_next_whole_batch_while_one_runs_and_none_that_could_still_be_filled(make):
    model = DeviceModel(permits=0)
    batcher = make(model, batch_rows=4)
    with batcher.reserve(10) as large, batcher.reserve(2) as small:
        large.submit(payload(0, 10))
        model.started.get()
        model.started.get()  # two are begun, none is answered
        assert batcher.at_work
        model.permit.release()
        time.sleep(0.05)
        assert len(model.batches) == 2, "half a batch was begun while another one ran"
        small.submit(payload(20, 2))
        model.permit.release(10)
        assert large.result()[:, 1].tolist() == list(range(10))
        assert small.result()[:, 1].tolist() == [20, 21]
    assert model.batches == [[(0, 1, 2, 3)], [(4, 5, 6, 7)], [(8, 9), (20, 21)]]


def test_a_batch_that_fails_on_the_device_fails_its_own_requests_alone(make):
    model = DeviceModel(permits=0)
    model.fail_on = 1
    batcher = make(model, batch_rows=4)
    with batcher.reserve(4) as bad, batcher.reserve(4) as good:
        bad.submit(payload(0, 4))
        model.started.get()
        good.submit(payload(10, 4))
        model.permit.release(10)
        with pytest.raises(ModelError, match="out of memory"):
            bad.result()
        assert good.result()[:, 1].tolist() == [10, 11, 12, 13]


def test_a_device_that_breaks_while_two_batches_are_on_it_ends_both(make):
    def begin(parts):
        def wait():
            raise DeviceError("the device is gone")

        return wait

    broken = []
    batcher = Batcher(begin, batch_rows=4, max_pending_rows=100, on_broken=broken.append)
    with batcher.reserve(8) as ticket:
        ticket.submit(payload(0, 8))
        with pytest.raises(ClosedError, match="the device is gone"):
            ticket.result()
    assert batcher.close(10)
    assert broken
    assert not batcher.at_work
