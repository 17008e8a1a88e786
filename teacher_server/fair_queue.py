"""Whose turn is it? Start-time fair queueing: clients that wait get equal shares of what is served.

Each client has a clock that advances by what it was served; the client with the earliest clock is next. Who comes back
after a pause starts at the present, so that a pause is neither saved up nor punished. A client with one small request
is served after the piece that is being served now, however long another's queue is.

What is measured here is only cost; rows know nothing of it. Not thread-safe: whoever owns a queue has a lock.

Rejected: deficit round robin. It is O(1), which matters for thousands of queues and not for the few dozen that
clients.py lets in; it needs a quantum, and somebody who comes must wait for a round of everybody's quanta.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Client(Generic[T]):
    clock: float
    items: deque[T] = field(default_factory=deque)


class FairQueue(Generic[T]):
    """Items of named clients: first come first served within a client, equal shares between clients."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client[T]] = {}
        self._now = 0.0  # the clock of whoever was served last, when the piece began
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, name: str, item: T) -> None:
        """Queue an item up behind its client's others."""
        client = self._clients.setdefault(name, _Client(self._now))
        if not client.items:
            client.clock = max(client.clock, self._now)
        client.items.append(item)
        self._length += 1

    def first(self) -> T | None:
        """The item whose turn it is; None when nobody waits."""
        name = self._next()
        return None if name is None else self._clients[name].items[0]

    def serve(self, cost: float, *, done: bool) -> None:
        """Note that the first item was served so much; done: that was the last of it (or it is dropped, for cost 0)."""
        name = self._next()
        assert name is not None, "nobody waits"
        client = self._clients[name]
        if cost:
            self._now = client.clock
            client.clock += cost
        if done:
            client.items.popleft()
            self._length -= 1
        self._forget()

    def _next(self) -> str | None:
        waiting = [name for name, client in self._clients.items() if client.items]
        return min(waiting, key=lambda name: self._clients[name].clock, default=None)

    def _forget(self) -> None:
        """Clients that do not wait, and would come back at the present anyway; all, when nobody waits."""
        for name, client in list(self._clients.items()):
            if not client.items and (not self._length or client.clock <= self._now):
                del self._clients[name]
