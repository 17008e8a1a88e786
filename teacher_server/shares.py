"""How much of something limited each client may hold: places, bytes, rows.

Anyone may take what is free: a client alone may hold all. But who was turned away while holding less than an equal
share is remembered for a while, and until it is back and let in, nobody who holds more than a share gets more. So
what becomes free goes to those who have little, without anything kept idle in case somebody comes.

Rejected: a fixed part for each client, which would idle with one client and be too small with many; and a queue
of those who wait, because callers are told to come back, and nothing waits here (memory stays bounded).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_REMEMBERED_S = 15.0  # longer than anybody is told to stay away


class FullError(Exception):
    """No more for this client now."""

    def __init__(self, sentence: str, *, next_in_line: bool) -> None:
        super().__init__(sentence)
        self.next_in_line = next_in_line
        """It holds less than its share: the next that becomes free is for its like."""


class Shares:
    """So much of one thing. Thread-safe."""

    def __init__(self, what: str, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Take what is shared (for the sentences), how much there is, and a clock in seconds."""
        self._what = what
        self._capacity = capacity
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}
        self._turned_away: dict[str, float] = {}  # while holding less than a share; until when it is remembered
        self._total = 0

    @property
    def total(self) -> int:
        """Held by all together."""
        return self._total

    @property
    def num_clients(self) -> int:
        """Names that hold something."""
        return len(self._held)

    def take(self, name: str, amount: int) -> None:
        """Take for this client.

        Raises:
            FullError: the sentence says why not now.
        """
        with self._lock:
            others = self._others_in_line(name)
            share = self._capacity / len({name, *self._held, *others})
            held = self._held.get(name, 0)
            above_share = held > 0 and held + amount > share
            if above_share and others:
                raise FullError(
                    f"{name} has {held} {self._what}, and others wait for their share of {self._capacity}",
                    next_in_line=False,
                )
            # What alone exceeds the bound is let in when it is alone, or it could never be answered.
            if self._total and self._total + amount > self._capacity:
                if not above_share:
                    self._turned_away[name] = self._clock() + _REMEMBERED_S
                raise FullError(
                    f"{self._total} {self._what} are in progress, of at most {self._capacity}",
                    next_in_line=not above_share,
                )
            self._turned_away.pop(name, None)
            self._held[name] = held + amount
            self._total += amount

    def give(self, name: str, amount: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self._total -= amount
            self._held[name] -= amount
            if not self._held[name]:
                del self._held[name]

    @contextmanager
    def holding(self, name: str, amount: int) -> Iterator[None]:
        """Take now, and give back at the end."""
        self.take(name, amount)
        try:
            yield
        finally:
            self.give(name, amount)

    def _others_in_line(self, name: str) -> set[str]:
        now = self._clock()
        for gone in [one for one, until in self._turned_away.items() if until < now]:
            del self._turned_away[gone]
        return self._turned_away.keys() - {name}
