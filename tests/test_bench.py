"""What benchmarks say, and the command that runs them all."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench, figure
from benchmarks.figure import Figure

ROOT = Path(__file__).resolve().parents[1]


def a_figure(**changes) -> Figure:
    return Figure(**({"row": "6", "name": "loader", "value": 812.4, "unit": "images/s"} | changes))


def cells(one: Figure) -> list[str]:
    heading, rule, line = figure.table([one])
    assert heading.count("|") == rule.count("|") == line.count("|") == 8
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_of_the_table_says_what_was_measured_beside_what_and_whether_it_is_enough():
    one = a_figure(beside="torchvision", alternative=301.2, floor=1234.5, goal=(">=", 2.0), judged=2.6973)
    assert cells(one) == ["6", "loader", "812 images/s", "301 (torchvision)", "1,234", ">= 2", "yes: 2.7"]
    assert cells(a_figure()) == ["6", "loader", "812 images/s", "", "", "", ""]


def test_a_goal_that_is_missed_stays_in_the_table_and_its_note_below():
    one = a_figure(goal=(">=", 2.0), judged=1.4, note="tried: two threads")
    assert cells(one)[-1] == "**no**: 1.4"
    assert list(figure.notes([one, a_figure()])) == ["* 6, loader: tried: two threads"]


def test_what_cannot_be_measured_here_says_why():
    one = a_figure(value=None, goal=(">=", 2.0), note="no GPU here")
    assert cells(one)[2] == "not measured: no GPU here"
    assert one.met is None and cells(one)[-1] == ""
    assert not list(figure.notes([one])), "said once"


@pytest.mark.parametrize(
    ("goal", "judged", "met"),
    [
        ((">=", 2.0), 2.0, True),
        ((">=", 2.0), 1.999, False),
        (("<=", 1.03), 1.03, True),
        (("<=", 1.03), 1.031, False),
        ((">=", 2.0), None, None),
        (None, 5.0, None),
    ],
)
def test_a_goal_is_reached_at_its_bound_and_not_before(goal, judged, met):
    assert a_figure(goal=goal, judged=judged).met is met


def test_a_number_of_nothing_is_no_goal_reached():
    assert a_figure(goal=("<=", 1.0), judged=float("nan")).met is False
    assert a_figure(goal=(">=", 1.0), judged=float("nan")).met is False


def test_a_name_with_a_bar_in_it_breaks_no_table():
    one = a_figure(name="a | b", beside="c|d", alternative=1.0)
    (line,) = list(figure.table([one]))[2:]
    assert line.replace(r"\|", "").count("|") == 8


MODULE = """
from benchmarks import figure
from benchmarks.figure import Figure
def measure(quick):
    yield Figure(row="{row}", name="{name}", value=1.5 if quick else 2.5, unit="s", goal=("<=", 2.0), judged=1.0)
    {more}
if __name__ == "__main__":
    figure.present(measure, __doc__)
"""


@pytest.fixture
def three(tmp_path, monkeypatch) -> Path:
    """A folder with three benchmarks, of which one fails after its first figure."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    for name in ("__init__.py", "figure.py", "bench.py"):
        (package / name).write_text((ROOT / "benchmarks" / name).read_text())
    for name, row, more in (("later", 12, ""), ("broken", 3, "1 / 0"), ("early", 2, "")):
        (package / f"{name}.py").write_text(MODULE.format(row=row, name=name, more=more))
    text = (package / "bench.py").read_text()
    start = text.index("BENCHMARKS = (")
    end = text.index(")", start) + 1
    (package / "bench.py").write_text(f"{text[:start]}BENCHMARKS = ('later', 'broken', 'early'){text[end:]}")
    return tmp_path


def run(folder: Path, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.bench", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_one_that_fails_is_said_its_figures_stay_and_the_others_go_on(three):
    done = run(three, "--quick")
    assert done.returncode == 1
    assert "failed: broken; python -m benchmarks.NAME says why" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    record = json.loads((three / "runs" / "bench.json").read_text())
    assert [one["name"] for one in record["figures"]] == ["early", "broken", "later"], "by rows"
    assert record["failed"] == ["broken"] and record["quick"] is True
    assert {one["met"] for one in record["figures"]} == {True}
    assert record["machine"]["cores"] >= 1 and record["when"].endswith("+00:00")
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split("|")[2].strip() for line in lines[1:]] == ["early", "broken", "later"]


def test_some_may_be_asked_for_and_an_unknown_name_is_told(three):
    done = run(three, "later", "--out", "elsewhere/some.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((three / "elsewhere" / "some.json").read_text())
    assert [one["value"] for one in record["figures"]] == [2.5], "not quick"
    done = run(three, "nothing")
    assert done.returncode == 2 and "no benchmark is called nothing; there are later, broken, early" in done.stderr


def test_figures_are_the_same_after_a_round_trip(tmp_path, monkeypatch, capsys):
    figures = [a_figure(goal=(">=", 2.0), judged=2.5, note="n"), a_figure(value=None, beside="b", floor=3.0)]
    figure.present(lambda quick: figures if quick else [], "About.", ["--quick", "--json", str(tmp_path / "f.json")])
    assert list(figure.read(tmp_path / "f.json")) == figures
    assert "| 6 | loader |" in capsys.readouterr().out


def test_every_benchmark_of_the_table_is_a_module_here():
    missing = [name for name in bench.BENCHMARKS if importlib.util.find_spec(f"benchmarks.{name}") is None]
    assert not missing
