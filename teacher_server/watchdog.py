"""Looks once a second whether the teacher still lives, and does what nobody else has the time for.

A device that hangs raises nothing: the call never returns. So what counts is progress: rows wait or a picture is being
rendered, and for stall_s no batch and no rendering comes to its end. Time is counted in looks and not by the clock, so
that a process that was stopped for a while (SIGSTOP, a paused container) is not taken for one that hung.

Rejected: a deadline for each batch. It would have to be known how long a batch may take, and on a busy machine that is
anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

_LOOK_S = 1.0


class Watchdog:
    """A thread that looks."""

    def __init__(
        self,
        *,
        stall_s: float,
        at_work: Callable[[], bool],
        num_ended: Callable[[], int],
        on_stall: Callable[[str], None],
        chores: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Start the thread.

        Args:
            stall_s: seconds without progress, while there is work, that mean a stall.
            at_work: whether there is work.
            num_ended: pieces of work that came to their end since the start.
            on_stall: called once, with a sentence.
            chores: called at each look.
        """
        self._stall_s = stall_s
        self._look_s = min(_LOOK_S, stall_s / 10)
        self._at_work, self._num_ended, self._on_stall = at_work, num_ended, on_stall
        self._chores = chores
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._end.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _watch(self) -> None:
        stalled_s, seen = 0.0, -1
        while not self._end.wait(self._look_s):
            for chore in self._chores:
                chore()
            num_ended = self._num_ended()
            stalled_s = stalled_s + self._look_s if self._at_work() and num_ended == seen else 0.0
            seen = num_ended
            if stalled_s >= self._stall_s:
                self._on_stall(f"no batch and no rendering has come to its end for {stalled_s:.0f} s (--stall-s)")
                return
