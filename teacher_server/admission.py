"""What may be in memory at once, before anything is known about rows: calls, messages, requests.

Handlers are plain threads, and fewer Predict calls are let in than there are threads, so that health checks, Describe
and refusals always find one: a teacher that is busy must not look dead.

The worst case of a server's memory under any load, beside the model and the decoders (S pixels a side, M =
MAX_MESSAGE_BYTES = 256 MiB, largest defaults):

    messages being read     3 M x MAX_READING                6 GiB    as they come, whole, and parsed
    messages of requests    2 x MAX_BYTES_IN_PROGRESS        2 GiB    parsed; and copied, of those that are rendered
    views of requests       max_pending_rows x 2 x 3 S S     1.2 GiB  at 224 pixels
    replies                 MAX_IN_PROGRESS x max_rows x 4 K 62 MiB   for 1000 classes
    calls not read yet      MAX_CALLS x 4 MiB                1 GiB    what HTTP/2 lets come of a message (measured)

It takes eight callers that send the largest message at the same instant to come near; with requests of 64 rows of 224
pixels the first two lines are 0.6 GiB. tests/test_overload.py holds a server to it. What was once needed stays with the
process: the C library keeps it for the next time (measured: flat from the second flood on).

Rejected: gRPC's maximum_concurrent_rpcs alone. It counts health checks as well, and refuses without saying when to
come back; it stands behind as the outer wall (server.py). And HTTP/2 windows that do not grow: a call that is not read
would cost 64 KiB, but over 40 ms a message of 20 MB took 0.9 s where it takes 0.09 s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from teacher_server.shares import FullError, Shares

MAX_MESSAGE_BYTES = 256 * 2**20
"""Of one request or reply: 1700 views of 224 pixels, 600 of 384. Without a bound, one caller could fill the memory."""

MAX_IN_PROGRESS = 16
"""Requests that are rendered or wait for the model; more are refused like too many rows."""

MAX_READING = 8
"""Messages that are read and checked at once; others wait a moment."""

MAX_CALLS = 256
"""Calls of all kinds at once, gRPC's own bound: beyond, RESOURCE_EXHAUSTED without a time to come back."""

MAX_BYTES_IN_PROGRESS = 2**30
"""Of the messages of requests in progress."""

MAX_SEATS = MAX_IN_PROGRESS + MAX_READING
"""Threads that Predict may hold."""

_ARRIVAL_S = 60.0  # for a whole message: 34 Mbit/s for the largest, 3 for one of 64 rows as pixels


class Admission:
    """Lets Predict calls in. Thread-safe."""

    def __init__(self) -> None:
        self._seats = threading.BoundedSemaphore(MAX_SEATS)
        self._readers = threading.BoundedSemaphore(MAX_READING)
        self._requests = Shares("requests", MAX_IN_PROGRESS)
        self._bytes = Shares("bytes of messages", MAX_BYTES_IN_PROGRESS)
        self._lock = threading.Lock()
        self._arriving: dict[grpc.ServicerContext, float] = {}  # since when

    @contextmanager
    def seat(self) -> Iterator[None]:
        """A thread of those for Predict; nothing of the call has been read yet.

        Raises:
            FullError: none is free.
        """
        if not self._seats.acquire(blocking=False):
            raise FullError(f"{MAX_SEATS} calls are in progress already", next_in_line=False)
        try:
            yield
        finally:
            self._seats.release()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """One of those who read a message and take it apart; waits for that."""
        with self._readers:
            yield

    def message(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes | None:
        """The one message of a call; None when it ended without one. One that takes too long is cancelled."""
        with self._lock:
            self._arriving[context] = time.monotonic()
        try:
            return next(messages, None)
        finally:
            with self._lock:
                del self._arriving[context]

    def cancel_late(self) -> None:
        """Cancel calls whose message does not come: they would hold their seats for ever. Call it now and then."""
        before = time.monotonic() - _ARRIVAL_S
        with self._lock:
            late = [context for context, since in self._arriving.items() if since < before]
        for context in late:
            context.cancel()

    @contextmanager
    def request(self, client: str, num_bytes: int) -> Iterator[None]:
        """A place for a request, by client.

        Raises:
            FullError: too many, or too large together.
        """
        with self._requests.holding(client, 1), self._bytes.holding(client, num_bytes):
            yield
