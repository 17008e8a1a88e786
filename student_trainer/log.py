"""How this program's log lines look: text for people, or one JSON object a line for whoever collects logs.

What is logged, and how loud, is said where it happens. `extra={"request_id": ...}` puts a request's id into a field of
its own: the teacher's log has the same (teacher_server/events.py).

Rejected: sharing the formatter with the teacher. The two programs never import each other, and it is ten lines.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal

Style = Literal["text", "json"]


def set_up(style: Style, rank: int = 0) -> None:
    """Send this process's log to standard error; Python's warnings too."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_Json(rank) if style == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)


class _Json(logging.Formatter):
    """time, level, rank, logger, message; request_id where there is one."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": when, "level": record.levelname, "rank": self._rank, "logger": record.name,
                "message": record.getMessage()}  # fmt: skip
        if hasattr(record, "request_id"):
            line["request_id"] = record.request_id
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)
