import contextlib
import json
import math
import subprocess

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from student_trainer.metrics import FILE, Metrics, read


@pytest.fixture
def disk_of(tmp_path):
    """Makes a disk of so many bytes in memory, as only root may."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(num_bytes: int):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a small disk cannot be made here: {done.stderr.strip()}")
        return folder

    yield make
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def test_each_step_is_one_json_line_readable_while_the_run_goes_on(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, {"loss": 2.5, "images_per_s": 100})
        metrics.write(2, {"loss": 2.25, "eval/kl": 0.5})
        lines = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 2.5, "images_per_s": 100},
        {"step": 2, "loss": 2.25, "eval/kl": 0.5},
    ]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, {"loss": math.nan, "norm": math.inf, "absent": None})
    assert read(tmp_path) == [{"step": 1, "loss": None, "norm": None, "absent": None}]


def test_a_resumed_run_has_every_step_once(tmp_path):
    with Metrics(tmp_path) as metrics:
        for step in range(1, 8):
            metrics.write(step, {"loss": step})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    with Metrics(tmp_path, resumed_step=4) as metrics:
        for step in range(5, 9):
            metrics.write(step, {"loss": 10 * step})
    assert [line["step"] for line in read(tmp_path)] == list(range(1, 9))
    assert [line["loss"] for line in read(tmp_path)] == [1, 2, 3, 4, 50, 60, 70, 80]


def test_a_resume_before_the_first_line_starts_the_record_anew(tmp_path):
    with Metrics(tmp_path, resumed_step=0) as metrics:
        metrics.write(1, {"loss": 1.0})
    assert len(read(tmp_path)) == 1


def test_a_new_run_refuses_a_folder_with_a_record(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, {"loss": 1.0})
    with pytest.raises(ValueError, match="another run's record"):
        Metrics(tmp_path)


def test_tensorboard_shows_the_same_numbers_and_no_step_twice_after_a_resume(tmp_path):
    with Metrics(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"loss": float(step), "eval/kl": 0.5})
    with Metrics(tmp_path, resumed_step=3) as metrics:
        for step in range(4, 7):
            metrics.write(step, {"loss": 10.0 * step, "nan": math.nan})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "eval/kl"}
    points = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]


def test_what_finds_no_room_on_the_disk_is_written_when_there_is_some(tmp_path, disk_of, caplog):
    run_dir = disk_of(96 * 1024)
    filler = run_dir / "filler"
    with Metrics(run_dir) as metrics:
        metrics.write(1, {"loss": 1.0})
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for step in range(2, 200):  # more than what is left of the last blocks
            metrics.write(step, {"loss": float(step), "images_per_s": 1 / step})
        assert 1 <= len(read(run_dir)) < 199
        assert caplog.text.count("metrics.jsonl: what belongs there waits in memory") == 1
        filler.unlink()
        metrics.write(200, {"loss": 200.0})
    steps = list(range(1, 201))
    assert [line["step"] for line in read(run_dir)] == steps
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(s, float(s)) for s in steps]


def test_what_never_finds_room_is_said_to_be_lost(tmp_path, caplog):
    (tmp_path / FILE).symlink_to("/dev/full")
    with Metrics(tmp_path, resumed_step=None) as metrics:
        metrics.write(1, {"loss": 1.0})
        metrics.write(2, {"loss": 1.0})
    assert caplog.text.count("waits in memory") == 1
    assert "still no room on the disk of" in caplog.text
    assert "its last 50 bytes are lost" in caplog.text
