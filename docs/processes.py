"""Programs that run beside the one that photographs them: where they listen, when they answer, and that they end."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator

import requests

_EVERY_S = 0.2


def free_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A process that ends with the `with`."""
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def answers(address: str, timeout_s: float = 90.0) -> None:
    """Wait until something answers there."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            requests.get(address, timeout=5).raise_for_status()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_EVERY_S)
