"""Which rows run together. No torch, no gRPC: rows are counted here, never looked at.

Requests come from many threads; one thread runs the model. While it runs, requests gather, and the next batch
takes what is there, first come first served, a request's rows split over batches where they do not fit. There
is no artificial delay: trainers keep several requests in flight, so batches fill by themselves, and a delay of
0, 5 or 20 ms gave the same throughput when it was measured.

Places are *reserved* before any picture is read, so that what waits is bounded in memory, and an overload is an
answer and not a growing heap.

Legend: K classes, R rows of a request.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

P = TypeVar("P")

_FIRST_GUESS_S = 0.2  # of the time until there is room, before anything has run
_RETRY_RANGE_S = 0.02, 10.0
_SMOOTHING = 0.2  # weight of the last batch in the running mean of seconds per row


class OverloadedError(Exception):
    """No room for more rows now."""

    def __init__(self, pending_rows: int, max_pending_rows: int, retry_after_s: float) -> None:
        super().__init__(f"{pending_rows} rows are waiting, of at most {max_pending_rows}")
        self.retry_after_s = retry_after_s


class ClosedError(Exception):
    """The batcher is closing and takes nothing new."""


class WithdrawnError(Exception):
    """Whoever asked does not wait any more."""


class ModelError(Exception):
    """The model failed on a batch that held rows of this ticket; its cause says how."""


@dataclass(frozen=True, slots=True)
class Part(Generic[P]):
    """Rows start..stop-1 of one request, in a batch."""

    payload: P
    start: int
    stop: int


Run = Callable[[Sequence[Part[P]]], NDArray[np.float32]]
"""Answers [rows of all parts in their order, K] float32."""


class Ticket(Generic[P]):
    """One request's place. Use as a context: leaving it gives the place back, whatever happened.

    submit, result and the context belong to one thread; withdraw may be called from any.
    """

    def __init__(self, batcher: Batcher[P], num_rows: int) -> None:
        self.num_rows = num_rows
        self._batcher = batcher
        self._settled = threading.Event()
        self._error: Exception | None = None
        self._answers: list[NDArray[np.float32]] = []
        self._payload: P | None = None
        self._num_launched = 0  # rows; touched by the running thread alone

    def __enter__(self) -> Ticket[P]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.withdraw()
        self._batcher._give_back(self)

    def submit(self, payload: P) -> None:
        """Queue up; the model will get the payload, with the rows that it shall answer."""
        self._payload = payload
        self._batcher._enqueue(self)

    def result(self) -> NDArray[np.float32]:
        """Wait for the answers: [R, K] float32.

        Raises:
            ModelError: the model failed on rows of this ticket.
            WithdrawnError: withdraw was called first.
        """
        self._settled.wait()
        if self._error is not None:
            raise self._error
        return self._answers[0] if len(self._answers) == 1 else np.concatenate(self._answers)

    def withdraw(self) -> None:
        """Nobody waits any more: rows that have not been launched never will be."""
        self._settle(WithdrawnError("nobody waits for this request any more"))

    @property
    def settled(self) -> bool:
        """Whether result would return or raise at once."""
        return self._settled.is_set()

    def _settle(self, error: Exception | None) -> None:
        with self._batcher._changed:
            if not self._settled.is_set():
                self._error = error
                self._settled.set()


class Batcher(Generic[P]):
    """Gathers rows into batches and runs them on a thread of its own."""

    def __init__(self, run: Run[P], *, batch_rows: int, max_pending_rows: int) -> None:
        """Start the thread.

        Args:
            run: the model. An exception of it fails the tickets that had rows in the batch, and no others.
            batch_rows: rows of one batch at most.
            max_pending_rows: rows reserved at once at most, from reservation to the end of the ticket's context.
        """
        if not 1 <= batch_rows <= max_pending_rows:
            raise ValueError(f"need 1 <= batch_rows <= max_pending_rows, got {batch_rows} and {max_pending_rows}")
        self._run = run
        self._batch_rows = batch_rows
        self._max_pending_rows = max_pending_rows
        self._changed = threading.Condition(threading.RLock())
        self._queue: deque[Ticket[P]] = deque()
        self._num_tickets = 0
        self._pending_rows = 0
        self._seconds_per_row: float | None = None
        self._closing = False
        self.consecutive_failures = 0
        """Batches that failed since the last one that did not."""
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def pending_rows(self) -> int:
        """Rows reserved now."""
        return self._pending_rows

    def reserve(self, num_rows: int) -> Ticket[P]:
        """Take a place for a request of so many rows, before anything is spent on it.

        Raises:
            OverloadedError: no room; says when to come back.
            ClosedError: close was called.
        """
        if num_rows < 1:
            raise ValueError(f"a request has at least one row, got {num_rows}")
        with self._changed:
            if self._closing:
                raise ClosedError("the teacher is shutting down")
            # A request that alone exceeds the bound is let in when it is alone, or it could never be answered.
            if self._pending_rows and self._pending_rows + num_rows > self._max_pending_rows:
                raise OverloadedError(self._pending_rows, self._max_pending_rows, self.retry_after_s())
            self._pending_rows += num_rows
            self._num_tickets += 1
        return Ticket(self, num_rows)

    def retry_after_s(self) -> float:
        """Seconds until half of what waits now will have been answered: worth trying again then."""
        if self._seconds_per_row is None:
            return _FIRST_GUESS_S
        low, high = _RETRY_RANGE_S
        return min(max(self._pending_rows * self._seconds_per_row / 2, low), high)

    def close(self, timeout_s: float | None = None) -> None:
        """Take nothing new, wait until every ticket's context has been left, and end the thread.

        After timeout_s seconds it is left behind: a device that hangs must not keep the process alive.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _enqueue(self, ticket: Ticket[P]) -> None:
        with self._changed:
            self._queue.append(ticket)
            self._changed.notify_all()

    def _give_back(self, ticket: Ticket[P]) -> None:
        with self._changed:
            self._pending_rows -= ticket.num_rows
            self._num_tickets -= 1
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            batch = self._next_batch()
            if batch is None:
                return
            self._launch(batch)

    def _next_batch(self) -> list[tuple[Ticket[P], Part[P]]] | None:
        """Wait for rows and take the oldest; None when closed and nobody is left."""
        with self._changed:
            while True:
                batch = self._take()
                if batch:
                    return batch
                if self._closing and not self._num_tickets:
                    return None
                self._changed.wait()

    def _take(self) -> list[tuple[Ticket[P], Part[P]]]:
        batch: list[tuple[Ticket[P], Part[P]]] = []
        room = self._batch_rows
        while room and self._queue:
            ticket = self._queue[0]
            if ticket.settled:  # withdrawn, or failed in an earlier batch
                self._queue.popleft()
                continue
            start = ticket._num_launched
            stop = min(start + room, ticket.num_rows)
            assert ticket._payload is not None
            batch.append((ticket, Part(ticket._payload, start, stop)))
            ticket._num_launched = stop
            room -= stop - start
            if stop == ticket.num_rows:
                self._queue.popleft()
        return batch

    def _launch(self, batch: list[tuple[Ticket[P], Part[P]]]) -> None:
        parts = [part for _, part in batch]
        num_rows = sum(part.stop - part.start for part in parts)
        began = time.monotonic()
        try:
            answers = self._run(parts)
            if len(answers) != num_rows:
                raise AssertionError(f"the model answered {len(answers)} rows of {num_rows}")
        except Exception as error:  # whatever a model can raise must not end the thread that runs it
            self.consecutive_failures += 1
            for ticket, _ in batch:
                ticket._settle(_caused(ModelError(f"the model failed: {error}"), error))
            return
        self.consecutive_failures = 0
        self._remember_speed((time.monotonic() - began) / num_rows)
        _deliver(batch, answers)

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
