"""Which rows run together. No torch, no gRPC: rows are counted here, never looked at.

Requests come from many threads; one thread runs the model. While it runs, requests gather, and the next batch
takes what is there: clients in fair order (fair_queue.py), a client's requests first come first served, a request's
rows split over batches where they do not fit. There is no artificial delay: trainers keep several requests in
flight, so batches fill by themselves, and a delay of 0, 5 or 20 ms gave the same throughput when it was measured.

A model on a device of its own may be given the next batch while one runs, so that the device never waits for Python.
It is, when a whole batch waits: one that would have to be padded may still be filled.

Places are *reserved* before any picture is read, so that what waits is bounded in memory, and an overload is an
answer and not a growing heap. They are shared between clients, too (shares.py).

Legend: K classes, R rows of a request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from teacher_server.fair_queue import FairQueue
from teacher_server.shares import FullError, Shares
from teacher_server.ticket import ClosedError, DeviceError, ModelError, OverloadedError, Ticket

P = TypeVar("P")

_FIRST_GUESS_S = 0.2  # of the time until there is room, before anything has run
_RETRY_RANGE_S = 0.02, 10.0
_SMOOTHING = 0.2  # weight of the last batch in the running mean of seconds per row


@dataclass(frozen=True, slots=True)
class Part(Generic[P]):
    """Rows start..stop-1 of one request, in a batch."""

    payload: P
    start: int
    stop: int


Wait = Callable[[], NDArray[np.float32]]
Run = Callable[[Sequence[Part[P]]], NDArray[np.float32] | Wait]
"""Answers [rows of all parts in their order, K] float32; or begins, and returns what waits for the answers: the next
batch may be begun before that is called."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What there is to measure about one batch."""

    num_rows: int
    seconds: float
    """On the model."""
    waits_s: Sequence[float]
    """Of requests whose first rows were in it: from submit to launch."""


@dataclass(frozen=True, slots=True)
class _Begun(Generic[P]):
    """A batch that the model has."""

    batch: list[tuple[Ticket[P], Part[P]]]
    began: float
    wait: Wait


