"""How a replica is spoken to: in clear, or through TLS with its certificate checked and perhaps our own shown; a token.

What the server checks is its own business (teacher_server). The files are read again for each connection, and the
token whenever its file changes: renewed ones are taken up while the run goes on.

A token goes out as per-call credentials of gRPC's, which it never sends in clear. To a unix socket or the loopback it
may go without TLS, as metadata: what can listen there can read the file as well. Rejected for those: gRPC's local
credentials, which refuse tokens over the loopback.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from student_trainer.fleet.addresses import Place

MAX_MESSAGE_BYTES = 256 * 2**20
"""Largest request or answer: 256 MiB, as the server has it."""

_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A teacher that was killed and started again is found within a second, not after two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    # A host that vanishes without a word is noticed after 40 s, whatever the deadline. The server allows 15 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


class Token:
    """The first line of a file, read again when the file changes."""

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            ValueError: there is no such file, or no token in it.
        """
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._words = ""
        self.read()

    def read(self) -> str:
        """The token now.

        Raises:
            ValueError: there is no such file, or no token in it.
        """
        try:
            state = self._path.stat()
            if (state.st_mtime_ns, state.st_size) != self._seen:
                words = self._path.read_text(encoding="ascii").split()
                if not words:
                    raise ValueError(f"{self._path} (--teacher.token-file) holds no token")
                self._words, self._seen = words[0], (state.st_mtime_ns, state.st_size)
        except OSError as error:
            raise ValueError(f"cannot read {self._path} (--teacher.token-file): {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path} (--teacher.token-file) holds no token: it is not plain text") from error
        return self._words


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Files that say who the teachers are, and who we are; by default nothing, for teachers on this machine."""

    ca: Path | None = None
    """Certificate of who signs the teachers' (PEM); with it, TLS."""
    cert: Path | None = None
    """Our certificate (PEM), for teachers that want to see one."""
    key: Path | None = None
    """Its key (PEM)."""
    name: str = ""
    """The name in the teachers' certificates, where it is not the one they are called by."""
    token: Token | None = None
    """What every call shows."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("--teacher.tls-cert and --teacher.tls-key belong together: give both, or neither")
        if self.cert is not None and self.ca is None:
            raise ValueError(
                "--teacher.tls-cert needs --teacher.tls-ca: the teachers' own certificates are checked too"
            )
        self._tls()

    def channel(self, place: Place) -> grpc.Channel:
        """A connection to a replica.

        Raises:
            ValueError: a file is not what it should be, or the token would cross a network in clear.
        """
        options = [*_OPTIONS]
        if place.stays_here:
            options.append(("grpc.enable_http_proxy", 0))  # to itself a machine needs no proxy
        if self.ca is None:
            if self.token is not None and not place.stays_here:
                raise ValueError(
                    f"the token would cross the network to {place.target} in clear: give the certificate of the "
                    "teachers' authority by --teacher.tls-ca, or leave out --teacher.token-file"
                )
            return grpc.insecure_channel(place.target, options=options)
        if name := self.name or place.name:
            options.append(("grpc.ssl_target_name_override", name))
        how = self._tls()
        if self.token is not None:
            how = grpc.composite_channel_credentials(how, grpc.metadata_call_credentials(_Shown(self.token)))
        return grpc.secure_channel(place.target, how, options=options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call in clear shows; through TLS the channel does it."""
        if self.token is None or self.ca is not None:
            return ()
        return (("authorization", f"Bearer {self.token.read()}"),)

    def hint(self, details: str) -> str:
        """What an UNAVAILABLE may mean that gRPC says in its own words only; "" if nothing comes to mind."""
        # The other side ended the connection before it was one. Torn later, it is a teacher that died.
        torn = ("Socket closed", "Connection reset", "End of TCP stream", "tcp handshaker shutdown")
        hung_up = "failed to connect" in details and any(words in details for words in torn)
        if self.ca is None:
            return " (does it want TLS? --teacher.tls-ca)" if hung_up else ""
        if "CERTIFICATE_VERIFY_FAILED" in details:
            return " (its certificate is not of --teacher.tls-ca, or out of date)"
        if "Hostname Verification Check failed" in details or "Peer name" in details:
            return " (its certificate has another name: --teacher.tls-name)"
        if "WRONG_VERSION_NUMBER" in details:
            return " (it does not speak TLS: leave out --teacher.tls-ca, or give it --tls-cert)"
        if hung_up and self.cert is None:
            return " (does it want a certificate of ours? --teacher.tls-cert)"
        return ""

    def _tls(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            _pem(self.ca, "--teacher.tls-ca"),
            _pem(self.key, "--teacher.tls-key"),
            _pem(self.cert, "--teacher.tls-cert"),
        )


class _Shown(grpc.AuthMetadataPlugin):
    """Adds the token to each call of a TLS channel."""

    def __init__(self, token: Token) -> None:
        self._token = token

    def __call__(self, _context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        try:
            callback((("authorization", f"Bearer {self._token.read()}"),), None)
        except ValueError as error:
            callback((), error)


def _pem(path: Path | None, flag: str) -> bytes | None:
    if path is None:
        return None
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path} ({flag}): {error.strerror}") from error
    if b"-----BEGIN " not in text:
        raise ValueError(f"{path} ({flag}) is no PEM file: it has no line that begins with -----BEGIN")
    return text
