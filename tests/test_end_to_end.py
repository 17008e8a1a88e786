"""The whole path with its real parts: torchrun, two gloo ranks, DALI, a teacher process behind gRPC, kill -9."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
# What torchrun needs to begin again, as the image says it.
RESTARTS = dict(re.findall(r"^ENV (TORCH_\w+)=(\S+)$", (ROOT / "docker" / "student.Dockerfile").read_text(), re.M))
STEPS = 40
CHECKPOINT_EVERY = 10


@dataclass
class Teacher:
    """A teacher server in a process of its own."""

    process: subprocess.Popen
    address: str

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start_teacher(model: Path, data: Path, folder: Path, address: str = "127.0.0.1:0") -> Teacher:
    address_file = folder / f"address-{time.monotonic_ns()}"
    process = subprocess.Popen(
        [sys.executable, "-m", "teacher_server.main", f"--model={model}", f"--data={data}", f"--address={address}",
         f"--address-file={address_file}", "--device=cpu", "--threads=1", "--batch-rows=16"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not address_file.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the teacher did not come up"
        time.sleep(0.05)
    return Teacher(process, address_file.read_text().strip())


@pytest.fixture(scope="module")
def teachers(tiny_model, tiny_data, tmp_path_factory):
    """Two replicas; a test that kills one starts it again."""
    folder = tmp_path_factory.mktemp("teachers")
    fleet = [start_teacher(tiny_model, tiny_data, folder) for _ in range(2)]
    yield fleet
    for teacher in fleet:
        teacher.kill()


def command(data: Path, run_dir: Path, *addresses: str, ranks: int = 2) -> list[str]:
    return [
        TORCHRUN, f"--nproc_per_node={ranks}", "--master_port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
        str(ROOT / "student_trainer" / "main.py"), "--recipe=digits/demo", f"--data={data}",
        f"--run-dir={run_dir}", "--data.evaluate=val", "--student.architecture=test_byobnet", "--student.size=32",
        "--optim.batch-size=32", f"--optim.epochs={STEPS * 32 / 18}", "--optim.warmup-steps=5", "--device=cpu",
        "--teacher.rows-per-request=8", "--teacher.audit-every=5", f"--checkpoint-every={CHECKPOINT_EVERY}",
        "--evaluate-every=0", "--decode-threads=1", "--teacher.deadline-s=20", "--teacher.patience-s=90",
        *(["--teacher.addresses", ",".join(addresses)] if addresses else []),
    ]  # fmt: skip


def start(args: list[str], cwd: Path, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        args, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-4000:]
    return output


def lines(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []  # the last line may be half-written
    return [json.loads(line) for line in whole]


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in lines(run_dir)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.01)


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(teachers, tiny_data, tmp_path_factory) -> Path:
    """A run of two ranks and two teachers that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(command(tiny_data, run_dir, *(t.address for t in teachers)), run_dir.parent))
    return run_dir


def test_a_run_leaves_its_numbers_its_model_and_its_pictures(undisturbed):
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["images_seen"] == STEPS * 32
    assert summary["view_mismatch_max"] == 0, "one machine, one decoder: the same views to the last bit"
    assert summary["views_audited_at_steps"] == STEPS / 5
    assert summary["examples"] == 6, "each example once, on two ranks"
    assert {"teacher_top1", "student_top1", "agreement_top1", "kl", "images_per_s"} <= set(summary)
    record = lines(undisturbed)
    assert [line["step"] for line in record] == list(range(1, STEPS + 1))
    assert all(line["loss"] is not None and line["loss"] > 0 for line in record)
    for name in ("report.png", "first_batch.png", "config.json", "model.safetensors", "tensorboard"):
        assert (undisturbed / name).exists(), name


def test_training_brings_the_student_nearer_to_the_teacher(undisturbed):
    losses = [line["loss"] for line in lines(undisturbed)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_a_run_killed_and_resumed_ends_with_the_same_weights(undisturbed, teachers, tiny_data, tmp_path):
    args = command(tiny_data, tmp_path / "run", *(t.address for t in teachers))
    process = start(args, tmp_path)
    wait_for_step(process, tmp_path / "run", 15)
    os.killpg(process.pid, signal.SIGKILL)  # torchrun
    for pid in ranks_of(tmp_path / "run"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run" / "summary.json").exists()
    output = finish(start(args, tmp_path))
    assert "going on from step 10" in output or "going on from step 20" in output
    assert weights(tmp_path / "run") == weights(undisturbed)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, STEPS + 1)), "no step twice"


