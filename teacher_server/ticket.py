"""One request's place among those that the model shall answer, and all that can become of it.

Who runs when is the batcher's business (batcher.py). Here is what a handler's thread holds in its hand.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from teacher_server.batcher import Batcher

P = TypeVar("P")


class OverloadedError(Exception):
    """No room for more rows now."""

    def __init__(self, sentence: str, retry_after_s: float) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class ClosedError(Exception):
    """The batcher is closing and takes nothing new, or has closed before it came to this."""


class DeviceError(Exception):
    """A model raises this when no later batch can go better: its device is broken. The sentence says how."""


class WithdrawnError(Exception):
    """Whoever asked does not wait any more."""


class ModelError(Exception):
    """The model failed on a batch that held rows of this ticket; its cause says how."""


class Ticket(Generic[P]):
    """One request's place. Use as a context: leaving it gives the place back, whatever happened.

    submit, result and the context belong to one thread; withdraw may be called from any.
    """

    def __init__(self, batcher: Batcher[P], num_rows: int, client: str) -> None:
        self.num_rows = num_rows
        self.client = client
        self._batcher = batcher
        self._settled = threading.Event()
        self._error: Exception | None = None
        self._answers: list[NDArray[np.float32]] = []
        self._payload: P | None = None
        self._submitted = 0.0
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
        self._submitted = time.monotonic()
        self._batcher._enqueue(self)

    def result(self) -> NDArray[np.float32]:
        """Wait for the answers: [R, K] float32.

        Raises:
            ModelError: the model failed on rows of this ticket.
            ClosedError: the batcher was told to abandon everything first.
            WithdrawnError: withdraw was called first.
        """
        self._settled.wait()
        self.check()
        return self._answers[0] if len(self._answers) == 1 else np.concatenate(self._answers)

    def withdraw(self) -> None:
        """Nobody waits any more: rows that have not been launched never will be."""
        self._settle(WithdrawnError("nobody waits for this request any more"))

    def check(self) -> None:
        """Raise what result would raise already: nothing more needs to be done for this ticket."""
        if self._error is not None:
            raise self._error

    @property
    def settled(self) -> bool:
        """Whether result would return or raise at once."""
        return self._settled.is_set()

    def _settle(self, error: Exception | None) -> None:
        with self._batcher._changed:
            if not self._settled.is_set():
                self._error = error
                self._settled.set()
