"""Would a command of a page work as it is written? Each program is asked by its own parser, as it would be run.

`check` looks at a whole command, `mentions` at one that a sentence only names: its flags are known, the rest is not
looked at. A program that no rule knows is wrong, so that no page can name one unseen. Docker and kubectl have a
room of their own (page_containers.py).

Rejected: a list of flags that are right. It would be one more page that can be wrong.

Not here: what our own rooms take (page_rooms.py), how the commands are found (shell_blocks.py), and that they do what
the page says (test_afternoon.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import page_containers
from funmatch.words import WORDS
from page_rooms import OWN_WORDS, ROOMS, STUDENT, flags_of, run_room
from shell_blocks import ROOT, Block, Command, session
from student_trainer.recipes import RECIPES

PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*")
"""As in --recipe NAME: the reader's own."""


class WrongError(ValueError):
    """The command would not work as it is written."""


def check(command: Command) -> None:
    """Raise WrongError unless the whole command would be taken."""
    try:
        with _sentences():
            _run(command.argv, command.compose_files)
    except (ValueError, OSError, SyntaxError) as error:
        raise WrongError(f"{command}: {error}") from None


def mentions(argv: Sequence[str]) -> None:
    """Raise WrongError unless such a command could be: its program is there, and knows all flags that are given."""
    own = _own(argv)
    if own is None:
        return check(Command(argv=tuple(argv), line=0))
    room, args = own
    known = flags_of(room)
    for place, arg in enumerate(args):
        flag = arg.partition("=")[0]
        if flag.startswith("--") and flag != "--" and flag not in known:
            raise WrongError(f"{' '.join(argv)}: {room} has no {flag}")
        if flag == "--recipe" and not PLACEHOLDER.fullmatch(args[place + 1]) and args[place + 1] not in RECIPES:
            raise WrongError(f"{' '.join(argv)}: no recipe is called {args[place + 1]}")
    return None


def all_flags() -> frozenset[str]:
    """Every flag of ours, and of the programs that pages speak about."""
    rooms = [*ROOMS, *(word.module for word in WORDS.values() if word.module in OWN_WORDS), STUDENT]
    return frozenset().union(*map(flags_of, rooms)) | page_containers.FLAGS


def _own(argv: Sequence[str]) -> tuple[str, Sequence[str]] | None:
    """(room, its arguments) of a command that is ours."""
    match [argv[0].removeprefix(".venv/bin/"), *argv[1:]]:
        case ["funmatch", word, *rest] if word in WORDS:
            module = WORDS[word].module
            return (STUDENT if word == "train" else module), rest
        case ["python", "-m", module, *rest] if module in ROOMS:
            return module, rest
    return None


def _run(argv: Sequence[str], compose_files: Sequence[str] = ()) -> None:
    name = argv[0].removeprefix(".venv/bin/")
    if name in page_containers.PROGRAMS:
        inside = page_containers.check(argv, compose_files)
        return _run(inside) if inside else None
    if name in _PROGRAMS:
        return _PROGRAMS[name](list(argv[1:]))
    if "/" in name and os.access(ROOT / name, os.X_OK):
        return None  # a script of ours; it has no flags
    raise ValueError(f"no rule of {Path(__file__).name} understands {argv[0]!r}; a rule for it says what must be true")


# --- our programs


def _python(args: list[str]) -> None:
    match [arg for arg in args if arg != "-P"]:
        case ["-m", "funmatch.ranks", *rest]:
            _torchrun(rest)
        case ["-m", module, *rest]:
            if module not in ROOMS:
                raise ValueError(f"no rule of {Path(__file__).name} understands python -m {module}")
            run_room(module, rest)
        case ["-c", code]:
            compile(code, "-c", "exec")
        case [script, *rest] if (ROOT / script) == ROOT / STUDENT:
            run_room(STUDENT, rest)
        case _:
            raise ValueError("python runs a module (-m), a line (-c) or the student's script")


def _torchrun(args: list[str]) -> None:
    from torch.distributed.run import parse_args

    asked = parse_args(args)
    _python([asked.training_script, *asked.training_script_args])


def _funmatch(args: list[str]) -> None:
    from funmatch.main import train_command

    if args in (["--help"], ["--version"]):
        return
    if not args or args[0] not in WORDS:
        raise ValueError(f"funmatch has no word {args[0] if args else ''!r}")
    word, rest = args[0], args[1:]
    if word == "train":
        _python(train_command(rest)[1:])
    else:
        run_room(WORDS[word].module, rest)


def _make(args: list[str]) -> None:
    """make itself says what it would run, and that is looked at too, as far as it is ours."""
    makefile = (ROOT / "Makefile").read_text()
    for name in (arg.partition("=")[0] for arg in args if "=" in arg):
        if f"$({name})" not in makefile:
            raise ValueError(f"the Makefile has no variable {name}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    would = subprocess.run(
        ["make", "--dry-run", "--silent", "--assume-old=.venv/installed", *args],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if would.returncode:
        raise ValueError(would.stderr.strip())
    with tempfile.TemporaryDirectory() as folder:
        typed = session([Block(language="sh", title="", text=would.stdout, line=0)], Path(folder))
    for command in typed.commands:
        match command.argv:
            case [".venv/bin/python", "-m", module, *_] if not (ROOT / module.partition(".")[0]).is_dir():
                pass  # pip, protoc: make's own verbs, which .ci/run and test_structure.py run
            case [".venv/bin/python" | ".venv/bin/torchrun" | ".venv/bin/funmatch", *_]:
                _run(command.argv)


# --- programs of others


def _tensorboard(args: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what it brings along
        from tensorboard.plugins.core.core_plugin import CorePluginLoader
        from tensorboard.program import TensorBoard

    TensorBoard([CorePluginLoader()]).configure(argv=("tensorboard", *args))


def _pytest(args: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("-n", type=int)
    parser.add_argument("-m", choices=re.findall(r'^  "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.M))
    parser.add_argument("files", nargs="*")
    for file in parser.parse_args(args).files:
        if not (ROOT / file).is_file():
            raise ValueError(f"there is no {file}")


def _sh(args: list[str]) -> None:
    if not (ROOT / args[0]).is_file():
        raise ValueError(f"there is no {args[0]}")


def _cp(args: list[str]) -> None:
    if missing := [name for name in args[:-1] if not (ROOT / name).exists()]:
        raise ValueError(f"there is no {missing[0]}")


def _nvidia_ctk(args: list[str]) -> None:
    if args != ["runtime", "configure", "--runtime=docker"]:
        raise ValueError("only what NVIDIA's guide says of docker is known here")


def _anything(_: list[str]) -> None:
    """What every Debian has."""


_PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "python": _python, "torchrun": _torchrun, "funmatch": _funmatch, "make": _make, "tensorboard": _tensorboard,
    "pytest": _pytest, "sh": _sh, "cp": _cp, "nvidia-ctk": _nvidia_ctk, "sudo": lambda args: _run(args),
    "xargs": lambda args: _run(args), "head": _anything, "sort": _anything, "sleep": _anything, "install": _anything,
}  # fmt: skip


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """A parser that ends the program raises instead, with what it said."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        except SystemExit as end:
            if end.code not in (0, None):
                raise ValueError(" ".join(f"{said.getvalue()} {end.code}".split())) from None


KNOWN = frozenset({*_PROGRAMS, *page_containers.PROGRAMS})
"""Programs that a rule understands."""


def words(text: str) -> list[str]:
    """A command in a sentence, in words; [] where it is none."""
    try:
        return shlex.split(text)
    except ValueError:
        return []
