"""One self-contained page about one run or several: curves, final numbers beside the paper's, differences, views.

Pictures are inside the page, so that it can be sent as one file. Rejected: a template engine, for a page of six parts.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from student_trainer.curves import draw_curves
from student_trainer.recipes import RECIPES
from student_trainer.record import Run, differing, groups

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25em .8em; text-align: right }
th { border-bottom: 1px solid #999; font-weight: 600 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) td { background: #f6f6f6 } img { max-width: 100% } .note { color: #666 } .wide { overflow-x: auto }
"""

# Column, key of summary.json, how to write it.
_FINALS = (
    ("student top-1", "student_top1", "{:.2%}"),
    ("teacher top-1", "teacher_top1", "{:.2%}"),
    ("agreement", "agreement_top1", "{:.2%}"),
    ("KL, nats", "kl", "{:.4f}"),
    ("steps", "steps", "{:,.0f}"),
)


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
        f'<p class="note">{len(runs)} run{"s" if len(runs) > 1 else ""}; made by '
        f"<code>python -m student_trainer.report {html.escape(' '.join(map(str, folders)))}</code></p>",
        "<h2>Against epochs</h2>",
        _image(out / "curves.png", "accuracy, agreement and KL against epochs"),
        "<h2>In the end</h2>",
        _finals(runs, names),
        "<h2>What differs</h2>",
        _differences(runs, names),
        "<h2>Speed, and waiting for the teacher</h2>",
        _speed(runs, names),
        "<h2>What teacher and student saw</h2>",
        *(_views(run, name) for run, name in zip(runs, names, strict=True)),
    ]
    page = out / "report.html"
    page.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n",
        encoding="utf-8",
    )
    return page


def _names(runs: Sequence[Run]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        ends = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(ends)) == len(ends):
            return ends
    return [str(run.folder) for run in runs]


def _finals(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        recipe = RECIPES.get(str(run.settings.get("recipe")))
        paper = f"{recipe.expected:.2f}%" if recipe and recipe.expected else ""
        cells = [form.format(run.summary[key]) if run.summary.get(key) is not None else "" for _, key, form in _FINALS]
        if not run.summary:
            cells[-1] = f"{run.lines[-1]['step']:,}, not finished"
            last = run.last("eval/student_top1")
            cells[0] = f"{last:.2%}" if last is not None else ""
        rows.append([name, *cells[:1], paper, *cells[1:]])
    header = ["run", _FINALS[0][0], "the paper's", *(column for column, _, _ in _FINALS[1:])]
    return _table(header, rows)


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    missing = [name for run, name in zip(runs, names, strict=True) if not run.settings]
    note = f'<p class="note">without config.json: {html.escape(", ".join(missing))}</p>' if missing else ""
    found = differing([run for run in runs if run.settings])
    if not found:
        return note + "<p>Nothing: " + ("one run." if len(runs) == 1 else "the settings are the same.") + "</p>"
    with_settings = [name for run, name in zip(runs, names, strict=True) if run.settings]
    return note + _table(["setting", *with_settings], [[name, *map(str, values)] for name, values in found.items()])


def _speed(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        rate, batch = run.median("images_per_s"), run.settings.get("optim.batch_size")
        waits = [run.median("data_wait_s"), run.median("teacher_wait_s")]
        step = batch / rate if rate and batch else None
        rows.append(
            [name, f"{rate:,.1f}" if rate else "", f"{1000 * step:,.0f} ms" if step else ""]
            + [f"{1000 * wait:,.1f} ms" if wait is not None else "" for wait in waits]
        )
    header = ["run", "images/s", "a step", "of it waiting for pictures", "for the teacher"]
    return _table(header, rows) + '<p class="note">Medians over the run.</p>'


def _views(run: Run, name: str) -> str:
    sheet = run.folder / "first_batch.png"
    seen = _image(sheet, f"the first batch of {name}") if sheet.exists() else '<p class="note">no first_batch.png</p>'
    return f"<h3>{html.escape(name)}</h3>{seen}"


def _image(path: Path, what: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(what)}" src="data:image/png;base64,{data}"></p>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="wide"><table><tr>{head}</tr>' + "\n".join(lines) + "</table></div>"
