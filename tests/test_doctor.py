"""`funmatch doctor` on planted faults, real ones where a test can plant them: each is found, with a cure."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

from conftest import RedisServer, free_port, serve
from data_prep.index import Index
from funmatch import doctor, machine
from student_trainer import checkpoint
from student_trainer.config import settings
from student_trainer.recipes import RECIPES


@pytest.fixture(scope="module")
def teachers(tiny_model: Path, large_model: Path, tiny_data: Path):
    """Addresses of two different teachers, of which the second has no data set."""
    with serve((tiny_model, tiny_data), (large_model,)) as addresses:
        yield addresses


@pytest.fixture
def examine(capsys, tmp_path):
    """Ask the doctor; its exit code, and the findings that are not ok, by check."""

    def ask(*flags: str, device: str = "cpu") -> tuple[int, dict[str, str]]:
        own = [] if "--run-dir" in flags else ["--run-dir", str(tmp_path / "run")]
        code = doctor.main(["--json", "--device", device, *own, *flags])
        findings = json.loads(capsys.readouterr().out)["findings"]
        assert not [one for one in findings if ".. " in one["says"] or one["says"].endswith(".")], "one full stop each"
        return code, {one["check"]: f"{one['state']}: {one['says']} | {one['do']}" for one in findings
                      if one["state"] != "ok"}  # fmt: skip

    return ask


def test_where_all_is_well_it_says_so_line_by_line(teachers, tiny_data, tmp_path, capsys):
    flags = ["--device", "cpu", "--data", str(tiny_data), "--teacher", teachers[0], "--port", str(free_port())]
    code = doctor.main([*flags, "--run-dir", str(tmp_path), "--store", str(tmp_path / "store")])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "look"}  # a small disk or /dev/shm is the machine's own
    assert lines[-1].startswith("0 broken")
    said = "\n".join(lines)
    for what in ("python", "torch", "dali", "pictures", "free", "serves", "travel as row numbers", "would begin there"):
        assert what in said


def test_a_closed_port_is_a_teacher_that_cannot_be_reached(examine):
    code, found = examine("--teacher", f"127.0.0.1:{free_port()}")
    assert code == 1
    assert "cannot be reached: UNAVAILABLE" in found["teacher"]
    assert "start it" in found["teacher"]


def test_an_address_that_is_none_is_said(examine):
    assert "is no address of a teacher" in examine("--teacher", "localhost")[1]["teacher"]


def test_a_port_that_is_taken_is_found(examine):
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        port = somebody.getsockname()[1]
        code, found = examine("--port", str(port))
    assert code == 1
    assert "Address already in use" in found[f"port {port}"]
    assert "choose another port" in found[f"port {port}"]


def test_a_replica_with_another_fingerprint_is_found(examine, teachers):
    code, found = examine("--teacher", ",".join(teachers))
    assert code == 1
    assert "not replicas of one teacher" in found["fingerprint"]


def test_one_teacher_given_as_two_is_found(examine, teachers):
    assert "one and the same teacher" in examine("--teacher", teachers[0], teachers[0])[1]["teachers"]


def test_a_teacher_without_the_data_set_is_worth_a_look(examine, teachers, tiny_data):
    code, found = examine("--teacher", teachers[1], "--data", str(tiny_data))
    assert code == 0
    assert "pictures would travel as files" in found["data at teacher"]


def test_a_teacher_of_other_classes_is_found(examine, teachers, tmp_path):
    from data_prep.prepare import prepare

    digits = tmp_path / "digits"
    prepare("digits", None, digits, workers=1, progress=False)
    code, found = examine("--teacher", teachers[0], "--data", str(digits))
    assert code == 1
    assert "has 6 classes" in found["classes"]


def test_a_missing_shard_is_found(examine, tiny_data, tmp_path):
    moved = shutil.copytree(tiny_data, tmp_path / "moved")
    (moved / "train-000001.tar").unlink()
    code, found = examine("--data", str(moved))
    assert code == 1
    assert "train-000001.tar is missing" in found["data"]


def test_a_damaged_shard_is_found(examine, tiny_data, tmp_path):
    rotten = shutil.copytree(tiny_data, tmp_path / "rotten")
    shard = rotten / "train-000001.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    code, found = examine("--data", str(rotten))
    assert code == 1
    assert "train-000001.tar" in found["pictures"]
    assert "data_prep.check" in found["pictures"]


def test_a_folder_without_a_data_set_is_found(examine, tmp_path):
    assert "holds no prepared data set" in examine("--data", str(tmp_path))[1]["data"]


def test_shared_memory_without_room_is_found(examine):
    code, found = examine("--shm", "/proc")  # a file system of no bytes
    assert code == 1
    assert "--shm-size" in found["shared memory"]


def test_a_run_folder_that_cannot_be_written_is_found(examine):
    code, found = examine("--run-dir", "/proc/run")
    assert code == 1
    assert "cannot be written" in found["disk"]


def test_a_full_disk_is_found(examine, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10 * 2**20)
    monkeypatch.setattr("funmatch.machine.shutil.disk_usage", lambda _: usage)
    assert "not enough for a checkpoint" in examine()[1]["disk"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_was_asked_for_and_is_not_there_is_found(examine):
    code, found = examine(device="cuda")
    assert code == 1
    assert "torch sees no CUDA device" in found["cuda"]
    assert examine(device="auto")[0] == 0


def test_a_full_gpu_is_found_with_who_holds_it(examine, tmp_path, monkeypatch):
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text(
        "#!/bin/sh\ncase $1 in\n"
        "*query-gpu*) echo 'GPU-1, 0, H100, 580.1, 81559, 900'; echo 'GPU-2, 1, H100, 580.1, 81559, 81000';;\n"
        "*) echo 'GPU-1, 4242, python, 80000';;\nesac\n"
    )
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{driver.parent}:{os.environ['PATH']}")
    code, found = examine()
    assert code == 1
    assert "held by pid 4242 python (80000 MiB)" in found["gpu 0"]
    assert "gpu 1" not in found


def test_an_old_torch_is_found(examine, tmp_path, monkeypatch):
    stand_in = tmp_path / "torch-2.1.0.dist-info"
    stand_in.mkdir()
    (stand_in / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, found = examine()
    assert code == 1
    assert "version 2.1.0 is older than 2.11" in found["torch"]


@pytest.mark.parametrize(
    ("old", "new"), [("2.9.1", "2.11"), ("2.11.0a0", "2.11.1"), ("1.85.1", "1.85.3"), ("2.1", "10")]
)
def test_versions_are_compared_as_numbers(old, new):
    assert machine._numbers(old) < machine._numbers(new)
    assert machine._numbers("2.11.0+cu130") == machine._numbers("2.11")


def test_a_store_that_cannot_be_reached_is_found_and_its_password_is_not_shown(examine):
    code, found = examine("--store", f"redis://me:secret@127.0.0.1:{free_port()}")
    assert code == 1
    assert "cannot be used" in found["store"]
    assert "secret" not in str(found)


@pytest.mark.parametrize(
    ("options", "found_is"),
    [
        ((), None),
        (("--maxmemory", "100mb"), None),
        (("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"), "look: "),
        (("--maxmemory", "100kb"), "broken: "),
    ],
)
def test_a_store_that_is_full_or_forgets_is_found(examine, tmp_path, options, found_is):
    server = RedisServer(tmp_path, *options)
    try:
        found = examine("--store", server.url)[1].get("store")
    finally:
        server.stop()
    if found_is is None:
        assert found is None
    else:
        assert found.startswith(found_is)
        assert {"look: ": "forgets (allkeys-lru)", "broken: ": "raise its maxmemory"}[found_is] in found


def save_run(folder: Path, data: str, teacher: str) -> None:
    config = RECIPES["digits/demo"].config
    identity = {"data": data, "teacher": teacher}
    checkpoint.save(folder, {"step": 7, "config": settings(config), "identity": identity})


def test_a_run_folder_of_other_settings_data_and_teachers_is_found(examine, teachers, tiny_data, tmp_path):
    save_run(tmp_path, data="another", teacher="another")
    again = ["--run-dir", str(tmp_path), "--recipe", "digits/demo"]
    assert examine(*again)[0] == 0
    code, found = examine(*again, "--", "--optim.lr", "0.25")
    assert code == 1
    assert "0.25 now" in found["run folder"]
    assert "learned from another data set" in examine(*again, "--data", str(tiny_data))[1]["run folder"]
    assert "learned from other teachers" in examine(*again, "--teacher", teachers[0])[1]["run folder"]
    save_run(tmp_path, data=Index.open(tiny_data).digest, teacher="")
    assert examine(*again, "--data", str(tiny_data))[0] == 0


def test_a_run_folder_whose_checkpoints_are_damaged_is_found(examine, tmp_path):
    save_run(tmp_path, data="", teacher="")
    next((tmp_path / "checkpoints").glob("*.pt")).write_bytes(b"cut")
    assert "are damaged" in examine("--run-dir", str(tmp_path))[1]["run folder"]


def test_files_of_credentials_that_are_not_there_are_found(examine, teachers, tmp_path):
    assert "--teacher.tls-ca" in examine("--teacher", teachers[0], "--tls-ca", str(tmp_path / "ca"))[1]["credentials"]


def test_a_damaged_checkpoint_with_a_good_one_before_it_is_worth_a_look(examine, tmp_path):
    save_run(tmp_path, data="", teacher="")
    (good,) = (tmp_path / "checkpoints").glob("*.pt")
    good.with_name("step_00000009.pt").write_bytes(b"cut")
    code, found = examine("--run-dir", str(tmp_path))
    assert code == 0
    assert (
        found["run folder"].startswith("look: ") and "GOING BACK to the checkpoint before it |" in found["run folder"]
    )
