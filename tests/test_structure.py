"""The arrows between the rooms, and the freshness of what is generated."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "views": {"protos"},
    "protos": set(),
    "models": set(),
    "data_prep": set(),
    "teacher_server": {"views", "protos", "models", "data_prep.index"},
    "student_trainer": {"views", "protos", "models", "data_prep.index"},
    # The door is above them all, beside benchmarks, which it opens too.
    "funmatch": {"views", "protos", "models", "data_prep", "teacher_server", "student_trainer"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    for path in (ROOT / room).rglob("*.py"):
        for name in imports(path):
            other = name.split(".")[0]
            if other in ROOMS and other != room:
                allowed = ROOMS[room]
                assert other in allowed or any(name.startswith(a) for a in allowed), f"{path.name} imports {name}"


def test_what_a_view_is_needs_numpy_only():
    code = "import sys, views.draw; print(sorted({'torch', 'nvidia', 'grpc', 'PIL'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.suite  # it imports torch, for once
def test_a_rank_begins_without_what_draws_pictures_at_the_end():
    code = "import sys, student_trainer.train; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_there_is_no_drawer_called_utils():
    names = {path.stem for path in ROOT.glob("*/*.py")}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_no_file_of_a_room_shadows_the_standard_library():
    for room in ROOMS:
        assert not {path.stem for path in (ROOT / room).glob("*.py")} & set(sys.stdlib_module_names)


def test_the_generated_stubs_are_fresh(tmp_path):
    out = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *out, "protos/teacher.proto"], cwd=ROOT, check=True
    )
    for made in (tmp_path / "protos").iterdir():
        assert made.read_text() == (ROOT / "protos" / made.name).read_text(), f"{made.name} is stale: make protos"
