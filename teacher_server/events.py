"""The server's log: one line per event, a name and a JSON object, on standard error."""

from __future__ import annotations

import json
import logging
from typing import Any

_log = logging.getLogger("teacher_server")


def set_up() -> None:
    """Send this process's log to standard error, one line each."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)


def event(name: str, **fields: Any) -> None:
    """Something happened."""
    _log.info("%s %s", name, json.dumps(fields, ensure_ascii=False, default=str))


def failure(name: str, **fields: Any) -> None:
    """Something happened that is our mistake; call it while handling the exception, whose trace is added."""
    _log.exception("%s %s", name, json.dumps(fields, ensure_ascii=False, default=str))
