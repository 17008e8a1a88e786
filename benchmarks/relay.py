"""A TCP relay that counts: what really crosses a connection, HTTP/2's frames included, TCP's and IP's headers not.

Rejected: the kernel's count of the loopback, which has everybody's traffic.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class Relay:
    """Passes connections on to an address, and counts their bytes."""

    def __init__(self, to: str) -> None:
        host, _, port = to.rpartition(":")
        self._to = host, int(port)
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._door.getsockname()[1]}"
        """To be asked in its place."""
        self.up = 0
        """Bytes that clients sent."""
        self.down = 0
        """Bytes that they got."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._door.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._door.accept()
                server = socket.create_connection(self._to)
                for source, sink, up in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pass_on, args=(source, sink, up), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with source, contextlib.suppress(OSError):
            while data := source.recv(2**16):
                if up:  # each by one thread alone
                    self.up += len(data)
                else:
                    self.down += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def relay(to: str) -> Iterator[Relay]:
    """A relay for a while."""
    one = Relay(to)
    try:
        yield one
    finally:
        one.close()
