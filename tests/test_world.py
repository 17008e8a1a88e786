import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from student_trainer.world import World, join

REPOSITORY = Path(__file__).parents[1]

TWO_RANKS = """
import torch
from student_trainer.evaluate import Score, shard_of
from student_trainer.world import join

with join("cpu") as world:
    assert (world.size, world.device.type, world.connected) == (2, "cpu", True)
    ours = torch.tensor([1.0, 10.0]) * (world.rank + 1)
    assert world.all_sum(ours).tolist() == [3.0, 30.0]
    assert world.all_mean(ours).tolist() == [1.5, 15.0]
    assert ours.tolist() == [1.0 * (world.rank + 1), 10.0 * (world.rank + 1)]
    assert world.broadcast_object({"rank": world.rank}) == {"rank": 0}
    assert world.any_error(None) is None
    trouble = world.any_error(OSError("of rank 1") if world.rank else None)
    assert type(trouble) is OSError and str(trouble) == "of rank 1"
    world.barrier()

    score = Score(world.device, with_teacher=False)
    mine = torch.from_numpy(shard_of(range(5), world.rank, world.size))
    score.update(torch.eye(5)[mine], torch.tensor([0, 1, 2, 0, 0])[mine], None)
    result = score.result(world)
    assert result["eval/examples"] == 5 and result["eval/student_top1"] == 3 / 5
    world.say(f"only rank {world.rank} speaks")
assert not torch.distributed.is_initialized()
"""


def test_two_processes_of_torchrun_agree_and_leave_without_a_warning(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "only rank 0 speaks\n"
    assert "Warning" not in done.stderr, done.stderr


def test_without_torchrun_the_world_is_one_process_and_collectives_are_identities(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with join("cpu") as world:
        assert world == World()
        assert world.is_main
        assert world.all_mean(torch.tensor([2.0])).tolist() == [2.0]
        assert world.broadcast_object("value") == "value"
        assert world.any_error(None) is None
        assert str(world.any_error(KeyError("mine"))) == "'mine'"
        assert not torch.distributed.is_initialized()


def test_half_an_environment_is_refused_with_what_is_missing(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT, WORLD_SIZE is not"):
        join("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_more_processes_than_gpus_is_said_plainly(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"wants cuda:0, but it has 0 GPUs: .*--device cpu"):
        join("cuda")
