"""Files with secrets that may change while the server runs: has one changed, and who may read it?

Not here: what is in them (tls.py, tokens.py).

Rejected: inotify. It loses sight of a file that is replaced through a link, which is how Kubernetes renews a secret.
"""

from __future__ import annotations

import stat
from pathlib import Path

from teacher_server import events

Stamp = tuple[int, int, int] | None


def stamp(file: Path) -> Stamp:
    """What differs when the file does; None: it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def warn_if_public(file: Path) -> None:
    """Say so where every user of this machine may read a secret."""
    if file.exists() and file.stat().st_mode & stat.S_IROTH:
        events.event("secret_readable_by_all", file=str(file), cure=f"chmod o-r {file}")
