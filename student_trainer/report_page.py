"""One self-contained page about one run or several: curves, final numbers beside the paper's, differences, views.

Pictures are inside the page, so that it can be sent as one file. Rejected: a template engine, for a page of six parts.
"""

from __future__ import annotations

import base64
import html
import json
import time
from collections.abc import Sequence
from pathlib import Path

from student_trainer import metrics
from student_trainer.config import settings
from student_trainer.curves import draw_curves
from student_trainer.recipes import RECIPES
from student_trainer.record import Run, differing, evaluated, groups, unit_of

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em;
overflow-wrap: break-word }
h1 { font-size: 1.5em; margin-bottom: .2em } h2 { font-size: 1.15em; margin: 2em 0 .6em } h3 { font-size: 1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3em .8em; text-align: left; vertical-align: baseline } .number { text-align: right }
th { border-bottom: 1px solid #999; font-weight: 600; vertical-align: bottom }
tr:nth-child(even) td { background: #f6f6f6 } img { max-width: 100% } .note { color: #666; margin: .6em 0 }
footer { border-top: 1px solid #ccc; margin-top: 3em } .wide { overflow-x: auto }
@media (max-width: 800px) { .wide img { max-width: none; width: 800px } .wide table { width: max-content;
max-width: 800px } td:first-child { min-width: 9em; max-width: 11em; overflow-wrap: anywhere } }
"""

_SILENT_S = 300.0  # an evaluation may take so long, and longer steps ten times their time
_NONE, _NO_LABELS = "–", "no labels"  # in place of a number: not measured, or not to be known
_NAMED_CHANGES = 3  # settings that the table of results names; the others are counted


def write_page(folders: Sequence[Path], out: Path) -> Path:
    """Write OUT/report.html and OUT/curves.png; returns the page.

    Raises:
        ValueError: a folder that holds no run.
    """
    runs = [Run(folder) for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    grouped = groups(runs)
    draw_curves(grouped, out / "curves.png")
    names = _names(runs)
    title = ", ".join(dict.fromkeys(str(run.settings.get("recipe", run.folder.name)) for run in runs))
    body = [
        f"<h1>{html.escape(title)}</h1>",
        _note(f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {time.strftime('%Y-%m-%d %H:%M %Z')}"),
        *(_going_on(run, name) for run, name in zip(runs, names, strict=True) if not run.finished),
        f"<h2>On the evaluation split, against {unit_of(runs)}s</h2>",
        _image(out / "curves.png", f"accuracy, agreement and KL against {unit_of(runs)}s"),
        *_about_epochs(runs, names),
        f"<h2>{'In the end' if all(run.finished for run in runs) else 'So far'}</h2>",
        _finals(runs, names),
        *_missing(runs, names),
        *_differences(runs, names),
        "<h2>Speed, and waiting for the teacher</h2>",
        _speed(runs, names),
        "<h2>What teacher and student saw</h2>",
        *_views(runs, names),
        '<footer><p class="note">Made by <code>python -m student_trainer.report '
        f"{html.escape(' '.join(map(str, folders)))}</code></p></footer>",
    ]
    page = out / "report.html"
    page.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n",
        encoding="utf-8",
    )
    return page


def _going_on(run: Run, name: str) -> str:
    """How far an unfinished run has come, and whether anybody still writes its record."""
    total, rate, batch = run.facts.get("steps"), run.median("images_per_s"), run.settings.get("optim.batch_size")
    record = run.folder / metrics.FILE
    silent_s = time.time() - record.stat().st_mtime if record.exists() else None
    words = f"{name}: step {run.steps:,}" + (f" of {total:,} ({run.steps / total:.1%})" if total else "")
    if silent_s is None:
        return _note(f"{words}; it has not begun to learn.")
    usual_s = batch * run.settings.get("log_every", 1) / rate if rate and batch else 0.0
    if silent_s > max(_SILENT_S, 10 * usual_s):
        return _note(f"{words}; not finished, and silent for {silent_s / 60:,.0f} minutes: it was stopped, or waits.")
    left = (
        f", about {_time(batch * (total - run.steps) / rate)} to go without evaluations"
        if rate and batch and total
        else ""
    )
    return _note(f"{words}; it was going on when this page was written{left}. The page does not renew itself.")


def _time(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds > 2 * 3600 else f"{seconds / 60:,.1f} minutes"


def _names(runs: Sequence[Run]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        ends = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(ends)) == len(ends):
            return ends
    return [str(run.folder) for run in runs]


def _about_epochs(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """How the horizontal axis was come by, where it was not counted in pictures."""
    drawn = {name: run for run, name in zip(runs, names, strict=True) if evaluated([run])}
    unknown = [name for name, run in drawn.items() if run.epochs_per_step is None]
    if unknown:
        return [_note(f"In steps, not epochs: no number of pictures (run.json) is on record for {', '.join(unknown)}.")]
    derived = [name for name, run in drawn.items() if not run.facts.get("num_train")]
    if derived:
        return [_note(f"Without run.json, epochs are those of the settings over all steps: {', '.join(derived)}.")]
    return []


def _finals(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        recipe = RECIPES.get(str(run.settings.get("recipe")))
        rows.append([
            name,
            _NO_LABELS if _lacks_labels(run) else _last(run, "student_top1", "{:.2%}"),
            f"{recipe.expected:.2f}%" if recipe and recipe.expected else _NONE,
            _changes(run),
            _last(run, "teacher_top1", "{:.2%}"),
            _last(run, "agreement_top1", "{:.2%}"),
            _last(run, "kl", "{:.4f}"),
            f"{run.steps:,}" + ("" if run.finished else ", not finished"),
        ])  # fmt: skip
    header = [
        "run", "student top-1", "the paper's, for the recipe", "changed from the recipe", "teacher top-1", "agreement",
        "KL, nats", "steps",
    ]  # fmt: skip
    return _table(header, rows)


def _last(run: Run, name: str, form: str) -> str:
    value = run.last(f"eval/{name}")
    return _NONE if value is None else form.format(value)


def _lacks_labels(run: Run) -> bool:
    return run.last("eval/student_top1") is None and run.last("eval/kl") is not None


def _changes(run: Run) -> str:
    """Settings that the run has not from its recipe: with them, the paper's number is of another experiment."""
    recipe = RECIPES.get(str(run.settings.get("recipe")))
    if not recipe:
        return "no such recipe here" if run.settings else "not known"
    given = json.loads(json.dumps(settings(recipe.config)))
    changed = [name for name, value in run.what.items() if name in given and value != given[name]]
    more = len(changed) - _NAMED_CHANGES
    return ", ".join(changed[:_NAMED_CHANGES]) + (f" and {more} more" if more > 0 else "") or "nothing"


def _missing(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    lacking = [f"{name}: {', '.join(run.missing)}" for run, name in zip(runs, names, strict=True) if run.missing]
    return [_note("Not in the folders, so not told here. " + "; ".join(lacking) + ".")] if lacking else []


def _differences(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    if len(runs) == 1:
        return []
    known = [(run, name) for run, name in zip(runs, names, strict=True) if run.settings]
    found = differing([run for run, _ in known])
    title = "<h2>What differs</h2>"
    if not found:
        unknown = "settings are on record for no two of them" if len(known) < 2 else "the settings are the same"
        return [title, f"<p>Nothing: {unknown}.</p>"]
    own = [[name, *(_plain(values[i]) for values in found.values())] for i, (_, name) in enumerate(known)]
    table = [["run", *found], *own]
    if len(found) > len(known):  # the longer side goes down the page
        table = [list(column) for column in zip(*table, strict=True)]
    return [title, _table(table[0], table[1:])]


def _plain(value: object) -> str:
    return _NONE if value is None else value if isinstance(value, str) else json.dumps(value)


def _speed(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        rate, batch = run.median("images_per_s"), run.settings.get("optim.batch_size")
        waits = [run.median("data_wait_s"), run.median("teacher_wait_s")]
        step = batch / rate if rate and batch else None
        rows.append(
            [name, f"{rate:,.1f}" if rate else _NONE, f"{1000 * step:,.0f} ms" if step else _NONE]
            + [f"{1000 * wait:,.1f} ms" if wait is not None else _NONE for wait in waits]
        )
    header = ["run", "images/s", "a step", "of it waiting for pictures", "for the teacher"]
    return _table(header, rows) + _note("Medians over the run.")


def _views(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    sheets = {name: run.folder / "first_batch.png" for run, name in zip(runs, names, strict=True)}
    there = {name: sheet for name, sheet in sheets.items() if sheet.exists()}
    shown = [f"<h3>{html.escape(name)}</h3>{_image(there[name], f'the first batch of {name}')}" for name in there]
    lacking = ", ".join(name for name in sheets if name not in there)
    return shown + ([_note(f"There is no first_batch.png of {lacking}.")] if lacking else [])


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _image(path: Path, what: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="wide"><img alt="{html.escape(what)}" src="data:image/png;base64,{data}"></div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers are right-aligned, so that their digits stand below one another."""
    numeric = [
        all(cell in (_NONE, _NO_LABELS) or cell[:1].isdigit() for cell in column) for column in zip(*rows, strict=True)
    ]
    kind = [' class="number"' if is_number and column else "" for column, is_number in enumerate(numeric)]
    whole = [html.escape(cell).replace("top-1", "top&#8209;1") for cell in header]  # a hyphen that no line ends with
    head = "".join(f"<th{k}>{cell}</th>" for k, cell in zip(kind, whole, strict=True))
    lines = [
        "<tr>" + "".join(f"<td{k}>{html.escape(cell)}</td>" for k, cell in zip(kind, row, strict=True)) + "</tr>"
        for row in rows
    ]
    return f'<div class="wide"><table><tr>{head}</tr>' + "\n".join(lines) + "</table></div>"
