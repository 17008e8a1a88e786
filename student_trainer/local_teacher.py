"""A teacher beside the run, for runs that were given none: a server process of this machine that ends with us."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from student_trainer.config import Config
from student_trainer.world import World

_ROOT = Path(__file__).resolve().parents[1]
_LOAD_TIMEOUT_S = 900.0  # a large model downloads, folds, compiles and warms up


class TeacherDiedError(RuntimeError):
    """The teacher started beside the run ended, or did not come up in time."""


@contextlib.contextmanager
def teacher_beside(config: Config, world: World, number: int = 0) -> Iterator[str]:
    """Start `teacher_server` for config.teacher.model[number], and yield its address once it serves.

    The server holds our end of a pipe as its standard input: however this process ends, it ends too. Its log is
    run_dir/teacher.log; that of the second of an ensemble run_dir/teacher_1.log, and so on.

    Raises:
        TeacherDiedError: it ended, or did not come up; quotes the end of its log.
    """
    log_file = config.run_dir / (f"teacher_{number}.log" if number else "teacher.log")
    with tempfile.TemporaryDirectory(prefix="funmatch-") as folder, log_file.open("ab") as log:
        address_file = Path(folder) / "address"
        log.seek(0, os.SEEK_END)
        log_start = log.tell()
        server = subprocess.Popen(
            [*_command(config, world, number), f"--address-file={address_file}"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            # The server is no rank: torchrun's thread limit and variables are not meant for it.
            env={**_without_torchrun(os.environ), "PYTHONPATH": str(_ROOT)},
            start_new_session=True,  # Ctrl-C is for the trainer, which then closes the server's standard input
        )
        try:
            yield _wait_for_address(server, address_file, log_file, log_start)
        finally:
            assert server.stdin is not None
            server.stdin.close()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _command(config: Config, world: World, number: int) -> list[str]:
    device = world.device.type
    data = dict.fromkeys([config.data.root, config.data.evaluate_root or config.data.root])
    command = [
        sys.executable, "-m", "teacher_server.main", "--exit-when-stdin-closes", "--address=127.0.0.1:0",
        f"--model={config.teacher.model[number]}", "--data", *map(str, data), f"--device={device}",
        f"--interpolation={config.student.interpolation}", "--drain-s=10",
        "--antialias" if config.student.antialias else "--no-antialias",
    ]  # fmt: skip
    if config.teacher.size:
        command += [f"--size={config.teacher.size}"]
    if config.views.kind == "fix":  # all the views of a picture in one request
        command += [f"--max-rows={max(1024, config.views.fixed.num_views)}"]
        command += [f"--max-pending-rows={max(4096, 4 * config.views.fixed.num_views)}"]
    if device == "cpu":  # the ranks have a core each; what is left is the teacher's
        command += [f"--threads={max(1, len(os.sched_getaffinity(0)) - world.size)}"]
    return command


def _without_torchrun(environment: os._Environ[str]) -> dict[str, str]:
    ours = ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in environment.items() if k not in ours and not k.startswith("TORCHELASTIC")}


def _wait_for_address(server: subprocess.Popen[bytes], address_file: Path, log_file: Path, log_start: int) -> str:
    deadline = time.monotonic() + _LOAD_TIMEOUT_S
    while not address_file.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            state = f"ended with exit code {server.returncode}" if server.returncode is not None else "is not ready"
            log = log_file.read_bytes()[log_start:].decode(errors="replace")
            tail = "\n  ".join(log.splitlines()[-12:])
            raise TeacherDiedError(f"the teacher started beside this run {state}. The end of {log_file}:\n  {tail}")
        time.sleep(0.1)
    return address_file.read_text().strip()
