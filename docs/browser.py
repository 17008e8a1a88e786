"""Debian's (or any) Chromium without a window, driven by Playwright: pages as a reader's browser shows them.

For the pictures of the documentation and for tests of the pages that we write; it opens nothing but those, so it needs
no sandbox, which containers lack. Rejected: the browser that Playwright downloads, another 150 MB beside the machine's.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_QUIET = (
    "--no-sandbox",
    # Chromium asks its makers for news of itself, whatever it is told; it finds nobody.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)


def installed() -> str | None:
    """The browser's program, if there is one on this machine."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that lives as long as the `with`, in a profile of its own.

    Raises:
        FileNotFoundError: there is none on this machine.
    """
    program = installed()
    if program is None:
        raise FileNotFoundError("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=program, args=_QUIET) as browser:
        yield browser
