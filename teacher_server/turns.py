"""Who may read and render pictures now: a few at once, in fair order between clients.

Handler threads decode pictures themselves. Without turns, sixteen of them would hold sixteen requests' pictures in
memory and queue for the renderers in the order in which they came, so that one client's small request waited behind
another's many. A turn that nobody wants any more when it comes costs its client nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from teacher_server.fair_queue import FairQueue


class Turns:
    """At most so many at once, by client. Thread-safe."""

    def __init__(self, num: int) -> None:
        """Take how many may be in progress at once."""
        self._free = num
        self._changed = threading.Condition()
        self._waiting: FairQueue[object] = FairQueue()
        self._num_at_work = 0
        self.num_ended = 0
        """Turns that came to their end: a sign of life."""

    @property
    def at_work(self) -> bool:
        """Whether somebody has a turn."""
        return self._num_at_work > 0

    @contextmanager
    def turn(self, name: str, cost: int, given_up: Callable[[], bool]) -> Iterator[None]:
        """Wait for a turn of this client, and have it.

        Args:
            name: the client.
            cost: of this turn, in pixels that are looked at.
            given_up: asked when the turn has come; if so it costs nothing, and the body has nothing to do.
        """
        me = object()
        with self._changed:
            self._waiting.push(name, me)
            while not (self._free and self._waiting.first() is me):
                self._changed.wait()
            self._waiting.serve(0 if given_up() else cost, done=True)
            self._free -= 1
            self._num_at_work += 1
            self._changed.notify_all()  # another turn may be free for the next
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._num_at_work -= 1
                self.num_ended += 1
                self._changed.notify_all()
