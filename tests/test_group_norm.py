"""teacher_server/group_norm.py: what it computes, through Triton's interpreter, and what it compiles to for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]


def test_the_kernel_computes_what_a_slow_reference_does():
    """tests/through_interpreter.py, whose output is shown if one of its tests fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/through_interpreter.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("channels", "pixels", "adds"), [(128, 3136, False), (2048, 196, True)], ids=["several groups", "with a sum"]
)
def test_the_kernel_compiles_for_an_h100_with_wide_loads_and_nothing_spilt(
    channels, pixels, adds, tmp_path, monkeypatch
):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from teacher_server import group_norm

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    sizes = group_norm.sizes(channels, 32, pixels, adds=adds)
    pointers = ("x_ptr", "branch_ptr", "sum_ptr", "out_ptr", "weight_ptr", "bias_ptr")
    halves = dict.fromkeys(pointers[:4], "*fp16") | dict.fromkeys(pointers[4:], "*fp32")
    source = ASTSource(
        fn=group_norm._add_norm_relu,
        signature=halves | {"pixels": "i32", "eps": "fp32"} | dict.fromkeys(sizes, "constexpr"),
        constexprs=sizes,
        attrs={(place,): [["tt.divisibility", 16]] for place in range(len(pointers))},  # as allocators align
    )
    options = {"num_warps": group_norm.WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    loads = [line.split()[0] for line in compiled.asm["ptx"].splitlines() if "ld.global" in line]
    assert sum("v4" in load for load in compiled.asm["ptx"].split() if load.startswith("ld.global")) >= 8, loads
    (tmp_path / "kernel").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", tmp_path / "kernel"], capture_output=True, text=True, check=True
    ).stdout
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage
    (registers,) = [int(word[4:]) for word in usage.split() if word.startswith("REG:")]
    assert registers <= 128, "no two programs of 256 threads fit a multiprocessor"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(4, 128, 56, 56), (4, 2048, 14, 14), (3, 4096, 7, 7), (2, 96, 9, 5)])
def test_on_cuda_the_kernel_says_what_torch_says(shape):
    from teacher_server.group_norm import add_group_norm_relu, group_norm_relu

    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *sizes: torch.randn(*sizes, generator=generator, device="cuda")  # noqa: E731
    x, branch = (draw(*shape).half().contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = draw(shape[1]), draw(shape[1])
    norm = lambda of: torch.nn.functional.group_norm(of.double(), 32, weight.double(), bias.double(), 1e-5).relu()  # noqa: E731
    torch.testing.assert_close(
        group_norm_relu(x, weight, bias, 32, 1e-5).double(), norm(x), rtol=2**-10, atol=1e-5
    )  # fmt: skip
    total, out = add_group_norm_relu(x, branch, weight, bias, 32, 1e-5)
    assert torch.equal(total, x + branch)
    torch.testing.assert_close(out.double(), norm(x + branch), rtol=2**-10, atol=1e-5)