class Batcher(Generic[P]):
    """Gathers rows into batches and runs them on a thread of its own."""

    def __init__(
        self,
        run: Run[P],
        *,
        batch_rows: int,
        max_pending_rows: int,
        on_launch: Callable[[Launch], None] | None = None,
        on_broken: Callable[[DeviceError], None] | None = None,
    ) -> None:
        """Start the thread.

        Args:
            run: the model. An exception of it fails the tickets that had rows in the batch, and no others; but a
                DeviceError ends everything that is reserved.
            batch_rows: rows of one batch at most.
            max_pending_rows: rows reserved at once at most, from reservation to the end of the ticket's context.
            on_launch: told of each batch that was answered.
            on_broken: told of a DeviceError.
        """
        if not 1 <= batch_rows <= max_pending_rows:
            raise ValueError(f"need 1 <= batch_rows <= max_pending_rows, got {batch_rows} and {max_pending_rows}")
        self._run = run
        self._batch_rows = batch_rows
        self._on_launch, self._on_broken = on_launch, on_broken
        self._rows = Shares("rows", max_pending_rows)
        self._changed = threading.Condition(threading.RLock())
        self._queue: FairQueue[Ticket[P]] = FairQueue()
        self._tickets: set[Ticket[P]] = set()
        self._seconds_per_row: float | None = None
        self._closing = ""  # why
        self._num_running = 0  # batches that the model has: one, or two
        self._waiting_rows = 0  # of tickets in the queue, settled or not
        self._last_answer = 0.0  # when it came
        self.num_ended = 0
        """Batches that came to their end, good or bad: a sign of life."""
        self.consecutive_failures = 0
        """Batches that failed since the last one that did not."""
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def pending_rows(self) -> int:
        """Rows reserved now."""
        return self._rows.total

    @property
    def num_clients(self) -> int:
        """Clients that have rows reserved now."""
        return self._rows.num_clients

    @property
    def at_work(self) -> bool:
        """Whether the model runs, or rows wait for it."""
        return self._num_running > 0 or len(self._queue) > 0

    def reserve(self, num_rows: int, client: str = "") -> Ticket[P]:
        """Take a place for a request of so many rows, before anything is spent on it.

        Raises:
            OverloadedError: no room; says when to come back.
            ClosedError: close was called.
        """
        if num_rows < 1:
            raise ValueError(f"a request has at least one row, got {num_rows}")
        with self._changed:
            if self._closing:
                raise ClosedError(self._closing)
            try:
                self._rows.take(client, num_rows)
            except FullError as full:
                raise OverloadedError(str(full), self.retry_after_s(num_rows if full.next_in_line else None)) from full
            ticket = Ticket(self, num_rows, client)
            self._tickets.add(ticket)
        return ticket

    def retry_after_s(self, num_rows: int | None = None) -> float:
        """Seconds after which to try again: when half of what waits now will have been answered.

        For who is next in line, when as many rows will have been answered as it wants places: num_rows.
        """
        if self._seconds_per_row is None:
            return _FIRST_GUESS_S
        low, high = _RETRY_RANGE_S
        rows = self.pending_rows / 2 if num_rows is None else max(num_rows, self._batch_rows)
        return min(max(rows * self._seconds_per_row, low), high)

    def close(self, timeout_s: float | None = None) -> bool:
        """Take nothing new, wait until every ticket's context has been left, and end the thread.

        After timeout_s seconds what is left is abandoned: a device that hangs must not keep the process alive.
        Returns whether nothing was.
        """
        with self._changed:
            self._closing = self._closing or "the teacher is shutting down"
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            return True
        self.abandon("the teacher is shutting down, and had no time left to answer")
        return False

    def abandon(self, why: str) -> None:
        """End every ticket now with a ClosedError, and take nothing new. A batch that runs is not waited for."""
        with self._changed:
            self._closing = why
            for ticket in self._tickets:
                ticket._settle(ClosedError(why))
            self._changed.notify_all()

    def _enqueue(self, ticket: Ticket[P]) -> None:
        with self._changed:
            self._queue.push(ticket.client, ticket)
            self._waiting_rows += ticket.num_rows
            self._changed.notify_all()

    def _give_back(self, ticket: Ticket[P]) -> None:
        with self._changed:
            self._rows.give(ticket.client, ticket.num_rows)
            self._tickets.remove(ticket)
            if self._closing:  # else the thread would wake up to find nothing to do
                self._changed.notify_all()

    def _work(self) -> None:
        begun: _Begun[P] | None = None
        while True:
            batch = self._next_batch(wait=begun is None)
            if batch is None and begun is None:
                return
            following = None if batch is None else self._begin(batch)
            if begun is not None:
                self._finish(begun)
            begun = following

    def _next_batch(self, *, wait: bool) -> list[tuple[Ticket[P], Part[P]]] | None:
        """Take rows whose turn it is. None when closed and nobody is left.

        Without waiting, None at once if there is no whole batch.
        """
        with self._changed:
            while wait or self._waiting_rows >= self._batch_rows:
                batch = self._take()
                if batch:
                    self._num_running += 1
                    return batch
                if not wait or (self._closing and not self._tickets):
                    return None
                self._changed.wait()
            return None

    def _take(self) -> list[tuple[Ticket[P], Part[P]]]:
        batch: list[tuple[Ticket[P], Part[P]]] = []
        room = self._batch_rows
        while room and (ticket := self._queue.first()) is not None:
            if ticket.settled:  # withdrawn, or failed in an earlier batch
                self._queue.serve(0, done=True)
                self._waiting_rows -= ticket.num_rows - ticket._num_launched
                continue
            start = ticket._num_launched
            stop = min(start + room, ticket.num_rows)
            assert ticket._payload is not None
            batch.append((ticket, Part(ticket._payload, start, stop)))
            ticket._num_launched = stop
            room -= stop - start
            self._waiting_rows -= stop - start
            self._queue.serve(stop - start, done=stop == ticket.num_rows)
        return batch

    def _begin(self, batch: list[tuple[Ticket[P], Part[P]]]) -> _Begun[P] | None:
        """Give a batch to the model; None if it has been answered, or has failed, already."""
        began = time.monotonic()
        try:
            answers = self._run([part for _, part in batch])
        except Exception as error:  # whatever a model can raise must not end the thread that runs it
            self._fail(batch, error)
            return None
        if callable(answers):
            return _Begun(batch, began, answers)
        self._finish(_Begun(batch, began, lambda: answers))
        return None

    def _finish(self, begun: _Begun[P]) -> None:
        """Wait for a batch's answers and deliver them."""
        batch = begun.batch
        num_rows = sum(part.stop - part.start for _, part in batch)
        try:
            answers = begun.wait()
            if len(answers) != num_rows:
                raise AssertionError(f"the model answered {len(answers)} rows of {num_rows}")
        except Exception as error:
            self._fail(batch, error)
            return
        self.consecutive_failures = 0
        now = time.monotonic()
        seconds = now - max(begun.began, self._last_answer)  # without its wait for the batch before it
        self._last_answer = now
        self._remember_speed(seconds / num_rows)
        _deliver(batch, answers)
        if self._on_launch is not None:
            waits_s = [begun.began - ticket._submitted for ticket, part in batch if part.start == 0]
            self._on_launch(Launch(num_rows, seconds, waits_s))
        self._end()

    def _fail(self, batch: list[tuple[Ticket[P], Part[P]]], error: Exception) -> None:
        if isinstance(error, DeviceError):
            self._break(error)
        else:
            self.consecutive_failures += 1
            for ticket, _ in batch:
                ticket._settle(_caused(ModelError(f"the model failed: {error}"), error))
        self._end()

    def _end(self) -> None:
        self._num_running -= 1
        self.num_ended += 1

    def _break(self, error: DeviceError) -> None:
        self.abandon(f"this teacher's device is broken: {error}")
        if self._on_broken is not None:
            self._on_broken(error)

    def _remember_speed(self, seconds_per_row: float) -> None:
        old = self._seconds_per_row
        self._seconds_per_row = seconds_per_row if old is None else old + _SMOOTHING * (seconds_per_row - old)


def _deliver(batch: Sequence[tuple[Ticket[Any], Part[Any]]], answers: NDArray[np.float32]) -> None:
    at = 0
    for ticket, part in batch:
        size = part.stop - part.start
        ticket._answers.append(answers[at : at + size])
        at += size
        if part.stop == ticket.num_rows:
            ticket._settle(None)


def _caused(error: ModelError, cause: Exception) -> ModelError:
    error.__cause__ = cause
    return error
