"""How many requests one replica may have under way: as many as keep it busy, hardly more.

The law is TCP Vegas's. With w requests under way, answered in L where an idle replica takes L0, about w (1 - L0 / L)
of them wait in a queue and do no good there. Fewer than 1.5: the replica may run dry between two requests, so the
window grows. More than 3: they would be better off in our own queue, where whoever is free first takes them, so it
shrinks. A replica that answers one after the other keeps a window of 3 or 4, whatever its speed, and so gets rows by
its speed; one that is far away gets as many as fill the line. (With bounds of 1 and 2, windows were 2, and on a busy
machine replicas ran dry: three delivered 1.5 times one's rows.)

L0 is the least that was seen, and forgotten after a while, for teachers become busier. Measured anew under a full
window it would be too large, and the window would grow for ever: for one round of answers the window is small.

Rejected: a fixed window of 2. Over a line of 100 ms a replica that needs 10 ms a request idles four fifths of its time.
"""

from __future__ import annotations

import math

SMALLEST, LARGEST = 1, 16
"""Bounds of a measured window, in requests."""
FIRST = 2
"""What a replica starts with: one in work, one waiting. One that comes back after a failure starts with SMALLEST."""

_FEWEST_QUEUED, _MOST_QUEUED = 1.5, 3.0
_REMEMBERED_S = 30.0  # the least latency, at least for so long,
_REMEMBERED_ANSWERS = 100  # and over so many answers: finding it again costs a round of few requests
_SMOOTH = 0.25  # weight of the newest latency


class Window:
    """The window of one replica. Not locked: its owner's business."""

    def __init__(self, fixed: int = 0, first: int = FIRST) -> None:
        """Start at `first`, or stay at `fixed` for ever where that is not 0."""
        self._fixed = fixed
        self._wide = float(fixed or first)
        self._least_s = math.inf
        self._latency_s = 0.0
        self._usual_rows = 0
        self._largest_rows = 0
        self._since = 0.0
        self._num_answers = 0
        self._to_probe = 0

    @property
    def size(self) -> int:
        """Requests that may be under way now."""
        if self._to_probe and not self._fixed:
            return min(int(self._wide), FIRST)
        return int(self._wide)

    def answered(self, latency_s: float, num_rows: int, num_under_way: int, now: float) -> None:
        """Learn from an answer.

        Args:
            latency_s: from sending it to having it.
            num_rows: of the request. Those of much smaller ones than usual say nothing about usual ones.
            num_under_way: requests that this replica had when it was sent, itself included.
            now: time.monotonic().
        """
        self._largest_rows = max(self._largest_rows, num_rows)
        if self._fixed or 4 * num_rows < 3 * max(self._usual_rows, self._largest_rows):
            return
        self._num_answers += 1
        self._since = self._since or now
        if self._to_probe:
            self._to_probe -= 1
            if num_under_way <= FIRST:
                self._least_s = min(self._least_s, latency_s)
            return
        self._least_s = min(self._least_s, latency_s)
        self._latency_s += (latency_s - self._latency_s) * (_SMOOTH if self._latency_s else 1.0)
        self._adapt(num_under_way)
        if self._num_answers >= _REMEMBERED_ANSWERS and now - self._since > _REMEMBERED_S:
            self._forget(now)

    def refused(self) -> None:
        """It is busy with others: half of it is enough for a start."""
        if not self._fixed:
            self._wide = max(float(SMALLEST), self._wide / 2)

    def _adapt(self, num_under_way: int) -> None:
        queued = self._wide * (1 - self._least_s / max(self._latency_s, self._least_s, 1e-9))
        if queued > _MOST_QUEUED:
            self._wide = max(float(SMALLEST), self._wide - 1 / self._wide)
        elif queued < _FEWEST_QUEUED and num_under_way >= int(self._wide):  # else it was not the window's doing
            self._wide = min(float(LARGEST), self._wide + 1 / self._wide)

    def _forget(self, now: float) -> None:
        self._since, self._num_answers = now, 0
        self._usual_rows, self._largest_rows = self._largest_rows, 0
        self._to_probe = int(self._wide) + FIRST  # those under way now, and one small round
        self._least_s, self._latency_s = math.inf, 0.0
