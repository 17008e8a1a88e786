"""The server's log: one line per event, on standard error. Text is a name and a JSON object, json one object a line.

A flood of refusals must not fill a disk: `repeated` writes one line a second of each kind, with the count of those
that it left out. What the libraries say (gRPC, torch, Python's warnings) goes the same way.

Rejected: a logging library. The standard one does all of it with one formatter.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

Format = Literal["text", "json"]

_log = logging.getLogger("teacher_server")

_LONGEST_TEXT = 2000  # characters of one field: names and sentences may quote what a caller sent


def set_up(style: Format = "text") -> None:
    """Send this process's log to standard error. May be called again with another style."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s") if style == "text" else _Json())
    root = logging.getLogger()
    for earlier in [one for one in root.handlers if isinstance(one, _Stderr)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


def event(name: str, **fields: Any) -> None:
    """Something happened."""
    _write(logging.INFO, name, fields)


def failure(name: str, **fields: Any) -> None:
    """Something happened that is our mistake; call it while handling the exception, whose trace is added."""
    _write(logging.ERROR, name, fields, trace=True)


def _write(level: int, name: str, fields: dict[str, Any], *, trace: bool = False) -> None:
    fields = {key: _shortened(value) for key, value in fields.items()}
    text = json.dumps(fields, ensure_ascii=False, default=str)
    _log.log(level, "%s %s", name, text, exc_info=trace, extra={"event": name, "fields": fields})


def _shortened(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return f"{value[:_LONGEST_TEXT]}... ({len(value)} characters)"
    return value


class _Stderr(logging.StreamHandler[TextIO]):
    """Ours, to know it again."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)


class _Json(logging.Formatter):
    """A record as one JSON object: time, level, event, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _utc(record.created), "level": record.levelname, "event": getattr(record, "event", "log")}
        if hasattr(record, "fields"):
            line |= record.fields
        else:
            line |= {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # ASCII: no line separator of Unicode splits it


def _utc(seconds: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1000):03d}Z"


@dataclass(slots=True)
class _Kind:
    written: float
    left_out: int = 0
    name: str = ""
    last: dict[str, Any] = field(default_factory=dict)


class Repeated:
    """Events of which there may be thousands a second. Thread-safe."""

    def __init__(
        self, interval_s: float = 1.0, max_kinds: int = 256, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take how often one kind is written, how many kinds are told apart, and a clock in seconds."""
        self._interval_s = interval_s
        self._max_kinds = max_kinds
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, ...], _Kind] = {}

    def event(self, name: str, kind: tuple[str, ...], *, failed: bool = False, **fields: Any) -> None:
        """Write it, unless one of its kind was written less than an interval ago; then count it.

        failed: it is our mistake, and an exception is being handled.
        """
        now = self._clock()
        with self._lock:
            if kind not in self._kinds and len(self._kinds) >= self._max_kinds:
                kind = ("(others)",)
            known = self._kinds.get(kind)
            if known is not None and now - known.written < self._interval_s:
                known.left_out += 1
                known.name, known.last = name, fields
                return
            left_out = 0 if known is None else known.left_out
            self._kinds[kind] = _Kind(now)
        _write(logging.ERROR if failed else logging.INFO, name, fields | _count(left_out), trace=failed)

    def flush(self) -> None:
        """Write the last one of each kind that was left out, once its interval is over; forget kinds that rest."""
        now = self._clock()
        with self._lock:
            over = {kind: known for kind, known in self._kinds.items() if now - known.written >= self._interval_s}
            for kind, known in over.items():
                if known.left_out:
                    self._kinds[kind] = _Kind(now)
                else:
                    del self._kinds[kind]
        for known in over.values():
            if known.left_out:
                event(known.name, **known.last, **_count(known.left_out - 1))


def _count(left_out: int) -> dict[str, int]:
    return {"left_out": left_out} if left_out else {}
