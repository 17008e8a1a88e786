"""`make bench`: every figure of docs/performance.md on this machine, as one table and as JSON.

Each benchmark runs in a process of its own, one after the other, so that none inherits another's threads or memory.
One that fails is said to have failed, what it had measured stays, and the others go on; exit code 1 then. A goal that
is missed is a row of the table, not a failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import figure

_ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ("gpu", "service", "step", "loader", "draw", "wire", "logit_store", "growth", "memory")
"""Modules beside this one, in the order of the table as far as it goes."""


def run(name: str, *, quick: bool) -> tuple[list[figure.Figure], bool]:
    """The figures of one benchmark, and whether it came to its end; what it prints is shown while it runs."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", f"--json={file}", *(["--quick"] if quick else [])]
        done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.DEVNULL, check=False)
        return list(figure.read(file)) if file.exists() else [], done.returncode == 0


def main() -> None:
    """Run them, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", metavar="NAME", help=f"some of {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="seconds each; the figures mean little")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), metavar="FILE")
    asked = parser.parse_args()
    if unknown := set(asked.only) - set(BENCHMARKS):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    where = figure.machine()
    figures: list[figure.Figure] = []
    failed: list[str] = []
    for name in asked.only or BENCHMARKS:
        print(f"== {name}", file=sys.stderr, flush=True)
        measured, ended_well = run(name, quick=asked.quick)
        figures += measured
        failed += [] if ended_well else [name]
    figures.sort(key=lambda one: int(one.row))
    print("\n".join([*figure.table(figures), "", *figure.notes(figures), ""]))
    print(", ".join(f"{name} {fact}" for name, fact in where.items()))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "quick": asked.quick, "machine": where,
        "figures": [dataclasses.asdict(one) | {"met": one.met} for one in figures], "failed": failed,
    }  # fmt: skip
    asked.out.write_text(json.dumps(record, indent=1) + "\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; python -m benchmarks.NAME says why")


if __name__ == "__main__":
    main()
