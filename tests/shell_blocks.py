"""The shell blocks of a page, and the commands that bash would run of them; none of them is run.

A page is one session, as for a reader who goes through it: variables that are exported stay. Bash itself takes the text
apart, so quotes, loops and $(...) are what they are; every program in it is replaced by a function that notes its
arguments. Rejected: splitting lines with shlex, which knows no loop and no variable.

Not here: whether a command is right (page_commands.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SHELL = ("", "bash", "sh")
"""Languages of a fenced block that a reader types. One that is none of these says so: ```text, ```yaml, ..."""

_FENCE = re.compile(
    r'^(?P<fence>```+)(?P<language>\w*)(?: title="(?P<title>[^"]*)")?\n(?P<text>.*?)^(?P=fence)$', re.M | re.S
)
_ANSWER = "healthy"  # what every program prints: the one word that a loop of docs/deployment.md waits for


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block."""

    language: str
    title: str
    text: str
    line: int
    """Of its first line in the page."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One program with its arguments, as bash would run it."""

    argv: tuple[str, ...]
    line: int
    """Of its block's first line in the page."""
    compose_files: tuple[str, ...] = ()
    """What COMPOSE_FILE named when it ran."""

    def __str__(self) -> str:
        return f"line {self.line}: {' '.join(self.argv)}"


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a page's blocks do."""

    commands: tuple[Command, ...]
    code: int
    """Bash's exit code: not 0 where it could not read a block, or found no such file as .venv/bin/NAME."""
    stderr: str
    env: str
    """What was written into .env."""


def blocks(markdown: str) -> list[Block]:
    """All fenced blocks of a page."""
    return [
        Block(
            language=found["language"],
            title=found["title"] or "",
            text=found["text"],
            line=markdown.count("\n", 0, found.start()) + 2,
        )
        for found in _FENCE.finditer(markdown)
    ]


def shell_blocks(markdown: str) -> list[Block]:
    """Those that a reader types."""
    return [block for block in blocks(markdown) if block.language in SHELL]


def session(typed: Sequence[Block], folder: Path) -> Session:
    """What bash would run of these blocks, one after the other, in a folder that is ours."""
    notes = folder / "notes"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    script = [_stubs(), f"NOTES={notes}", "PATH=/nowhere", "set -eu"]
    for block in typed:
        script += [f"LINE={block.line}", block.text]
    environment = {"HOME": str(folder), "PATH": os.environ["PATH"]}
    run = subprocess.run(
        ["bash", "--norc", "--noprofile", "-c", "\n".join(script)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    written = folder / ".env"
    return Session(
        commands=tuple(_noted(notes.read_text())) if notes.exists() else (),
        code=run.returncode,
        stderr=run.stderr,
        env=written.read_text() if written.exists() else "",
    )


def _stubs() -> str:
    """Functions in place of programs: one for all names, and one for each file that is run by its path."""
    programs = (Path(sys.prefix) / "bin").iterdir()  # .venv's, by whatever name the tests run in it
    by_path = [f".venv/bin/{file.name}" for file in programs if os.access(file, os.X_OK)]
    by_path += [str(file.relative_to(ROOT)) for file in ROOT.glob("*/*.sh") if os.access(file, os.X_OK)]
    note = (
        "command_not_found_handle() { "
        'printf "%s\\0" "$LINE" "${COMPOSE_FILE:-}" "$#" "$@" >> "$NOTES"; '
        f"echo {_ANSWER}; }}"
    )
    return "\n".join([note, *(f'{name}() {{ command_not_found_handle {name} "$@"; }}' for name in by_path)])


def _noted(notes: str) -> list[Command]:
    fields, commands = notes.split("\0")[:-1], []
    while fields:
        line, files, number = int(fields[0]), fields[1], int(fields[2])
        commands.append(
            Command(argv=tuple(fields[3 : 3 + number]), line=line, compose_files=tuple(filter(None, files.split(":"))))
        )
        fields = fields[3 + number :]
    return commands
