"""Whose turn, how much, under which name: the rooms that share a teacher between its clients."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from teacher_server import clients
from teacher_server.clients import OTHERS, Clients, host_of
from teacher_server.fair_queue import FairQueue
from teacher_server.shares import FullError, Shares
from teacher_server.turns import Turns


class Clock:
    """A time that the test makes."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# --- whose turn -----------------------------------------------------------------------------------------------------


def served(queue: FairQueue, budget: int, piece: int) -> list[tuple[str, int]]:
    """Serve so much in pieces; (client, cost) of each piece. Items are [client, cost left]."""
    history = []
    while budget > 0 and (item := queue.first()) is not None:
        cost = min(piece, item[1])
        item[1] -= cost
        queue.serve(cost, done=item[1] == 0)
        history.append((item[0], cost))
        budget -= cost
    return history


@pytest.mark.parametrize("seed", range(20))
def test_between_clients_that_wait_all_the_time_the_service_differs_by_two_pieces_at_most(seed):
    rng = np.random.default_rng((4, seed))
    queue: FairQueue = FairQueue()
    names = [f"c{i}" for i in range(rng.integers(2, 9))]
    for name in names:
        left = 500
        while left > 0:
            cost = int(rng.integers(1, 60))
            queue.push(name, [name, cost])
            left -= cost
    total = dict.fromkeys(names, 0)
    for name, cost in served(queue, 450 * len(names) // 2, piece=8):
        total[name] += cost
        assert max(total.values()) - min(total.values()) <= 2 * 8


def test_a_client_that_pauses_saves_nothing_up_and_loses_nothing():
    queue: FairQueue = FairQueue()
    for _ in range(100):
        queue.push("steady", ["steady", 4])
    served(queue, 200, piece=4)
    for _ in range(50):
        queue.push("late", ["late", 4])
    after = [name for name, _ in served(queue, 80, piece=4)]
    assert after.count("late") == after.count("steady") == 10


def test_within_a_client_it_is_first_come_first_served():
    queue: FairQueue = FairQueue()
    for number in range(5):
        queue.push("a", [number, 3])
        queue.push("b", [10 + number, 3])
    order = [name for name, _ in served(queue, 1000, piece=3)]
    assert [n for n in order if n < 10] == [0, 1, 2, 3, 4]
    assert [n for n in order if n >= 10] == [10, 11, 12, 13, 14]


def test_clients_that_have_gone_are_forgotten():
    queue: FairQueue = FairQueue()
    for number in range(1000):
        queue.push(f"once {number}", ["x", 1])
        queue.push("steady", ["steady", 1])
        served(queue, 2, piece=1)
    assert not len(queue)
    assert not queue._clients


# --- how much -------------------------------------------------------------------------------------------------------


def test_one_client_alone_may_take_everything():
    shares = Shares("places", 8)
    for _ in range(8):
        shares.take("a", 1)
    with pytest.raises(FullError, match="8 places are in progress, of at most 8"):
        shares.take("a", 1)


def test_what_becomes_free_goes_to_who_was_turned_away_with_less_than_a_share():
    shares = Shares("places", 8)
    for _ in range(8):
        shares.take("greedy", 1)
    with pytest.raises(FullError) as full:
        shares.take("modest", 1)
    assert full.value.next_in_line
    for _ in range(4):  # one by one greedy's places become free, and it asks again at once, and is faster
        shares.give("greedy", 1)
        with pytest.raises(FullError, match=r"greedy has \d places, and others wait for their share of 8") as full:
            shares.take("greedy", 1)
        assert not full.value.next_in_line
        shares.take("modest", 1)
        with pytest.raises(FullError):
            shares.take("modest", 1)
    assert shares.num_clients == 2


def test_who_was_turned_away_and_never_comes_back_is_forgotten():
    clock = Clock()
    shares = Shares("places", 2, clock)
    shares.take("greedy", 1)
    shares.take("greedy", 1)
    with pytest.raises(FullError):
        shares.take("gone", 1)
    shares.give("greedy", 1)
    with pytest.raises(FullError):
        shares.take("greedy", 1)
    clock.now += 60
    shares.take("greedy", 1)


def test_random_clients_never_exceed_the_capacity_and_everything_is_given_back():
    rng = np.random.default_rng(5)
    shares = Shares("bytes", 1000)
    held: list[tuple[str, int]] = []
    for _ in range(5000):
        if held and rng.random() < 0.5:
            shares.give(*held.pop(rng.integers(len(held))))
            continue
        wanted = f"c{rng.integers(6)}", int(rng.integers(1, 300))
        try:
            shares.take(*wanted)
        except FullError:
            continue
        held.append(wanted)
        assert shares.total == sum(amount for _, amount in held) <= 1000
    for taken in held:
        shares.give(*taken)
    assert (shares.total, shares.num_clients) == (0, 0)


# --- under which name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:51234", "10.0.0.7"),
        ("ipv6:%5B::1%5D:51234", "::1"),
        ("ipv6:[fe80::2]:1", "fe80::2"),
        ("unix:", "unix"),
        ("", "unknown"),
    ],
)
def test_a_caller_without_a_name_is_called_after_its_host(peer, host):
    assert host_of(peer) == host
    assert Clients().name("", peer) == host


def test_names_beyond_the_bound_share_one_until_others_are_forgotten():
    clock = Clock()
    names = Clients(clock)
    for number in range(clients.MAX_NAMES):
        assert names.name(f"run {number}", "") == f"run {number}"
    assert names.name("one too many", "") == OTHERS
    clock.now += 50
    assert names.name("run 3", "") == "run 3"
    clock.now += 50
    assert names.name("one too many", "") == "one too many"
    assert names.name("run 3", "") == "run 3"
    assert len(names._seen) == 2


# --- turns at the renderers -----------------------------------------------------------------------------------------


def test_turns_are_bounded_and_a_small_client_does_not_wait_behind_anothers_many():
    turns = Turns(2)
    order: list[str] = []
    at_once: list[int] = []
    gate = threading.Semaphore(0)

    def work(name: str) -> None:
        with turns.turn(name, 10, lambda: False):
            at_once.append(turns._num_at_work)
            order.append(name)
            gate.acquire()

    with ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(work, "many") for _ in range(9)]
        while len(order) < 2 or len(turns._waiting) < 7:
            time.sleep(0.005)
        jobs.append(pool.submit(work, "small"))
        while len(turns._waiting) < 8:
            time.sleep(0.005)
        gate.release(100)
        for job in jobs:
            job.result(timeout=10)
    assert "small" in order[:4], order
    assert max(at_once) <= 2
    assert turns.num_ended == 10
    assert not turns.at_work


def test_a_turn_is_given_back_when_its_work_fails():
    turns = Turns(1)
    for _ in range(3):
        with pytest.raises(KeyError), turns.turn("a", 1, lambda: False):
            raise KeyError
    assert turns._free == 1
