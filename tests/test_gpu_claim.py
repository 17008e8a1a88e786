"""Replicas that see the same GPUs take one each. Real processes; the GPUs are those of an nvidia-smi of the tests."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from teacher_server.gpu_claim import visible_gpus
from teacher_server.main import main

ROOT = Path(__file__).resolve().parents[1]
GPUS = tuple(f"GPU-{number:08d}-d33d-2b2c-524d-9e3d8d2b8a77" for number in range(3))
# Takes a GPU, says which, and keeps it until standard input closes.
CLAIMANT = """
import os, sys
from pathlib import Path
from teacher_server.gpu_claim import claim
taken = claim(Path(sys.argv[1]))
assert os.environ["CUDA_VISIBLE_DEVICES"] == taken.gpu
assert "torch" not in sys.modules
print(taken.gpu, flush=True)
sys.stdin.read()
"""


def listing(*gpus: str) -> str:
    return "".join(f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: {gpu})\n" for number, gpu in enumerate(gpus))


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Say what nvidia-smi prints from now on, and with which exit code."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def says(text: str, code: int = 0) -> None:
        (folder / "listing").write_text(text)
        command = folder / "nvidia-smi"
        command.write_text(f'#!/bin/sh\n[ "$1" = -L ] && cat {folder}/listing && exit {code}\n')
        command.chmod(0o755)

    says(listing(*GPUS))
    return says


@pytest.fixture
def start(tmp_path: Path, say):
    """Start a claimant; gives the process once it has said what it took."""
    running: list[subprocess.Popen] = []

    def begin() -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIMANT, str(tmp_path / "locks")],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def test_each_process_takes_another_gpu_and_the_fourth_is_told_who_has_them(start):
    claimants = [start() for _ in GPUS]
    assert tuple(gpu for _, gpu in claimants) == GPUS
    refused, said = start()
    assert said == ""
    _, error = refused.communicate()
    assert "NoFreeGpuError: no GPU is free" in error
    for process, gpu in claimants:
        assert f"{gpu} by pid {process.pid} on {os.uname().nodename}" in error


def test_eight_that_start_at_once_never_share(tmp_path, say):
    command = [sys.executable, "-c", CLAIMANT, str(tmp_path / "locks")]
    several = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(8)
    ]
    taken = [process.stdout.readline().decode().strip() for process in several if process.stdout]
    for process in several:
        process.communicate()
    assert sorted(taken) == ["", "", "", "", "", *GPUS]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_however_a_process_ends_its_gpu_is_free_again(start, number):
    claimants = [start() for _ in GPUS]
    process, gpu = claimants[1]
    process.send_signal(number)
    process.wait()
    assert start()[1] == gpu


def test_a_program_that_the_holder_started_does_not_keep_the_gpu(tmp_path, say):
    code = (
        "import subprocess, sys; from pathlib import Path; from teacher_server.gpu_claim import claim;"
        "taken = claim(Path(sys.argv[1]));"
        "child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
        "print(child.pid, taken.gpu)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "locks")]
    outcomes = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(2)]
    pids, gpus = zip(*(outcome.stdout.split() for outcome in outcomes), strict=True)
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)
    assert gpus == (GPUS[0], GPUS[0])


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        ("2,0", (GPUS[2], GPUS[0])),
        (GPUS[1], (GPUS[1],)),
        ("GPU-00000002", (GPUS[2],)),
        ("1,1", (GPUS[1],)),
    ],
)
def test_cuda_visible_devices_narrows_the_choice(say, monkeypatch, chosen, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == seen


def test_a_gpu_that_is_cut_into_instances_is_its_instances(say, monkeypatch):
    parts = "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", "MIG-0c757cd7-e942-5726-a0b8-0e8fb7067135"
    say(
        f"GPU 0: NVIDIA A100 (UUID: {GPUS[0]})\n"
        + "".join(f"  MIG 3g.20gb     Device  {n}: (UUID: {part})\n" for n, part in enumerate(parts))
        + f"GPU 1: NVIDIA A100 (UUID: {GPUS[1]})\n"
    )
    assert visible_gpus() == (*parts, GPUS[1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"1,{parts[1]}")
    assert visible_gpus() == (GPUS[1], parts[1])


@pytest.mark.parametrize(
    ("chosen", "text", "code", "sentence"),
    [
        ("7", listing(*GPUS), 0, "names '7', but nvidia-smi lists GPU-00000000"),
        ("", listing(*GPUS), 0, "sees no GPU, since CUDA_VISIBLE_DEVICES is ''"),
        (None, "No devices found.\n", 0, "sees no GPU; give it some"),
        (None, "Failed to initialize NVML: Driver/library version mismatch\n", 18, "Driver/library version mismatch"),
    ],
)
def test_without_a_gpu_to_claim_the_sentence_says_why(say, monkeypatch, chosen, text, code, sentence):
    say(text, code)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    with pytest.raises(ValueError, match=sentence):
        visible_gpus()


def serve(model: str, *flags: str) -> tuple[int, str]:
    """Exit code and standard error of a server that does not come up."""
    command = [sys.executable, "-m", "teacher_server.main", f"--model={model}", "--address=127.0.0.1:0", *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return run.returncode, run.stderr


def test_a_server_that_finds_no_free_gpu_ends_with_5(start, tmp_path, monkeypatch):
    holders = [start() for _ in GPUS]
    monkeypatch.setenv("FUNMATCH_CLAIM_GPU", str(tmp_path / "locks"))
    code, said = serve("none.safetensors")
    assert code == 5
    assert f"{GPUS[0]} by pid {holders[0][0].pid}" in said


def test_a_server_whose_gpu_does_not_work_does_not_fall_back_to_the_cpu(say, tmp_path, tiny_model):
    code, said = serve(str(tiny_model), f"--claim-gpu={tmp_path / 'locks'}")
    assert code == 2
    assert "cuda" in said.lower()


def test_claiming_and_naming_a_device_contradict_each_other(say, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main", "--model=x", f"--claim-gpu={tmp_path}", "--device=cuda:1"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--claim-gpu chooses the device itself" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_sentence(say, tmp_path):
    (tmp_path / "locks").write_text("a file")
    code, said = serve("none.safetensors", f"--claim-gpu={tmp_path / 'locks'}")
    assert code == 2
    assert "--claim-gpu needs a folder that this user can write" in said
