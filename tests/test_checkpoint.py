import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from student_trainer.checkpoint import DamagedError, FullDiskError, load, load_latest, refuse_other_settings, save


def state_of(step: int) -> dict:
    torch.manual_seed(step)
    net = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(1, 64)).sum().backward()
    optimizer.step()
    return {
        "step": step,
        "seed": 0,
        "student": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "config": {"lr": 0.003, "views": {"crop": "ic", "mean": (0.5, 0.5, 0.5)}},
        "fingerprints": {"teacher": "ab12", "data": "cd34"},
    }


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    state = state_of(7)
    assert save(tmp_path, state) == tmp_path / "checkpoints" / "step_00000007.pt"
    loaded = load_latest(tmp_path)
    assert loaded is not None
    for part in ("student", "step", "seed"):
        assert_same(loaded[part], state[part])
    assert loaded["config"] == state["config"]
    optimizer = torch.optim.AdamW(nn.Linear(64, 64).parameters())
    optimizer.load_state_dict(loaded["optimizer"])
    assert_same(optimizer.state_dict()["state"], state["optimizer"]["state"])


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert load_latest(tmp_path) is None


def test_the_newest_two_are_kept_and_the_newest_is_loaded(tmp_path):
    for step in (5, 50, 100_000_000, 400):  # the last one: went back and took another way
        save(tmp_path, state_of(step))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000050.pt", "step_00000400.pt"]
    latest = load_latest(tmp_path)
    assert latest is not None and latest["step"] == 400


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_newest_file_is_passed_over_with_a_warning(tmp_path, damage):
    save(tmp_path, state_of(1))
    newest = save(tmp_path, state_of(2))
    content = bytearray(newest.read_bytes())
    weights = content.find(state_of(2)["student"]["weight"].numpy().tobytes())
    assert weights > 0
    content[weights + 100] ^= 1  # one bit of one weight
    newest.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    with pytest.warns(RuntimeWarning, match=r"step_00000002.pt is damaged.*GOING BACK"):
        latest = load_latest(tmp_path)
    assert latest is not None and latest["step"] == 1


def test_after_going_back_the_next_save_survives_even_if_only_one_is_kept(tmp_path):
    save(tmp_path, state_of(1))
    save(tmp_path, state_of(9)).write_bytes(b"damaged")
    save(tmp_path, state_of(3), keep=1)
    latest = load_latest(tmp_path)
    assert latest is not None and latest["step"] == 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_only_damaged_checkpoints_stop_the_run_instead_of_starting_over(tmp_path):
    for step in (1, 2):
        save(tmp_path, state_of(step)).write_bytes(b"damaged")
    with pytest.raises(DamagedError, match=r"all 2 checkpoints in .* are damaged: delete"):
        load_latest(tmp_path)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"step": 1, "student": Path.cwd}, path)
    with pytest.raises(DamagedError, match=r"evil\.pt"):
        load(path)


SAVES_FOR_EVER = """
import sys, torch
from pathlib import Path
from student_trainer.checkpoint import save
weights, step = torch.arange(2_000_000.0), 0
while True:
    step += 1
    save(Path(sys.argv[1]), {"step": step, "student": weights + step})
    print(step, flush=True)
"""


def test_kill_9_in_the_middle_of_saving_leaves_whole_checkpoints(tmp_path):
    for round_ in range(3):
        run_dir = tmp_path / str(round_)
        command = [sys.executable, "-c", SAVES_FOR_EVER, str(run_dir)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            done = int(process.stdout.readline())
            # Wait until the next file is being written, then a little longer each round.
            while not list((run_dir / "checkpoints").glob("*.tmp")):
                time.sleep(0.0005)
            time.sleep(0.004 * round_)
            process.kill()
        latest = load_latest(run_dir)  # a warning here would fail the test
        assert latest is not None and latest["step"] >= done
        assert_same(latest["student"], torch.arange(2_000_000.0) + latest["step"])
        save(run_dir, {"step": latest["step"] + 1})
        assert not list((run_dir / "checkpoints").glob("*.tmp"))


def test_other_settings_are_refused_by_name_with_both_values():
    saved = {"lr": 0.003, "views": {"crop": "ic", "size": 128}, "log_every": 10, "teacher": {"address": ["a"]}}
    now = {"lr": 0.001, "views": {"crop": "rc", "size": 128}, "log_every": 50, "teacher": {"address": ["b"]}}
    now["seed"] = 1
    with pytest.raises(ValueError, match="started with other settings") as refusal:
        refuse_other_settings(saved, now, may_change={"log_every", "teacher"})
    lines = str(refusal.value).splitlines()
    assert lines[1:-1] == [
        "  lr: 0.003 in the checkpoint, 0.001 now",
        "  seed: '(absent)' in the checkpoint, 1 now",
        "  views.crop: 'ic' in the checkpoint, 'rc' now",
    ]


def test_same_settings_pass_also_when_tuples_came_back_as_lists():
    refuse_other_settings({"mean": [0.5, 0.5], "a": {"b": None}}, {"mean": (0.5, 0.5), "a": {"b": None}})


@pytest.mark.parametrize("size", [10, 200_000])
def test_a_full_disk_is_said_and_leaves_the_older_ones_whole_and_no_rubbish(tmp_path, size):
    for step in (5, 6):
        save(tmp_path, state_of(step))
    (tmp_path / "checkpoints" / "step_00000007.tmp").symlink_to("/dev/full")
    with pytest.raises(FullDiskError, match=r"for the checkpoint of step 7; there are whole ones of step 6 and 5:"):
        save(tmp_path, {"step": 7, "student": torch.zeros(size)})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000005.pt",
        "step_00000006.pt",
    ]
    save(tmp_path, state_of(7))
    assert load_latest(tmp_path)["step"] == 7


def test_a_full_disk_is_known_behind_the_error_that_torch_makes_of_it(tmp_path, monkeypatch):
    """As it is on a small tmpfs: the archive does not end where it should, because of the file's own error."""

    def out_of_room(_state, _file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", out_of_room)
    with pytest.raises(FullDiskError, match=r"whole ones of step \(none\)"):
        save(tmp_path, state_of(7))
    monkeypatch.setattr(torch, "save", lambda _state, _file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path, state_of(7))
