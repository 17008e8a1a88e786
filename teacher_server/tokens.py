"""The token that callers show: `authorization: Bearer TOKEN` with every call.

A file holds the accepted tokens, one a line, so that a new one can be accepted before the old one is withdrawn. The
file is looked at with every call and read again when it has changed; a file that became unusable changes nothing.

Health checks need no token: probes have none. Everything else does, Describe and reflection too, and health *watches*,
which stay open. Whoever has no token is never listened to and holds nothing here: a check is answered, and a refusal
given, before its message is read.

Not here: TLS (tls.py), without which a token can be read on its way (config.py refuses that off the loopback).

Rejected: signed tokens with an expiry (JWT). Someone would have to issue and renew them; a line in a file is changed by
whatever renews the other secrets.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from teacher_server import events
from teacher_server.events import Repeated
from teacher_server.watched_file import stamp, warn_if_public

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_CHECK = "/grpc.health.v1.Health/Check"
_MIN_CHARACTERS = 16
_SCHEME = "bearer "


class Tokens:
    """The accepted tokens of a file, as it is now."""

    def __init__(self, file: Path) -> None:
        """Read the file.

        Raises:
            ValueError: it cannot be read, is empty, or holds a line that is no good token. Never says which token.
        """
        self._file = file
        self._lock = threading.Lock()
        self._stamp = stamp(file)
        self._digests = _read(file)
        warn_if_public(file)

    def accept(self, token: str) -> bool:
        """Whether this is one of them; every wrong one takes as long."""
        self._look_again()
        shown = _digest(token)
        return any(hmac.compare_digest(shown, digest) for digest in self._digests)

    def _look_again(self) -> None:
        now = stamp(self._file)
        if now == self._stamp:
            return
        with self._lock:
            if now == self._stamp:
                return
            self._stamp = now
            try:
                self._digests = _read(self._file)
            except ValueError as error:
                events.event("tokens_not_renewed", reason=str(error))
            else:
                events.event("tokens_renewed", file=str(self._file), accepted=len(self._digests))


class TokenGuard(grpc.ServerInterceptor):
    """Lets calls with an accepted token pass; all others get UNAUTHENTICATED, before their message is read."""

    def __init__(self, tokens: Tokens, health: HealthServicer, log: Repeated, count: Callable[[str], None]) -> None:
        """Take the tokens, who knows the health, where refusals are logged, and what counts them by status."""
        self._tokens = tokens
        self._log = log
        self._count = count
        self._health: _Handler = grpc.stream_unary_rpc_method_handler(
            # The server's, whatever name was asked for: a message from a stranger may have 256 MiB, or never end.
            lambda _messages, context: health.Check(HealthCheckRequest(), context),
            response_serializer=HealthCheckResponse.SerializeToString,
        )

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], _Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Decide by the call's name and its metadata."""
        shown = [value for key, value in handler_call_details.invocation_metadata if key == "authorization"]
        if any(self._knows(value) for value in shown):
            return continuation(handler_call_details)
        if handler_call_details.method == _CHECK:
            return self._health
        if shown:
            return self._refusal("this teacher does not know the token (--teacher.token-file)")
        return self._refusal("this teacher wants a token: send `authorization: Bearer TOKEN` (--teacher.token-file)")

    def _knows(self, shown: str | bytes) -> bool:
        if not isinstance(shown, str) or shown[: len(_SCHEME)].lower() != _SCHEME:
            return False
        return self._tokens.accept(shown[len(_SCHEME) :])

    def _refusal(self, sentence: str) -> _Handler:
        def refuse(_messages: Iterator[bytes], context: grpc.ServicerContext) -> None:
            code = grpc.StatusCode.UNAUTHENTICATED
            self._count(code.name)
            self._log.event("refused", (code.name,), peer=context.peer(), code=code.name, reason=sentence)
            context.abort(code, sentence)

        # For streams: a handler of one message would be called when all of that is there.
        return grpc.stream_stream_rpc_method_handler(refuse)


def _read(file: Path) -> tuple[bytes, ...]:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError:
        raise ValueError(
            f"{file} (--token-file) holds characters that are not ASCII; a token is sent as it is"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot read {file} (--token-file): {error.strerror}") from error
    tokens = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not tokens:
        raise ValueError(f"{file} (--token-file) holds no token: write one a line, for instance `openssl rand -hex 32`")
    for number, token in tokens:
        if len(token) < _MIN_CHARACTERS or not token.isprintable() or " " in token:
            raise ValueError(
                f"line {number} of {file} (--token-file) is no token: {len(token)} characters; it needs "
                f"{_MIN_CHARACTERS} or more, printable and without spaces"
            )
    return tuple(_digest(token) for _, token in tokens)


def _digest(token: str) -> bytes:
    """Of the same length for every token, so that comparing tells nothing about one's length either."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
