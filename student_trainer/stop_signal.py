"""How a run is told to stop: a flag that the loop looks at, and teachers that must not keep it waiting."""

from __future__ import annotations

import signal
from typing import Any

from student_trainer.fleet import Fleet

_HURRY_S = 5.0  # a run that was told to stop waits for its teachers no longer than this


class StopSignal:
    """SIGTERM and SIGINT ask for a checkpoint and an end; the second one ends at once."""

    def __init__(self) -> None:
        self.received = False
        self.hurried: set[Fleet] = set()
        """Who must not keep the run waiting any more, then."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: Any) -> None:
        self.received = True
        for fleet in self.hurried:
            fleet.hurry(_HURRY_S)
        signal.signal(number, signal.SIG_DFL)
