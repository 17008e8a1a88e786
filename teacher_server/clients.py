"""Who asks, as far as fairness, logs and metrics are concerned: one name a client, and a bounded number of names.

A name is what the caller says it is. That is no proof, and a caller who invents names gets more than its share; the
bound says how much more. Who must not be trusted that far should not have a token (door and docs/security.md).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import unquote

MAX_NAME_BYTES = 64
MAX_NAMES = 64
"""Clients that are told apart at once; one beyond shares with all others beyond."""

OTHERS = "(others)"

_FORGOTTEN_S = 60.0


def host_of(peer: str) -> str:
    """The host in gRPC's name of a peer, such as ipv4:127.0.0.1:1234; the scheme alone for a unix socket."""
    scheme, _, rest = unquote(peer).partition(":")
    if not scheme.startswith("ipv"):
        return scheme or "unknown"
    return rest.rpartition(":")[0].strip("[]")


class Clients:
    """The names that are told apart now. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, float] = OrderedDict()  # the one seen longest ago first

    def name(self, said: str, peer: str) -> str:
        """Whom to count a request for: what it says, or its host; OTHERS when there are too many names already."""
        wanted = said or host_of(peer)
        now = self._clock()
        with self._lock:
            while self._seen and next(iter(self._seen.values())) < now - _FORGOTTEN_S:
                self._seen.popitem(last=False)
            if wanted not in self._seen and len(self._seen) >= MAX_NAMES:
                return OTHERS
            self._seen[wanted] = now
            self._seen.move_to_end(wanted)
            return wanted
