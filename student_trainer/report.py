"""What happened in runs: `python -m student_trainer.report RUN [RUN ...]`.

Reads what the loop left in a run's folder (record.py) and computes nothing anew. For one run, report.png beside its
record (run_picture.py), and a table; for one or several, a page (report_page.py) with curves over epochs (curves.py).
It works on runs that are still going, or were killed, and on supervised ones (then without the teacher's half).
`--study FOLDER` draws the consistency study instead, from the runs FOLDER/SETTING/seed_N, with the / of a setting
written as _.

Rejected: a page of TensorBoard links. A picture can be put into a README and looks the same in a year.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from student_trainer import metrics
from student_trainer.curves import best_first, draw_study, final_top1, train_kl
from student_trainer.record import Run
from student_trainer.report_page import write_page
from student_trainer.run_picture import draw
from views.setting import SETTINGS

# Rows of the closing table: key of summary.json, what to call it, how to write it.
_TABLE = (
    ("teacher_top1", "teacher top-1", "{:.2%}"),
    ("student_top1", "student top-1", "{:.2%}"),
    ("agreement_top1", "agreement of the two, top-1", "{:.2%}"),
    ("agreement_top5", "teacher's first in student's top-5", "{:.2%}"),
    ("kl", "KL(teacher || student)", "{:.4f} nats"),
    ("student_xent", "student cross-entropy", "{:.4f} nats"),
    ("steps", "steps", "{:,.0f}"),
    ("images_seen", "images seen", "{:,.0f}"),
    ("images_per_s", "images/s", "{:,.1f}"),
    ("view_mismatch_max", "largest view mismatch", "{:g} of 255"),
)


def print_table(summary: Mapping[str, Any]) -> None:
    """Print the closing table of a run: what summary.json holds of it, one line a number."""
    rows = [(name, form.format(summary[key])) for key, name, form in _TABLE if summary.get(key) is not None]
    if not rows:
        print("nothing was measured")
        return
    left, right = max(len(name) for name, _ in rows), max(len(text) for _, text in rows)
    print("-" * (left + 2 + right))
    for name, text in rows:
        print(f"{name:<{left}}  {text:>{right}}")
    print("-" * (left + 2 + right))


def study(folder: Path) -> tuple[Path, Path]:
    """Draw FOLDER/study.png and write FOLDER/study.md from the runs FOLDER/SETTING/seed_N.

    Raises:
        ValueError: no such runs.
    """
    found = {}
    for setting in SETTINGS:
        runs = [Run(path.parent) for path in sorted((folder / setting.replace("/", "_")).glob("seed_*/config.json"))]
        if runs:
            found[setting] = runs
    if not found:
        raise ValueError(f"no runs {folder}/SETTING/seed_N, with / written as _: settings are {', '.join(SETTINGS)}")
    draw_study(found, folder / "study.png")
    (folder / "study.md").write_text(_study_table(found), encoding="utf-8")
    return folder / "study.png", folder / "study.md"


def _study_table(grouped: Mapping[str, Sequence[Run]]) -> str:
    """Markdown: one line a view setting, best first. Means are of the runs that have finished."""
    lines = [
        "| setting | top-1, each seed | mean | agreement | KL on test pictures | KL on training views |",
        "|---|---|---|---|---|---|",
    ]
    for setting, runs in best_first(grouped).items():
        finished = [run for run in runs if run.finished]
        cells = [
            setting,
            ", ".join(_top1_of(run) for run in runs),
            _mean([final_top1(runs)], "{:.2%}"),
            _mean([run.last("eval/agreement_top1") for run in finished], "{:.2%}"),
            _mean([run.last("eval/kl") for run in finished], "{:.3f}"),
            _mean([train_kl(run) for run in finished], "{:.3f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    every = [run for runs in grouped.values() for run in runs]
    teachers = sorted({f"{top1:.2%}" for run in every if (top1 := run.last("eval/teacher_top1")) is not None})
    budgets = sorted({f"{run.steps:,}" for run in every if run.finished})
    lines += ["", f"Teacher: {', '.join(teachers) or 'not measured'}. Steps: {', '.join(budgets) or 'none finished'}."]
    if any(not run.finished for run in every):
        lines.append("In parentheses: runs that have not finished; means leave them out.")
    return "\n".join(lines) + "\n"


def _top1_of(run: Run) -> str:
    top1 = run.last("eval/student_top1")
    text = "none yet" if top1 is None else f"{top1:.2%}"
    return text if run.finished else f"({text}, step {run.steps:,})"


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(sum(known) / len(known)) if known else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Report on one run or several: a page, pictures, and for one run its table."""
    parser = argparse.ArgumentParser(prog="python -m student_trainer.report", description=main.__doc__)
    parser.add_argument("run_dir", nargs="*", type=Path, help="folders of runs, such as runs/demo")
    parser.add_argument("--out", type=Path, help="where report.html and curves.png go; default: the first run's folder")
    parser.add_argument("--study", type=Path, metavar="FOLDER", help="draw the consistency study of FOLDER instead")
    args = parser.parse_args(arguments)
    try:
        if args.study:
            print(*study(args.study), sep="\n")
            return
        if not args.run_dir:
            parser.error("which runs? give their folders")
        page = write_page(args.run_dir, args.out or args.run_dir[0])
        if len(args.run_dir) == 1 and metrics.read(args.run_dir[0]):
            print(f"picture: {draw(args.run_dir[0])}")
            _print_summary(args.run_dir[0])
        print(f"page: {page}")
    except ValueError as error:
        parser.error(str(error))


def _print_summary(run_dir: Path) -> None:
    summary = run_dir / "summary.json"
    if summary.exists():
        print_table(json.loads(summary.read_text(encoding="utf-8")))
    else:
        print("no summary.json: the run has not finished")


if __name__ == "__main__":
    main()