def ranks_of(run_dir: Path) -> list[int]:
    """Processes whose command line names this run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if str(run_dir).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def test_a_run_that_a_signal_stops_is_no_finished_one_and_torchrun_starts_it_again_to_the_same_weights(
    undisturbed, teachers, tiny_data, tmp_path
):
    args = command(tiny_data, tmp_path / "run", *(t.address for t in teachers))
    process = start([args[0], "--max-restarts=1", *args[1:]], tmp_path, **RESTARTS)
    wait_for_step(process, tmp_path / "run", 13)
    os.kill(max(set(ranks_of(tmp_path / "run")) - {process.pid}), signal.SIGTERM)  # one rank: its host is to go
    output = finish(process)
    (step,) = re.findall(r"stopped at step (\d+) by a signal", output)
    assert f"going on from step {step}" in output
    assert weights(tmp_path / "run") == weights(undisturbed)


@pytest.mark.suite
def test_a_teacher_killed_in_the_middle_and_started_again_changes_nothing(
    undisturbed, teachers, tiny_model, tiny_data, tmp_path
):
    process = start(command(tiny_data, tmp_path / "run", *(t.address for t in teachers)), tmp_path)
    wait_for_step(process, tmp_path / "run", 8)
    address = teachers[0].address
    teachers[0].kill()
    teachers[0] = start_teacher(tiny_model, tiny_data, tmp_path, address)
    finish(process)
    assert weights(tmp_path / "run") == weights(undisturbed)


@pytest.mark.suite
def test_teachers_that_are_gone_end_all_ranks_together_and_nothing_is_lost(
    undisturbed, teachers, tiny_model, tiny_data, tmp_path
):
    """All replicas at once. The checkpoint is of the step that could not be made, between two others."""
    args = command(tiny_data, tmp_path / "run", *(t.address for t in teachers))
    process = start([*args, "--teacher.patience-s=3"], tmp_path)
    wait_for_step(process, tmp_path / "run", 12)
    for teacher in teachers:
        teacher.kill()
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    for rank in (0, 1):
        assert re.search(rf"rank {rank}: TeachersGoneError: no teacher has answered for \d+ s", output), output[-4000:]
    last = lines(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step_{last:08d}.pt").exists()
    for number, teacher in enumerate(teachers):
        teachers[number] = start_teacher(tiny_model, tiny_data, tmp_path, teacher.address)
    output = finish(start(args, tmp_path))
    assert f"going on from step {last}" in output
    assert weights(tmp_path / "run") == weights(undisturbed)


def test_one_rank_sees_the_rows_that_two_ranks_saw(undisturbed, teachers, tiny_data, tmp_path):
    """Not the same run: this student's BatchNorm sees 32 rows and not 16. But the teacher is asked the same."""
    finish(start(command(tiny_data, tmp_path / "run", teachers[1].address, ranks=1), tmp_path))
    one, two = lines(tmp_path / "run"), lines(undisturbed)
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-6), "the head is zero: no statistics matter yet"
    for name in ("teacher_entropy", "lr"):
        assert [line[name] for line in one] == pytest.approx([line[name] for line in two], rel=1e-5)


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(undisturbed, teachers, tiny_data):
    args = command(tiny_data, undisturbed, teachers[1].address, ranks=1)
    before = weights(undisturbed)
    again = finish(start(args, undisturbed.parent))
    assert "finished" in again
    assert weights(undisturbed) == before
    process = start([*args, "--optim.lr=0.5", "--seed=4"], undisturbed.parent)
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "optim.lr: 0.003 in the checkpoint, 0.5 now" in output
    assert "seed: 0 in the checkpoint, 4 now" in output
    assert "rank 0: ValueError: this run was started with other settings" in output
    assert "student_trainer/train.py" not in output, "a sentence, not a traceback"


@pytest.mark.suite
def test_a_run_without_addresses_starts_a_teacher_of_its_own(tiny_model, tiny_data, tmp_path):
    """From another folder, with one rank; labels-only training of two ranks is next."""
    args = [*command(tiny_data, tmp_path / "run", ranks=1), f"--teacher.model={tiny_model}", "--optim.epochs=16"]
    finish(start(args, tmp_path))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["view_mismatch_max"] == 0
    log = (tmp_path / "run" / "teacher.log").read_text()
    assert "stopped" in log, "the teacher ends with the run"


@pytest.mark.suite
def test_supervised_mode_learns_from_labels_and_stops_on_a_loss_that_is_no_number(tiny_data, tmp_path):
    labels = ["--targets=labels", "--optim.epochs=20"]
    finish(start([*command(tiny_data, tmp_path / "run"), *labels], tmp_path))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "student_top1" in summary and "teacher_top1" not in summary
    process = start(
        [*command(tiny_data, tmp_path / "bad"), *labels, "--optim.lr=1e30", "--optim.warmup-steps=0"], tmp_path
    )
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert re.search(r"the (loss|grad_norm) is (nan|inf) at step \d+, on all ranks, before the update", output), output[
        -4000:
    ]
