"""What each room of ours takes on its command line, asked of its own parser: the rules of page_commands.py.

A room is a module that `python -m` runs, a module of the door, or the student's script. A rule raises ValueError, or
ends as the parser ends, where the arguments would not be taken; nothing is run. A new room with a command needs a line
here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import tyro

from student_trainer.recipes import RECIPES

STUDENT = "student_trainer/main.py"


@functools.cache
def flags_of(room: str) -> frozenset[str]:
    """All flags that the --help of a room names: a module, a word of the door, or the student's script."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        run_room(room, ["--recipe", "digits/demo", "--help"] if room == STUDENT else ["--help"])
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\b", said.getvalue())) | {"--help"}
    if room in ("benchmarks.plan", "student_trainer.sweep", "funmatch.views_sheet"):  # the recipe's settings may follow
        flags |= flags_of(STUDENT)
    return frozenset(flags | ({"--recipe", "--tiny", "--processes"} if room == STUDENT else set()))


def run_room(room: str, args: Sequence[str]) -> None:
    ROOMS.get(room, OWN_WORDS.get(room, _student))(list(args))


def _student(args: list[str]) -> None:
    from models import check_name
    from student_trainer.fleet.addresses import Addresses
    from student_trainer.main import parse

    config, _ = parse(args)
    check_name(config.student.architecture)
    for name in filter(None, [config.student.weights, *config.teacher.model]):
        _weights(name)
    for entry in config.teacher.addresses:
        Addresses(entry.split(","))


def _teacher(args: list[str]) -> None:
    from teacher_server.config import Config

    _weights(tyro.cli(Config, args=args).model)


def _weights(name: str) -> None:
    """What models.load would take, a file or a name, without loading it."""
    from timm.models import is_model_pretrained

    from models import check_name, zoo

    if name.startswith(zoo.PREFIX):
        zoo.released(name)
    elif not name.startswith(("hf-hub:", "local-dir:")) and Path(name).suffix not in (".safetensors", ".npz", ".onnx"):
        check_name(name)
        if not is_model_pretrained(name):
            raise ValueError(f"{name} has no published weights")


def _signature(module: str, function: str) -> Callable[[list[str]], None]:
    """A command that tyro makes of a function: everything but the call."""

    def rule(args: list[str]) -> None:
        of = getattr(importlib.import_module(module), function)

        @functools.wraps(of)
        def nothing(*_: Any, **__: Any) -> None:
            return None

        tyro.cli(nothing, args=args)

    return rule


class _Parsed(Exception):  # noqa: N818
    """The parser took the arguments."""


def _arguments(module: str) -> Callable[[list[str]], None]:
    """A command with an argparse parser in its main: that main, as far as to where its arguments are read."""

    def rule(args: list[str]) -> None:
        parse_args = argparse.ArgumentParser.parse_args

        def parse(self: argparse.ArgumentParser, given: Any = None, space: Any = None) -> Any:
            raise _Parsed(parse_args(self, given, space))

        main = importlib.import_module(module).main
        with (
            mock.patch.object(sys, "argv", [module, *args]),
            mock.patch.object(argparse.ArgumentParser, "parse_args", parse),
        ):
            with contextlib.suppress(_Parsed):
                main()

    return rule


def _recipes(args: list[str]) -> None:
    _arguments("student_trainer.recipes.__main__")(args)
    if unknown := [name for name in args if name not in RECIPES]:
        raise ValueError(f"no recipe is called {unknown[0]}")


def _bench(args: list[str]) -> None:
    from benchmarks.bench import BENCHMARKS

    _arguments("benchmarks.bench")(args)
    if unknown := [name for name in args if not name.startswith("--") and name not in BENCHMARKS]:
        raise ValueError(f"no benchmark is called {unknown[0]}")


def _study(args: list[str]) -> None:
    from benchmarks.study import Study

    cut = args.index("--") if "--" in args else len(args)
    study = tyro.cli(Study, args=args[:cut])
    _student(["--recipe", study.recipe, *args[cut + 1 :]])


def _plan(args: list[str]) -> None:
    from benchmarks.plan import parse

    parse(args)


def _sweep(args: list[str]) -> None:
    from student_trainer.sweep import parse

    parse(args)


def _zoo(args: list[str]) -> None:
    if args and args != ["--help"]:
        raise ValueError("models.zoo takes no arguments")


def _doctor(args: list[str]) -> None:
    from funmatch.doctor import _parse

    _parse(args)


def _views(args: list[str]) -> None:
    from funmatch.views_sheet import _parse
    from student_trainer.config import override

    wanted, rest = _parse(args)
    if wanted.recipe and wanted.recipe not in RECIPES:
        raise ValueError(f"no recipe is called {wanted.recipe}")
    override(RECIPES[wanted.recipe or "digits/demo"].config, rest)


def _completion(args: list[str]) -> None:
    from funmatch.completion import SHELLS

    if args not in [[shell] for shell in SHELLS] and args != ["--help"]:
        raise ValueError(f"completion takes one of {', '.join(SHELLS)}")


ROOMS: dict[str, Callable[[list[str]], None]] = {
    "data_prep.prepare": _signature("data_prep.prepare", "main"),
    "data_prep.check": _signature("data_prep.check", "main"),
    "teacher_server.main": _teacher,
    "teacher_server.probe": _arguments("teacher_server.probe"),
    "student_trainer.report": _arguments("student_trainer.report"),
    "student_trainer.recipes": _recipes,
    "student_trainer.sweep": _sweep,
    "benchmarks.plan": _plan,
    "benchmarks.study": _study,
    "benchmarks.bench": _bench,
    "models.zoo": _zoo,
    "docs.make_screenshots": _arguments("docs.make_screenshots"),
}
"""What `python -m` runs."""

OWN_WORDS: dict[str, Callable[[list[str]], None]] = {
    "funmatch.doctor": _doctor,
    "funmatch.views_sheet": _views,
    "funmatch.export": _signature("funmatch.export", "_export"),
    "funmatch.completion": _completion,
}
"""What the door answers itself."""
