"""The door: `funmatch WORD ...`; `funmatch --help` lists the words, `funmatch WORD --help` explains one.

A word that is a room's becomes that room's own command, which is printed, and takes this process's place: exit codes,
signals and standard input are the room's. Words of this package (doctor, views, export, completion) are called here.

Mistakes are a sentence and an exit code that is not 0. FUNMATCH_TRACEBACK=1 in the environment adds the traceback.

Rejected: calling the rooms' mains in this process. Each reads sys.argv, handles signals and starts processes of its
own; what works by `python -m` would have to be kept working twice.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from funmatch.words import WORDS, Word

_WRONG = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Become the command that a word stands for, or say why not; returns an exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args:
        print(overview(), file=sys.stderr)
        return _WRONG
    name, rest = args[0], args[1:]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"funmatch {importlib.metadata.version('funmatch')}")
        return 0
    if name not in WORDS:
        return _wrong(f"no word of funmatch is called {name!r}{_nearest(name)}; `funmatch --help` lists them")
    return _open(name, WORDS[name], rest)


def _open(name: str, word: Word, rest: Sequence[str]) -> int:
    asks_help = bool({"-h", "--help"} & set(rest))
    if asks_help:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word, as it ends other commands
        print(explain(name, word), flush=True)
        if not word.says_more or (name == "train" and not _names_recipe(rest)):
            return 0
    if lacking := [package for package in word.needs if importlib.util.find_spec(package) is None]:
        return _lacks(name, word, lacking)
    if word.module.startswith("funmatch."):
        return _call(name, word, rest)
    try:
        command = train_command(rest) if name == "train" else [sys.executable, "-P", "-m", word.module, *rest]
    except ValueError as error:
        return _wrong(str(error))
    if asks_help and not sys.stdout.isatty():
        return _tell(command)
    if not asks_help:
        print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    return _become(command)


def _become(command: list[str]) -> NoReturn:
    os.execv(command[0], command)  # noqa: S606  (no shell is what we want)


def _tell(command: list[str]) -> int:
    """What it says, through this process: a Python that it became would answer a closed pipe with a traceback."""
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(said.stdout, end="", flush=True)
    return said.returncode


def overview() -> str:
    """The words in a line each."""
    lines = ["usage: funmatch WORD ...", "", "Knowledge distillation as function matching.", ""]
    lines += [f"  {name:12}{word.does}" for name, word in WORDS.items()]
    lines += ["", "`funmatch WORD --help` explains a word. First: funmatch doctor; then: funmatch train --recipe "
              "digits/demo --tiny"]  # fmt: skip
    return "\n".join(lines)


def explain(name: str, word: Word) -> str:
    """What a word does, units, defaults and an example."""
    parts = [f"funmatch {name}: {word.does}.", f"example: {word.example}", word.more]
    if word.module.startswith("funmatch."):
        return "\n\n".join(filter(None, parts)) + "\n"
    file = "torchrun student_trainer/main.py" if name == "train" else f"python -m {word.module}"
    return "\n\n".join(filter(None, [*parts, f"It runs `{file}`, and prints the command line that it runs."])) + "\n"


def train_command(args: Sequence[str]) -> list[str]:
    """The command line of a training run.

    Raises:
        ValueError: --processes is no number of processes.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--processes", default="1")
    try:
        asked, rest = parser.parse_known_args(args)
    except argparse.ArgumentError:
        raise ValueError("--processes needs a number: one for each GPU, or `gpu` for as many as there are") from None
    number = asked.processes
    script = _root() / "student_trainer" / "main.py"
    if number == "1":
        return [sys.executable, str(script), *rest]
    if number != "gpu" and not (number.isdecimal() and int(number) > 0):
        raise ValueError(f"--processes is {number!r}; give a number, 1 or more, or `gpu` for as many as there are GPUs")
    launch = [sys.executable, "-P", "-m", "funmatch.ranks", "--standalone", f"--nproc_per_node={number}"]
    return [*launch, str(script), *rest]


def _root() -> Path:
    """Where the rooms are: beside this package, in a clone and in site-packages alike."""
    return Path(__file__).resolve().parents[1]


def _call(name: str, word: Word, rest: Sequence[str]) -> int:
    sys.argv[0] = f"funmatch {name}"
    try:
        room = importlib.import_module(word.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "funmatch":
            raise
        return _lacks(name, word, [error.name])
    return int(room.main(list(rest)))


def _lacks(name: str, word: Word, lacking: Sequence[str]) -> int:
    cure = f"pip install 'funmatch[{word.extra}]'" if word.extra else "pip install funmatch"
    return _wrong(f"`funmatch {name}` needs {', '.join(lacking)}, not installed here: {cure}")


def _names_recipe(rest: Sequence[str]) -> bool:
    return any(arg == "--recipe" or arg.startswith("--recipe=") for arg in rest)


def _nearest(name: str) -> str:
    guess = difflib.get_close_matches(name, WORDS, n=1)
    return f"; did you mean `funmatch {guess[0]}`?" if guess else ""


def _wrong(sentence: str) -> int:
    print(f"funmatch: {sentence}", file=sys.stderr)
    return _WRONG


if __name__ == "__main__":
    sys.exit(main())
