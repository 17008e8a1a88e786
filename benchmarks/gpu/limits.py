"""What a device allows at most, and what a network asks of it: the floors of GPU figures.

Measured and counted, and not taken from data sheets: those promise clocks that a loaded card does not keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from benchmarks.turns import Contender, in_turns


@dataclass(frozen=True, slots=True)
class Machine:
    """What a device can do at most, measured on it."""

    flops: float
    """Half-precision operations a second in a product of large matrices."""
    bytes_per_s: float
    """Read and written, while a large tensor is copied."""

    @classmethod
    def measured(cls, device: torch.device, side: int = 8192, num_bytes: int = 2**32) -> Machine:
        """Multiply two matrices of side x side, and copy num_bytes."""
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        times = in_turns(
            {"product": Contender(1, lambda: a @ b), "copy": Contender(1, lambda: target.copy_(source))},
            device, rounds=5, burst_s=0.1,
        )  # fmt: skip
        return cls(2 * side**3 / min(times["product"]), 2 * num_bytes / min(times["copy"]))


def flops_per_image(architecture: str, size: int) -> float:
    """Operations of a forward pass (two a multiplication), counted by torch on a device that does not compute."""
    module = _shape_of(architecture)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(torch.empty(1, 3, size, size, device="meta"))
    return float(counter.get_total_flops())


def half_bytes_per_image(architecture: str, size: int) -> float:
    """Bytes that must move if each convolution and each norm reads its input and writes its output once, in half."""
    module = _shape_of(architecture)
    elements = 0

    def count(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal elements
        elements += inputs[0].numel() + output.numel()

    def count_sum(_module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal elements
        elements += 2 * output.numel()  # the shortcut is read and the sum is written, within the next norm

    for child in module.modules():
        if isinstance(child, nn.Conv2d | nn.GroupNorm):
            child.register_forward_hook(count)
        elif type(child).__name__ == "PreActBottleneck":
            child.register_forward_hook(count_sum)
    with torch.no_grad():
        module(torch.empty(1, 3, size, size, device="meta"))
    return 2.0 * elements


def _shape_of(architecture: str) -> nn.Module:
    with torch.device("meta"):
        return models.create(architecture, 1000).eval()
