"""teacher_server/group_norm.py and fused.py on the CPU, through Triton's interpreter: test_group_norm.py runs this.

The interpreter must be chosen before Triton is imported, so it has a process of its own.
"""

from __future__ import annotations

import copy

import pytest
import torch

import models
from teacher_server import frozen, fused
from teacher_server.group_norm import add_group_norm_relu, group_norm_relu

NHWC = torch.channels_last
SHAPES = [  # N, C, H, W, groups
    (2, 128, 7, 9, 32),  # four channels a group, several groups a program
    (2, 512, 5, 3, 32),
    (1, 2048, 2, 3, 32),  # a group a program
    (2, 96, 1, 1, 32),  # one pixel; three channels a group are no power of two
    (1, 192, 5, 5, 32),
    (3, 32, 3, 3, 32),  # one channel a group
    (1, 40, 17, 13, 8),  # many tiles
    (2, 24, 4, 4, 3),  # an odd number of groups
]


def draw(*shape: int, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean


def halves(*shape: int, dtype=torch.float16, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    return draw(*shape, mean=mean, seed=seed).to(dtype).contiguous(memory_format=NHWC)


def slow(x, weight, bias, num_groups, eps):
    """In float64, one group after the other."""
    out = torch.empty_like(x, dtype=torch.float64)
    size = x.shape[1] // num_groups
    for picture in range(len(x)):
        for start in range(0, x.shape[1], size):
            group = x[picture, start : start + size].double()
            scaled = (group - group.mean()) / torch.sqrt(group.var(correction=0) + eps)
            affine = weight[start : start + size].double(), bias[start : start + size].double()
            out[picture, start : start + size] = scaled * affine[0][:, None, None] + affine[1][:, None, None]
    return out.clamp(min=0)


def close(ours, expected, dtype):
    # Half a unit in the last place; the interpreter cuts bfloat16 off, where a GPU rounds.
    step = {torch.float16: 2**-11, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(ours.double(), expected, rtol=1.02 * step, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_group_norm_and_relu(shape):
    *sizes, num_groups = shape
    x, weight, bias = halves(*sizes), draw(sizes[1], seed=1), draw(sizes[1], seed=2)
    out = group_norm_relu(x, weight, bias, num_groups, 1e-5)
    close(out, slow(x, weight, bias, num_groups, 1e-5), torch.float16)
    assert out.is_contiguous(memory_format=NHWC)


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_the_kernel_adds_first_and_gives_the_sum_back(shape):
    *sizes, num_groups = shape
    x, branch, weight, bias = halves(*sizes), halves(*sizes, seed=3), draw(sizes[1], seed=1), draw(sizes[1], seed=2)
    before = x.clone()
    total, out = add_group_norm_relu(x, branch, weight, bias, num_groups, 1e-5)
    assert torch.equal(x, before), "the residual was touched"
    assert torch.equal(total, x + branch)
    close(out, slow(x + branch, weight, bias, num_groups, 1e-5), torch.float16)


def test_bfloat16_too():
    x, weight, bias = halves(2, 64, 3, 5, dtype=torch.bfloat16), draw(64, seed=1), draw(64, seed=2)
    close(group_norm_relu(x, weight, bias, 32, 1e-5), slow(x, weight, bias, 32, 1e-5), torch.bfloat16)


@pytest.mark.parametrize("mean", [30.0, 1000.0, -20000.0])
def test_a_mean_that_is_large_beside_the_deviation_does_not_drown_it(mean):
    x = halves(1, 64, 9, 7, mean=mean)
    x += 64 * halves(1, 64, 9, 7, seed=5).sign() if abs(mean) > 5000 else 0  # as far apart as half can say there
    weight, bias = torch.ones(64), torch.zeros(64)
    ours, expected = group_norm_relu(x, weight, bias, 32, 1e-5), slow(x, weight, bias, 32, 1e-5)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-3)


def test_channels_of_a_group_may_lie_far_apart():
    x = halves(1, 128, 5, 5) + torch.arange(128).half().reshape(1, -1, 1, 1) * 100
    weight, bias = draw(128, seed=1), draw(128, seed=2)
    close(group_norm_relu(x, weight, bias, 32, 1e-5), slow(x, weight, bias, 32, 1e-5), torch.float16)


@pytest.mark.parametrize("eps", [1e-5, 1e-2, 1.0])
def test_eps_is_the_layers_own(eps):
    x, weight, bias = halves(1, 64, 3, 3) * 0.01, draw(64, seed=1), draw(64, seed=2)
    close(group_norm_relu(x, weight, bias, 32, eps), slow(x, weight, bias, 32, eps), torch.float16)


def test_a_constant_picture_is_its_bias():
    weight, bias = draw(64, seed=1), draw(64, seed=2)
    out = group_norm_relu(torch.full((1, 64, 4, 4), 7.0).half(), weight, bias, 32, 1e-5)
    assert torch.equal(out, bias.clamp(min=0).half().reshape(1, -1, 1, 1).expand(1, 64, 4, 4))


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter is numpy, which warns of them
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden_by_the_relu(bad):
    x = halves(2, 64, 3, 3)
    x[1, 5, 1, 1] = bad
    out = group_norm_relu(x, torch.ones(64), torch.zeros(64), 32, 1e-5)
    assert out[0].isfinite().all()
    assert out[1, 4:6].isnan().all()


def test_a_picture_has_the_same_bits_whatever_is_beside_it():
    x, weight, bias = halves(4, 128, 5, 7), draw(128, seed=1), draw(128, seed=2)
    together = group_norm_relu(x, weight, bias, 32, 1e-5)
    for order in ([2], [3, 0], [0, 0, 1]):
        assert torch.equal(group_norm_relu(x[order], weight, bias, 32, 1e-5), together[order])


def test_other_strides_are_put_in_order_first():
    x, weight, bias = halves(2, 64, 5, 3), draw(64, seed=1), draw(64, seed=2)
    expected = group_norm_relu(x, weight, bias, 32, 1e-5)
    for same in (x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(group_norm_relu(same, weight, bias, 32, 1e-5), expected)


def test_the_operators_keep_the_compilers_rules():
    x, weight, bias = halves(2, 64, 3, 3), draw(64, seed=1), draw(64, seed=2)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(group_norm_relu, (x, weight, bias, 32, 1e-5), test_utils=checks)
    torch.library.opcheck(add_group_norm_relu, (x, x.clone(), weight, bias, 32, 1e-5), test_utils=checks)


def test_a_fused_bit_says_what_the_network_says_and_compiles_as_one_graph():
    torch.manual_seed(0)
    plain = models.create("resnetv2_14x05_bit", 10).eval().requires_grad_(False)
    for name, parameter in plain.named_parameters():
        if "norm" in name:  # as made, they are the identity
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.4)
    torch.nn.init.normal_(plain.head.fc.weight, 0.0, 0.15)
    frozen.fold_standardisation(plain)
    half = copy.deepcopy(plain)
    frozen.halve(half, torch.float16)
    ours = copy.deepcopy(half)
    assert fused.fuse(ours)
    assert not any(isinstance(module, torch.nn.GroupNorm) for module in ours.modules())
    x = draw(2, 3, 32, 32)
    expected = plain(x)
    x = x.half().contiguous(memory_format=NHWC)
    logits, unfused = ours.to(memory_format=NHWC)(x), half.to(memory_format=NHWC)(x)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= 1.5 * (unfused - expected).abs().max()
    assert (logits.log_softmax(1) - expected.log_softmax(1)).abs().max() < 0.05
    with torch.inference_mode():
        compiled = torch.compile(ours, fullgraph=True, dynamic=False, backend="aot_eager")
        assert torch.equal(compiled(x), logits)


def test_networks_that_are_no_bit_are_left_alone():
    for name in ("mobilenetv3_small_050_gn8", "resnetv2_50", "vit_tiny_patch16_224"):
        model = models.create(name, 10)
        before = {name: type(module) for name, module in model.named_modules()}
        assert not fused.fuse(model)
        assert {name: type(module) for name, module in model.named_modules()} == before
