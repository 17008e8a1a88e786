"""What a program writes to a terminal, as a picture (.svg): lines that scroll, and a view that is drawn over itself.

Understood is what rich's live view and a log need: a line's begin, the line above, erasing a line, colours. Rejected:
pyte. It is a whole terminal, and forgets nothing of the colours either, but is one more dependency for one picture.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

_PIECE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+")
_HALF = re.compile(r"\x1b(\[[0-9;?]*)?$")
_FONTS = re.compile(r"@font-face \{\{.*?\}\}\s*", re.S)


class Screen:
    """The lines of a terminal, with the colours that they were written in."""

    def __init__(self) -> None:
        self.lines = [""]
        """As they are now."""
        self._row = 0
        self._begins_anew = False
        self._erases = False
        self._half = ""
        self.whole: list[str] = []
        """The lines before a view in them began to be drawn anew: never half a view."""

    def feed(self, text: str) -> None:
        """Take in what was written next."""
        text = self._half + text
        half = _HALF.search(text)
        self._half = half[0] if half else ""
        for piece in _PIECE.findall(text.removesuffix(self._half)):
            self._take(piece)

    def _take(self, piece: str) -> None:
        if piece == "\r":
            self._begins_anew = True
        elif piece == "\n":
            self._row += 1
            if self._row == len(self.lines):
                self.lines.append("")
        elif piece == "\x1b[1A":
            self._row = max(0, self._row - 1)
        elif piece == "\x1b[2K":
            if not self._erases:
                self.whole = self.lines[:]
            self._erases, self.lines[self._row] = True, ""
        elif not piece.startswith("\x1b") or piece.endswith("m"):
            if self._erases:
                del self.lines[self._row + 1 :]
            self._erases = False
            self.lines[self._row] = piece if self._begins_anew else self.lines[self._row] + piece
            self._begins_anew = False


def plain(lines: Sequence[str]) -> str:
    """Lines without their colours."""
    return "\n".join(Text.from_ansi(line).plain for line in lines)


@contextlib.contextmanager
def running(command: Sequence[str], width: int, height: int, environment: Mapping[str, str]) -> Iterator[Watched]:
    """A program in a terminal of its own; ended with the `with`, if it has not by itself."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    terminal = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": str(width), "LINES": str(height)}
    process = subprocess.Popen(
        command, env={**environment, **terminal}, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    try:
        yield Watched(process, master)
    finally:
        process.terminate()
        process.wait()
        os.close(master)


class Watched:
    """A program, and its screen."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self._process, self._master = process, master
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.screen = Screen()

    def goes_on(self) -> bool:
        """Wait for what it writes next; False when it has ended."""
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # its end of the terminal is closed
            data = b""
        self.screen.feed(self._decoder.decode(data))
        return bool(data)

    def end(self) -> int:
        """Its exit code, after its end."""
        return self._process.wait()


def photograph(lines: Sequence[str], path: Path, width: int, title: str) -> None:
    """Write the lines as an SVG that asks nobody for a font."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in lines:
        text = Text.from_ansi(line)
        for part in text.divide(range(width, len(text), width)):  # in the middle of a word, as terminals do
            console.print(part, no_wrap=True, overflow="crop", highlight=False, markup=False)
    drawing = console.export_svg(title=title, code_format=_FONTS.sub("", CONSOLE_SVG_FORMAT))
    path.write_text(drawing, encoding="utf-8")
