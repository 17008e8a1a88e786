import copy
import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from student_trainer.config import OptimConfig
from student_trainer.optimizer import clip_gradients, kernels, make_optimizer, set_schedule
from student_trainer.schedule import Schedule

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")
optax = pytest.importorskip("optax")

STEPS, WARMUP, LR, DECAY = 50, 10, 0.003, 1e-3


def adam(lr: float, weight_decay: float, mu_dtype: str = "bfloat16") -> OptimConfig:
    return OptimConfig(lr=lr, weight_decay=weight_decay, mu_dtype=mu_dtype)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip


def reference_chain(mu_dtype: str, names: list[str]) -> Any:
    """The chain of the released code, written with optax's own blocks."""

    def multiplier(t):
        progress = jnp.clip((t - WARMUP) / (STEPS - WARMUP), 0.0, 1.0)
        return jnp.minimum(1.0, t / WARMUP) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    decayed = {name: name in ("0.weight", "5.weight") for name in names}
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(mu_dtype=jnp.dtype(mu_dtype)),
        optax.scale(LR),
        optax.add_decayed_weights(DECAY, mask=decayed),
        optax.scale_by_schedule(multiplier),
        optax.scale(-1.0),
    )


@functools.cache
def train_both(mu_dtype: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[float]]:
    """50 steps with the same gradients (torch's) in torch and in optax; final weights and clipped norms."""
    net = small_net()
    optimizer = make_optimizer(net, adam(LR, DECAY, mu_dtype))
    schedule = Schedule(num_steps=STEPS, warmup_steps=WARMUP)
    weights = {name: jnp.asarray(p.detach().numpy().copy()) for name, p in net.named_parameters()}
    chain = reference_chain(mu_dtype, list(weights))
    state, update = chain.init(weights), jax.jit(chain.update)
    generator = torch.Generator().manual_seed(1)
    norms = []
    for step in range(STEPS):
        images = torch.randn(16, 3, 8, 8, generator=generator)
        labels = torch.randint(5, (16,), generator=generator)
        # Gradients from far above the clipping norm to far below it.
        loss = functional.cross_entropy(net(images), labels) * 10 ** (1 - 2 * step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        grads = {name: jnp.asarray(p.grad.numpy().copy()) for name, p in net.named_parameters()}
        updates, state = update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        norms.append(float(clip_gradients(net.parameters(), 1.0)))
        set_schedule(optimizer, schedule(step))
        optimizer.step()
    ours = {name: p.detach().numpy() for name, p in net.named_parameters()}
    return ours, {name: np.asarray(w) for name, w in weights.items()}, norms


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_fifty_steps_equal_optax_chain_of_the_released_code(mu_dtype):
    ours, reference, norms = train_both(mu_dtype)
    assert max(norms) > 1 > min(norms), "the test should clip some gradients and leave others"
    start = dict(small_net().named_parameters())
    for name in ours:
        moved = np.abs(reference[name] - start[name].detach().numpy()).max()
        assert moved > 0.04, name
        # Measured 4e-7 in both precisions: a few units in the last place of weights near 1.
        np.testing.assert_allclose(ours[name], reference[name], rtol=0, atol=1e-6, err_msg=name)


def test_a_bfloat16_moment_is_another_trajectory_than_a_float32_one():
    half, _, _ = train_both("bfloat16")
    full, _, _ = train_both("float32")
    assert max(np.abs(half[name] - full[name]).max() for name in half) > 1e-4


def test_decay_touches_the_kernels_of_convolutions_and_dense_layers_only():
    net = small_net()
    net.register_parameter("token", nn.Parameter(torch.ones(1, 1, 4)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(2.0)
    optimizer = make_optimizer(net, adam(0.01, 0.1))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_schedule(optimizer, 0.5)
    optimizer.step()
    left = {name: p.unique().item() for name, p in net.named_parameters()}
    # s(t) * wd of the weight is gone, whatever lr is.
    assert left.pop("0.weight") == left.pop("5.weight") == pytest.approx(2.0 * (1 - 0.5 * 0.1))
    assert set(left.values()) == {2.0}


def test_kernels_are_found_in_real_architectures_and_through_wrappers():
    import timm

    model = timm.create_model("mobilenetv3_small_050", num_classes=7)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in kernels(nn.Sequential(model))}
    assert found == {name for name, p in model.named_parameters() if p.ndim > 1}
    assert "classifier.weight" in found


def test_frozen_parameters_are_left_alone():
    net = small_net()
    net[0].weight.requires_grad_(False)
    optimizer = make_optimizer(net, adam(0.01, 0.1))
    assert all(p is not net[0].weight for group in optimizer.param_groups for p in group["params"])


def test_the_first_update_with_multiplier_zero_moves_nothing_but_fills_the_moments():
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    optimizer = make_optimizer(net, adam(LR, DECAY))
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    assert set_schedule(optimizer, 0.0) == 0.0
    optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    moment = optimizer.state[net[0].weight]["exp_avg"]
    torch.testing.assert_close(moment, 0.1 * net[0].weight.grad)


def test_clipping_is_on_the_global_norm_and_comes_before_adam():
    one, two = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    one.grad, two.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    norm = clip_gradients([one, two], 1.0)
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(one.grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(two.grad, torch.tensor([0.0, 0.8]))

    # Adam of the clipped gradients: a long gradient must not outweigh the short one that follows it.
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    optimizer = make_optimizer(net, adam(1.0, 0.0, "float32"))
    for gradient in (1000.0, -1.0):
        net.weight.grad = torch.tensor([[gradient]])
        clip_gradients(net.parameters(), 1.0)
        optimizer.step()
    mu, nu = (0.9 * 0.1 - 0.1) / (1 - 0.9**2), (0.999 * 0.001 + 0.001) / (1 - 0.999**2)
    assert net.weight.item() == pytest.approx(-1.0 - mu / math.sqrt(nu), abs=1e-5)


def test_a_non_finite_gradient_shows_in_the_returned_norm():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([math.nan, 1.0])
    assert not clip_gradients([weight], 1.0).isfinite()


@pytest.mark.parametrize(
    "optim",
    [adam(LR, DECAY, "float32"), adam(LR, DECAY), OptimConfig(optimizer="sgdm", lr=0.01)],
    ids=["adam-float32", "adam-bfloat16", "sgdm"],
)
def test_a_reloaded_optimizer_goes_on_bit_for_bit(optim):
    def step(net, optimizer, seed):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        net(images).square().sum().backward()
        set_schedule(optimizer, 0.5)
        optimizer.step()

    net = small_net()
    optimizer = make_optimizer(net, optim)
    for seed in range(3):
        step(net, optimizer, seed)
    other = small_net()
    other.load_state_dict(net.state_dict())
    resumed = make_optimizer(other, optim)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        step(net, optimizer, seed)
        step(other, resumed, seed)
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_sgdm_decays_kernels_apart_from_the_momentum():
    net = small_net()
    optimizer = make_optimizer(net, OptimConfig(optimizer="sgdm", lr=0.2, weight_decay=0.03, momentum=0.8))
    expected = {name: p.detach().double().numpy().copy() for name, p in net.named_parameters()}
    momentum = {name: np.zeros_like(w) for name, w in expected.items()}
    generator = torch.Generator().manual_seed(3)
    for step in range(10):
        s = (step + 1) / 10
        for name, p in net.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            momentum[name] = 0.8 * momentum[name] + p.grad.double().numpy()
            decay = 0.03 if name in ("0.weight", "5.weight") else 0.0
            expected[name] = expected[name] - s * (0.2 * momentum[name] + decay * expected[name])
        set_schedule(optimizer, s)
        optimizer.step()
    for name, p in net.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), expected[name], rtol=1e-4, atol=1e-4)


def wide_net() -> nn.Module:
    """Kernels smaller and larger than a block of 128, a convolution, a matrix and vectors."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(128, 150), nn.Linear(150, 6),
    )  # fmt: skip


def inverse_root(matrix: np.ndarray, power: int) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    values = values + 1e-6 * values.max()
    return (vectors * np.maximum(values, 1e-30) ** (-1 / power)) @ vectors.T


class SlowShampoo:
    """Shampoo of one kernel, in float64: blocks of 128, a statistic and its inverse root for each side of a block, at
    every step; the step's length is RMSProp's, the momentum a mean, the look ahead Nesterov's.
    """

    def __init__(self, weight: np.ndarray, shape: tuple[int, ...]) -> None:
        self.weight, self.shape = weight.astype(np.float64), shape
        self.squares = np.zeros_like(self.weight)
        self.momentum, self.graft_momentum = np.zeros_like(self.weight), np.zeros_like(self.weight)
        cuts = [[slice(i, min(i + 128, size)) for i in range(0, size, 128)] for size in shape]
        self.blocks = list(itertools.product(*cuts)) if len(shape) > 1 else []
        self.statistics = [[1e-6 * np.eye(s.stop - s.start) for s in block] for block in self.blocks]

    def direction(self, grad: np.ndarray) -> np.ndarray:
        grad = grad.reshape(self.shape)
        out = np.zeros(self.shape)
        for block, statistics in zip(self.blocks, self.statistics, strict=True):
            part = grad[block]
            result = part
            for axis in range(part.ndim):
                flat = np.moveaxis(part, axis, 0).reshape(part.shape[axis], -1)
                statistics[axis] = 0.999 * statistics[axis] + 0.001 * flat @ flat.T
                root = inverse_root(statistics[axis], 2 * part.ndim)
                result = np.moveaxis(np.tensordot(root, result, axes=(1, axis)), 0, axis)
            out[block] = result
        return out.reshape(self.weight.shape)

    def step(self, number: int, grad: np.ndarray, lr: float, decay: float) -> None:
        self.squares = 0.999 * self.squares + 0.001 * grad**2
        graft = grad / (np.sqrt(self.squares) + 1e-10)
        update = graft
        if self.blocks:
            update = self.direction(grad)
            update = update * np.linalg.norm(graft) / np.linalg.norm(update)
        self.weight = self.weight - lr * decay * self.weight
        self.momentum = 0.9 * self.momentum + 0.1 * update
        self.graft_momentum = 0.9 * self.graft_momentum + 0.1 * graft
        late = number >= 25  # until then the grafted-on optimiser walks alone
        momentum, newest = (self.momentum, update) if late else (self.graft_momentum, graft)
        self.weight = self.weight - lr * (0.9 * momentum + 0.1 * newest)


def test_shampoo_equals_a_slow_computation_in_float64():
    net = wide_net().to(memory_format=torch.channels_last)
    optim = OptimConfig(optimizer="shampoo", lr=0.01, weight_decay=0.000375)
    optimizer = make_optimizer(net, optim)
    # Dimensions are merged while they fit into a block: 8 x 3 x 3 x 3 is 72 x 3.
    shapes = {"0.weight": (72, 3), "5.weight": (150, 128), "6.weight": (6, 150)}
    slow = {name: SlowShampoo(p.detach().numpy(), shapes.get(name, p.shape)) for name, p in net.named_parameters()}
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    generator = torch.Generator().manual_seed(4)
    for number in range(1, 41):
        for p in net.parameters():  # noise on a slope: statistics of full rank, whose roots float32 can take
            noise = torch.randn(p.shape, generator=generator)
            p.grad = torch.empty_like(p).copy_(noise + torch.linspace(-1, 1, p.shape[-1]))
        s = min(1.0, number / 20)
        set_schedule(optimizer, s)
        for name, p in net.named_parameters():
            decay = 0.000375 / 0.01 if p.ndim > 1 else 0.0
            slow[name].step(number, p.grad.double().numpy(), 0.01 * s, decay)
        optimizer.step()
    for name, p in net.named_parameters():
        moved = np.linalg.norm(slow[name].weight - start[name].numpy())
        assert np.linalg.norm(p.detach().numpy() - slow[name].weight) < 1e-3 * moved, name


def test_shampoo_goes_on_bit_for_bit_from_a_checkpoint_file(tmp_path):
    def step(net, optimizer, seed):
        images = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        functional.cross_entropy(net(images), torch.arange(8) % 6).backward()
        set_schedule(optimizer, 0.5)
        optimizer.step()

    # Saved after 30 updates: the next two still use the roots of the 28th.
    optim = OptimConfig(optimizer="shampoo", lr=0.01, weight_decay=0.000375, inverse_every=4)
    net, other = wide_net(), wide_net()
    for one in (net, other):
        one.register_parameter("unused", nn.Parameter(torch.ones(3)))  # never has a gradient, nor state
    optimizer, resumed = make_optimizer(net, optim), make_optimizer(other, optim)
    for seed in range(30):
        step(net, optimizer, seed)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    torch.manual_seed(99)  # another rank, or another day
    for seed in range(30, 34):
        step(net, optimizer, seed)
    torch.manual_seed(5)
    for seed in range(30, 34):
        step(other, resumed, seed)
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_shampoo_leaves_the_global_random_numbers_alone():
    net = wide_net()
    optimizer = make_optimizer(net, OptimConfig(optimizer="shampoo", lr=0.01))
    functional.cross_entropy(net(torch.ones(8, 3, 9, 9)), torch.arange(8) % 6).backward()
    before = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


def test_shampoo_takes_the_same_step_whatever_the_global_random_numbers():
    # The library adds an estimate of the largest eigenvalue, times 1e-6, to each statistic. It shows in rows of a
    # kernel that have next to no gradient, as those of dead units.
    size = torch.tensor([100.0, 0.01]).repeat(60)[:, None]

    def trained(seed):
        net = nn.Linear(60, 120, bias=False)
        nn.init.ones_(net.weight)
        optimizer = make_optimizer(net, OptimConfig(optimizer="shampoo", lr=0.01))
        generator = torch.Generator().manual_seed(6)
        torch.manual_seed(seed)
        for _ in range(27):
            net.weight.grad = size * torch.randn(120, 60, generator=generator)
            optimizer.step()
        return net.weight

    assert torch.equal(trained(1), trained(2))
