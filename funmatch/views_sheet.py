"""`funmatch views`: what student and teacher saw at a step of a run, from the plan alone.

What a step looks at is a function of (seed, step), so any step of any run can be looked at again, at any time, without
its network and without its teacher. Settings come from RUN/config.json, or are a recipe's.

views_seen.py computes, views_page.py draws. Rejected: keeping the views of a run while it trains. They are a thousand
times the size of what they follow from, and nobody knows beforehand which step will be doubted.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from student_trainer.config import Config, override, settings
from student_trainer.recipes import RECIPES

MAX_ROWS = 32  # a teacher vouches for so many rows, and their partners, in one request

_DECIDES = ("seed", "views.", "data.train", "optim.batch_size", "student.size", "student.interpolation")

_EPILOG = """\
Any setting of `funmatch train` may follow, for example --seed 1 or --views.setting ind/ic.

example: funmatch views --run-dir runs/flowers102 --step 1000 --out step_1000.html
         funmatch views --recipe flowers102/funmatch/10k --data data/flowers102 --step 0 --teacher 127.0.0.1:50051
"""


def main(argv: list[str] | None = None) -> int:
    """Write a sheet; 1, with a sentence on standard error, where it cannot be made."""
    wanted, rest = _parse(sys.argv[1:] if argv is None else argv)
    try:
        config = _config(wanted, rest)
        # After the settings are known to be right: these import torch and DALI.
        from funmatch.views_page import write
        from funmatch.views_seen import look
        from student_trainer.fleet import TeacherError
        from student_trainer.pictures import PictureError
    except ValueError as error:
        print(f"funmatch views: {error}", file=sys.stderr)
        return 1
    try:
        rows = range(wanted.first_row, wanted.first_row + wanted.rows)
        seen = look(config, wanted.step, rows, wanted.run_dir, tuple(wanted.teacher_size))
        out = wanted.out or Path(f"views_step_{wanted.step}.html")
        write(seen, out)
    except (ValueError, OSError, TeacherError, PictureError) as error:
        print(f"funmatch views: {error}", file=sys.stderr)
        return 1
    print(f"{seen.verdict()}\nsheet: {out}")
    return 1 if seen.differs else 0


def _parse(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="funmatch views", allow_abbrev=False, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="A sheet of what student and teacher saw at a step: boxes on the originals, flips, mixup partners "
        "and\nlambda, both renderings, what was mixed, and whether the pixels are the same.",
    )  # fmt: skip
    parser.add_argument("--recipe", metavar="NAME", help="a run of this recipe, as `funmatch train` would do it")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="this run, past or going on, by its config.json")
    parser.add_argument("--step", type=int, required=True, metavar="K",
                        help="updates done before the one looked at: 0 is the first batch, and K belongs to line K + 1 "
                        "of metrics.jsonl")  # fmt: skip
    parser.add_argument("--rows", type=int, default=8, metavar="N", help=f"rows shown, 1 to {MAX_ROWS} (8)")
    parser.add_argument("--first-row", type=int, default=0, metavar="R", help="of the global batch (0)")
    parser.add_argument("--data", metavar="DIR", help="the prepared data set, where it is not where it was")
    parser.add_argument("--teacher", nargs="+", default=[], metavar="HOST:PORT",
                        help="ask running teachers what they rendered: one entry a teacher, commas between its "
                        "replicas. Default: none is asked, the teacher's views are rendered here")  # fmt: skip
    parser.add_argument("--teacher-size", type=int, nargs="+", default=[], metavar="PX",
                        help="size of a teacher's views, in pixels, where no teacher is asked. Default: as on record "
                        "in the run's folder, or the recipe's")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="a page (.html) or a picture (.png); default: views_step_K.html")  # fmt: skip
    wanted, rest = parser.parse_known_args(args)
    if not (wanted.recipe or wanted.run_dir):
        parser.error("which run? give --run-dir DIR of a run, or --recipe NAME")
    if not 1 <= wanted.rows <= MAX_ROWS:
        parser.error(f"--rows is {wanted.rows}; a sheet shows 1 to {MAX_ROWS}, and --first-row R where they begin")
    if wanted.out and wanted.out.suffix not in (".html", ".png"):
        parser.error(f"--out {wanted.out}: its ending says what to write, .html or .png")
    return wanted, rest


def _config(wanted: argparse.Namespace, rest: Sequence[str]) -> Config:
    if wanted.run_dir:
        from student_trainer.record import Run

        told = Run(wanted.run_dir).settings
        if wanted.recipe and told.get("recipe") != wanted.recipe:
            raise ValueError(
                f"{wanted.run_dir} is a run of {told.get('recipe')!r}, not of {wanted.recipe!r}: give one of --run-dir "
                "and --recipe"
            )
        config = config_of(told, wanted.run_dir)
    elif wanted.recipe in RECIPES:
        config = RECIPES[wanted.recipe].config
    else:
        raise ValueError(f"no recipe is called {wanted.recipe!r}; `python -m student_trainer.recipes` lists them")
    # Where the run's teachers were is its own business: only those named here are asked.
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, addresses=(), rows_per_request=64))
    given = [*rest, *(["--data", wanted.data] if wanted.data else [])]
    return override(config, [*given, *(["--teacher", *wanted.teacher] if wanted.teacher else [])])


def config_of(told: Mapping[str, Any], folder: Path) -> Config:
    """The config that was written as settings by dotted names.

    Raises:
        ValueError: it lacks what decides about views, or has what is not known here: another version wrote it.
    """
    base = Config(recipe=str(told.get("recipe", "")))
    known = settings(base)
    strange = [name for name in told if name not in known and name.startswith(("views.", "data."))]
    lacking = [name for name in known if name not in told and name.startswith(_DECIDES)]
    if strange or lacking:
        raise ValueError(
            f"{folder / 'config.json'} is of another version of funmatch ("
            + "; ".join([f"unknown here: {name}" for name in strange] + [f"not there: {name}" for name in lacking])
            + "): look at it with that version, or give --recipe and the settings"
        )
    config: Config = _filled(base, told, "")
    return config


def _filled(part: Any, told: Mapping[str, Any], prefix: str) -> Any:
    changes = {}
    for entry in dataclasses.fields(part):
        name, default = prefix + entry.name, getattr(part, entry.name)
        if dataclasses.is_dataclass(default):
            changes[entry.name] = _filled(default, told, f"{name}.")
        elif name in told:
            changes[entry.name] = _typed(told[name], default)
    return dataclasses.replace(part, **changes)


def _typed(value: Any, default: Any) -> Any:
    """As it was before JSON: a path, a tuple. What may be None in a config is a path."""
    if isinstance(value, list):
        return tuple(value)
    if value is not None and (default is None or isinstance(default, Path)):
        return Path(value)
    return (value,) if isinstance(default, tuple) else value


if __name__ == "__main__":
    sys.exit(main())
