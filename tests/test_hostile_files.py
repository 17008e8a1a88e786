"""What no file can do: weights and checkpoints are read, and never run."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import models
from student_trainer import checkpoint

ROOT = Path(__file__).resolve().parents[1]


class Evil:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def test_no_weight_file_runs_code(tmp_path):
    trace = tmp_path / "it_ran"
    for name in ("evil.pt", "evil.bin", "evil.ckpt"):
        torch.save({"weight": Evil(trace)}, tmp_path / name)
        with pytest.raises(ValueError, match="file runs code when it is opened"):
            models.load(tmp_path / name)
    for name in ("evil.safetensors", "evil.npz"):  # the names lie
        torch.save({"weight": Evil(trace)}, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            models.load(tmp_path / name)
    np.savez(tmp_path / "objects.npz", **{"root_block/conv_root/kernel": np.array([Evil(trace)], dtype=object)})
    with pytest.raises(ValueError, match="plain arrays"):
        models.load(tmp_path / "objects.npz")
    assert not trace.exists()


def test_no_checkpoint_runs_code(tmp_path):
    trace = tmp_path / "it_ran"
    torch.save({"step": 1, "student": Evil(trace)}, tmp_path / "step_00000001.pt")
    with pytest.raises(checkpoint.DamagedError, match="step_00000001"):
        checkpoint.load(tmp_path / "step_00000001.pt")
    assert not trace.exists()


def test_a_lying_safetensors_file_is_refused_in_a_sentence(tmp_path):
    file = tmp_path / "m.safetensors"
    save_file({"weight": torch.zeros(4)}, file)
    honest = file.read_bytes()
    lies = {
        "a header of 2^63 bytes": (2**63 - 1).to_bytes(8, "little") + honest[8:],
        "a header beyond the file": (2**20).to_bytes(8, "little") + honest[8:],
        "data beyond the file": honest.replace(b"[0,16]", b"[0,99]"),
        "a shape that overflows": honest.replace(b"[4]", b"[4294967296,4294967296]"),
    }
    for name, lie in lies.items():
        assert lie != honest
        file.write_bytes(lie)
        with pytest.raises(ValueError, match=r"m\.safetensors"):
            models.load(file, "resnet18")
            pytest.fail(name)


def test_a_card_cannot_send_us_to_another_place_for_weights(tmp_path):
    file = tmp_path / "m.safetensors"
    card = '{"architecture": "hf-hub:evil/model", "num_classes": 2, "size": 32, "mean": [0,0,0], "std": [1,1,1]}'
    save_file({"weight": torch.zeros(4)}, file, metadata={"funmatch": card})
    with pytest.raises(ValueError, match="unknown architecture"):
        models.load(file)


PLAIN_LOADS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
NEVER = {"pickle.load", "pickle.loads", "marshal.loads", "yaml.load", "eval", "exec", "torch.jit.load"}


def test_nothing_in_the_code_loads_a_pickle():
    """torch.load and np.load say so with every call; the object broadcast between the ranks of a job stands alone."""
    broadcasts = []
    for file in sorted(ROOT.glob("[a-z]*/*.py")):
        if file.parent.name == "tests":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in NEVER, f"{file}:{node.lineno} calls {name}"
            if name in PLAIN_LOADS:
                said = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords
                        if isinstance(keyword.value, ast.Constant)}  # fmt: skip
                key, value = PLAIN_LOADS[name]
                assert said.get(key) is value, f"{file}:{node.lineno}: {name} without {key}={value}"
            if name.endswith("broadcast_object_list"):
                broadcasts.append(file.name)
    assert broadcasts == ["world.py"]
