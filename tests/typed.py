"""Commands of a page, typed into one bash in a folder like a fresh clone; every one of them must end with 0.

Not here: which commands a page has (shell_blocks.py).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from conftest import photograph
from make_pictures import jpeg, write_files
from shell_blocks import ROOT, Block, session, shell_blocks

CLASSES = ("aster", "daisy", "iris", "lily", "rose", "tulip")
NUM_TRAIN, NUM_VAL = 32, 10  # of each class
COLOURS = np.array([(220, 40, 40), (40, 200, 40), (40, 60, 220), (220, 210, 40), (200, 40, 200), (40, 200, 210)])

CLOSED = """trap - EXIT
others=$(jobs -p)
for one in $others; do kill -- -$one; done
for one in $others; do wait $one; done"""
"""As by Ctrl-C in every other terminal; what ran there must end with 0, too."""


class Page:
    """The commands of a page in order, taken a few at a time: what nobody took was not tried."""

    def __init__(self, name: str, choices: Mapping[str, str]) -> None:
        """choices: what a reader puts in place of what the page has. Each must be on the page."""
        with tempfile.TemporaryDirectory() as folder:
            noted = session(blocks_of(name), Path(folder)).commands
        self.left = [shlex.join(command.argv) for command in noted]
        for written, chosen in choices.items():
            assert any(written in line for line in self.left), f"{name} has no {written}"
            self.left = [line.replace(written, chosen) for line in self.left]

    def take(self, pattern: str, number: int) -> list[str]:
        """The commands in which a pattern is found; there must be so many."""
        taken = [line for line in self.left if re.search(pattern, line)]
        assert len(taken) == number, self.left
        self.left = [line for line in self.left if line not in taken]
        return taken


def blocks_of(page: str) -> list[Block]:
    return shell_blocks((ROOT / page).read_text())


def clone(folder: Path) -> Path:
    """What `git clone` and `make install` leave: the repository's files, and .venv."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(folder / name, (0, 0))  # older than .venv/installed, as after `make install`
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def pictures(root: Path, *, split: bool = True, labels: bool = True, number: int = NUM_TRAIN) -> Path:
    """Folders of pictures; a class has a colour."""
    rng = np.random.default_rng((2021, 6))
    for label, name in enumerate(CLASSES):
        for part, count in {"train": number, "val": NUM_VAL if split else 0}.items():
            folder = root / (part if split else "") / (name if labels else "")
            folder.mkdir(parents=True, exist_ok=True)
            for place in range(count):
                pixels = 0.5 * np.asarray(photograph(rng, 40, 48)) + 0.5 * COLOURS[label]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}_{place:02d}.jpg", quality=90)
    return root


def flowers(root: Path) -> Path:
    """The official layout of Flowers102, with 128 pictures of a few of its classes."""
    rng = np.random.default_rng(102)
    order = rng.permutation(128) + 1
    mats = {
        "imagelabels.mat": {"labels": [rng.integers(1, 103, 128)]},
        "setid.mat": {"trnid": [order[:96]], "valid": [order[96:112]], "tstid": [order[112:]]},
    }
    files = {f"jpg/image_{number:05d}.jpg": jpeg(number) for number in range(1, 129)}
    for name, arrays in mats.items():
        buffer = io.BytesIO()
        scipy.io.savemat(buffer, arrays)
        files[name] = buffer.getvalue()
    return write_files(root, files)


def make_with(**variables: str) -> dict[str, str]:
    """The environment in which make has these variables, whatever its file says."""
    escaped = (f"{name}={value}".replace(" ", "\\ ") for name, value in variables.items())
    return {"MAKEFLAGS": " ".join(escaped), "MAKELEVEL": "0"}


def typed(script: Sequence[str], folder: Path, timeout_s: float, **environment: str) -> str:
    """What one bash says to these lines; every command must end with 0."""
    lines = ["set -eum", *script]  # m: what runs in the background is a group of its own, and ends as one
    process = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-c", "\n".join(lines)],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        said = process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        end(process)
        pytest.fail(f"not done within {timeout_s} s:\n{process.communicate()[0][-6000:]}")
    assert process.returncode == 0, said[-6000:]
    return said


def end(bash: subprocess.Popen) -> None:
    """It, and all that it has begun."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(int(entry.name)) == bash.pid:
                os.kill(int(entry.name), signal.SIGTERM)


def in_background(line: str, log: str = "second_terminal.log") -> str:
    """Another terminal: it is left running until CLOSED, or until the session ends."""
    return f"(trap : TERM\n{line}) > {log} 2>&1 &\ntrap 'for one in $(jobs -p); do kill -- -$one; done; wait' EXIT"
