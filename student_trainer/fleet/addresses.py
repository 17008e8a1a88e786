"""Where the replicas of a teacher are: what was typed, and what the name service makes of it while the run goes on.

    host:port, unix:/path     one replica, where it is
    dns:///name:port          all that the name stands for, looked up again every few seconds: replicas that are added
                              or removed (compose's --scale, a headless service of Kubernetes) come and go
    host:first-last           all ports of these at which somebody listens, likewise: replicas of one machine that get
                              their ports from a range (docker gives each new container the next one)

A name that says nothing now keeps what it said last: a name service that fails must not end a run whose teachers are
well, and those that are really gone say so themselves.

Rejected: gRPC's own resolver with round_robin. It looks a name up again only when a connection ends, and then at most
every 30 s: a replica that was added got nothing for as long as none of the others went.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

LOOK_UP_EVERY_S = 3.0
"""Between two look-ups of a name."""

_SCHEMES = ("dns:///", "dns:")
_MOST_PORTS = 256
_CONNECT_S = 1.0


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where one replica listens."""

    target: str
    """As gRPC takes it, and as it is called in logs: 10.0.0.3:50051, or unix:/path."""
    name: str = ""
    """The name that its certificate is for, where the target does not say it: a looked-up address is a number."""

    @property
    def stays_here(self) -> bool:
        """Whether what is sent there leaves this machine by no means: a unix socket, or the loopback."""
        if self.target.startswith("unix:"):
            return True
        host = self.target.rpartition(":")[0].strip("[]")
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


def look_up(name: str, port: str) -> frozenset[str]:
    """The addresses of a name now: its IPv4 ones, or else its IPv6 ones (one replica with both is one replica).

    Of several ports ("50051-50058"), those of this host at which somebody listens.

    Raises:
        OSError: the name stands for nothing, or nobody can say; nobody listens.
    """
    if "-" in port:
        return _listening(name, port)
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    numbers = {family: {str(where[0]) for kind, *_, where in found if kind == family} for family, *_ in found}
    if four := numbers.get(socket.AF_INET):
        return frozenset(f"{number}:{port}" for number in four)
    return frozenset(f"[{number}]:{port}" for number in numbers.get(socket.AF_INET6, ()))


def _listening(host: str, ports: str) -> frozenset[str]:
    first, last = map(int, ports.split("-"))
    found = []
    for port in range(first, last + 1):
        try:
            socket.create_connection((host.strip("[]"), port), timeout=_CONNECT_S).close()
        except OSError:
            continue
        found.append(f"{host}:{port}")
    if not found:
        raise OSError(errno.ECONNREFUSED, f"nobody listens at ports {ports}")
    return frozenset(found)


class Addresses:
    """What was typed; once watched, a thread keeps looking up the names among it."""

    def __init__(self, entries: Iterable[str]) -> None:
        """Read the entries.

        Raises:
            ValueError: there is none, or one cannot be an address.
        """
        entries = list(dict.fromkeys(entry.strip() for entry in entries))
        if not entries:
            raise ValueError("a teacher needs at least one address: --teacher HOST:PORT")
        self.fixed = frozenset(Place(entry) for entry in entries if name_and_port(entry) is None)
        """Places that were given as such."""
        self.names = tuple(entry for entry in entries if name_and_port(entry) is not None)
        """Entries to be looked up."""
        self._found: dict[str, frozenset[Place]] = {}
        self._closed = threading.Event()

    def places(self) -> frozenset[Place]:
        """All places known now."""
        return self.fixed.union(*self._found.values())

    def watch(
        self,
        on_change: Callable[[frozenset[Place]], None],
        hear: Callable[[str, str], None],
        look_up: Callable[[str, str], frozenset[str]] = look_up,
    ) -> None:
        """Look names up from now on, in a thread, until `close`.

        Args:
            on_change: called with all places when they have changed.
            hear: called with an entry and what is wrong with it.
            look_up: finds the addresses of (name, port); raises OSError.
        """

        def work() -> None:
            while True:
                before = self.places()
                for entry in self.names:
                    self._look_up(entry, hear, look_up)
                if self.places() != before:
                    on_change(self.places())
                if self._closed.wait(LOOK_UP_EVERY_S):
                    return

        if self.names:
            threading.Thread(target=work, name="addresses", daemon=True).start()

    def close(self) -> None:
        """Look nothing up any more."""
        self._closed.set()

    def _look_up(
        self, entry: str, hear: Callable[[str, str], None], look_up: Callable[[str, str], frozenset[str]]
    ) -> None:
        named = name_and_port(entry)
        assert named is not None
        try:
            found = frozenset(Place(target, name=named[0]) for target in look_up(*named))
        except OSError as error:
            keeps = "; what it stood for is kept" if entry in self._found else ""
            hear(entry, why_not(named[0], error) + keeps)
            return
        self._found[entry] = found
        hear(entry, "stands for " + ", ".join(sorted(place.target for place in found)))


def why_not(name: str, error: OSError) -> str:
    """What is to be said of a name that could not be looked up (look_up)."""
    words = error.strerror or str(error)
    return f"{name}: {words}" if error.errno == errno.ECONNREFUSED else f"{name} cannot be looked up: {words}"


def name_and_port(entry: str) -> tuple[str, str] | None:
    """What to look up (look_up), or None for a place as such.

    Raises:
        ValueError: it cannot be an address.
    """
    scheme = next((scheme for scheme in _SCHEMES if entry.startswith(scheme)), None)
    name, _, port = entry.removeprefix(scheme or "").rpartition(":")
    if scheme is not None:
        if not name or not port.isdigit():
            raise ValueError(f"{entry!r} needs a name and a port: dns:///NAME:PORT")
        return name, port
    if entry.startswith("unix:") or port.isdigit():
        return None
    first, _, last = port.partition("-")
    if name and first.isdigit() and last.isdigit():
        if not 0 <= int(last) - int(first) < _MOST_PORTS:
            raise ValueError(
                f"{entry!r} needs a first and a last port, {_MOST_PORTS} of them at most: HOST:50051-50058"
            )
        return name, port
    raise ValueError(
        f"{entry!r} is no address of a teacher: give HOST:PORT, HOST:FIRST-LAST, unix:/PATH or dns:///NAME:PORT"
    )
