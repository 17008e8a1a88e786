"""Chromium without a window: pages as a reader's browser shows them, and what they ask of the network.

Spoken to over two pipes in the DevTools protocol, one JSON object a message. For the pictures of the documentation and
for tests of the pages that we write; it opens nothing but those, so it needs no sandbox, which containers lack.

Rejected: Playwright and Selenium. Each brings a driver of its own for the ten messages that are needed here.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--mute-audio",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-extensions",
    "--disable-sync", "--disable-dev-shm-usage", "--force-color-profile=srgb", "--remote-debugging-pipe",
    # Chromium asks its makers for news of itself, whatever it is told; it finds nobody.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)  # fmt: skip
_ANSWER_S = 60.0


def installed() -> str | None:
    """The browser's program, if there is one on this machine."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


class BrowserError(Exception):
    """The browser ended, was silent, or refused what was asked."""


@dataclass
class Heard:
    """What a page did."""

    requests: list[str] = field(default_factory=list)
    """Everything it asked for, itself first."""
    complaints: list[str] = field(default_factory=list)
    """What its console says: errors and warnings."""
    is_loaded: bool = False


class Browser:
    """A browser that lives as long as the `with`, in a profile of its own."""

    def __init__(self, *options: str) -> None:
        """Say how to start it.

        Args:
            options: further switches of Chromium's command line.
        """
        self._options = options
        self._asked = 0
        self._unread = b""
        self._heard: dict[str, Heard] = {}
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        program = installed()
        if program is None:
            raise BrowserError("no Chromium on this machine: apt-get install chromium")
        profile = self._closing.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        command = [program, *_QUIET, f"--user-data-dir={profile}", *self._options]
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        # The browser reads from descriptor 3 and writes to 4: a shell puts them there.
        shell = f'exec "$@" 3</dev/fd/{theirs_in} 4>/dev/fd/{theirs_out}'
        self._process = subprocess.Popen(
            ["sh", "-c", shell, "sh", *command], pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._closing.callback(self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def _stop(self) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(timeout=10)
        except (BrowserError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            os.close(self._to)
            os.close(self._from)

    def open(self, address: str, width: int = 1280, height: int = 800, scale: float = 1.0, dark: bool = False) -> Page:
        """Open a page and wait until it and everything it asks for is there.

        Args:
            address: its URL.
            width: of the window, CSS pixels.
            height: likewise.
            scale: pixels of a picture for one CSS pixel.
            dark: whether the reader prefers dark pages.
        """
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = Page(self, session, target)
        self._heard[session] = page.heard
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.resize(width, height, scale)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", {"features": [scheme]})
        page.go(address)
        return page

    def call(self, method: str, params: dict[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        """One command of the protocol, and its answer."""
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": params or {}}
        os.write(self._to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        deadline = time.monotonic() + _ANSWER_S
        while True:
            answer = self._next(deadline)
            if answer is None:
                raise BrowserError(f"no answer to {method} in {_ANSWER_S:g} s")
            if answer.get("id") == self._asked:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    def hear(self, until: float) -> bool:
        """Take in one event; False if none comes until then (time.monotonic)."""
        return self._next(until) is not None

    def _next(self, deadline: float) -> dict[str, Any] | None:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            data = os.read(self._from, 1 << 20)
            if not data:
                raise BrowserError("the browser has ended")
            self._unread += data
        message, _, self._unread = self._unread.partition(b"\0")
        read: dict[str, Any] = json.loads(message)
        if heard := self._heard.get(read.get("sessionId", "")):
            _note(heard, read.get("method", ""), read.get("params", {}))
        return read


def _note(heard: Heard, event: str, params: dict[str, Any]) -> None:
    match event:
        case "Network.requestWillBeSent":
            heard.requests.append(params["request"]["url"])
        case "Network.webSocketCreated":
            heard.requests.append(params["url"])
        case "Page.loadEventFired":
            heard.is_loaded = True
        case "Runtime.exceptionThrown":
            heard.complaints.append(params["exceptionDetails"].get("text", "an exception"))
        case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
            heard.complaints.append(" ".join(str(one.get("value", "")) for one in params["args"]))
        case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
            heard.complaints.append(params["entry"]["text"])


class Page:
    """A page in a browser."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target
        self.heard = Heard()

    def call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """One command of the protocol to this page."""
        return self._browser.call(method, params, self._session)

    def go(self, address: str) -> None:
        """Go to an address."""
        self.heard.is_loaded = False
        failed = self.call("Page.navigate", {"url": address}).get("errorText")
        if failed:
            raise BrowserError(f"{address}: {failed}")
        deadline = time.monotonic() + _ANSWER_S
        while not self.heard.is_loaded:
            if not self._browser.hear(deadline):
                raise BrowserError(f"{address} is not there after {_ANSWER_S:g} s")

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Give the window another size, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", size)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript; of a promise, what it comes to."""
        wanted = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", wanted)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 30.0) -> None:
        """Wait until an expression of JavaScript is true."""
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise BrowserError(f"after {timeout_s:g} s there is still not: {expression}")
            while self._browser.hear(time.monotonic() + 0.1):
                pass

    def picture(self, path: Path | None = None, height: int | None = None) -> bytes:
        """The page as a PNG, whole, or so many CSS pixels of it from its top; also written to a file."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        wanted = {"format": "png", "clip": clip, "captureBeyondViewport": True}
        data = base64.b64decode(self.call("Page.captureScreenshot", wanted)["data"])
        if path:
            path.write_bytes(data)
        return data

    def close(self) -> None:
        """Close it."""
        self._browser.call("Target.closeTarget", {"targetId": self._target})
