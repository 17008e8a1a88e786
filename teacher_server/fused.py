"""A BiT whose additions, norms and ReLUs are one pass each: the same network, for half precision on CUDA.

A block hands on its two halves, the shortcut and the branch, without adding them: the norm that looks at the sum next
does that too (group_norm.py). What is left between the convolutions is nothing, so a fused network is not compiled,
which takes a minute for a large one.

Rejected: the convolutions with the norm as their prologue. It would save the last pass over memory, for a convolution
of our own in place of cuDNN's.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.norm_act import GroupNormAct
from timm.models.resnetv2 import PreActBottleneck, ResNetV2
from torch import nn

from teacher_server.group_norm import add_group_norm_relu, group_norm_relu

_Carried = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Between two blocks: a tensor, or two that are still to be added."""


def fuse(module: Any) -> bool:
    """Fuse a BiT in place, its convolutions folded and in half, its norms in float32. Anything else is left alone.

    Returns whether it was one.
    """
    if not _is_bit(module):
        return False
    for stage in module.stages:
        stage.blocks = nn.Sequential(*map(_Block, stage.blocks))
    module.norm = _Norm(module.norm)
    return True


class _Norm(nn.Module):
    """GroupNorm and ReLU of what is carried."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.num_groups, self.eps = norm.num_groups, norm.eps

    def forward(self, carried: _Carried) -> torch.Tensor:
        return self.with_sum(carried)[1]

    def with_sum(self, carried: _Carried) -> tuple[torch.Tensor, torch.Tensor]:
        """What was carried, in one piece, and what becomes of it."""
        how = self.weight, self.bias, self.num_groups, self.eps
        if isinstance(carried, torch.Tensor):
            return carried, group_norm_relu(carried, *how)
        whole, normed = add_group_norm_relu(*carried, *how)
        return whole, normed


class _Block(nn.Module):
    """timm's PreActBottleneck, up to the addition at its end."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = _Norm(block.norm1), _Norm(block.norm2), _Norm(block.norm3)
        self.conv1, self.conv2, self.conv3 = block.conv1, block.conv2, block.conv3
        self.downsample = block.downsample

    def forward(self, carried: _Carried) -> tuple[torch.Tensor, torch.Tensor]:
        whole, looked_at = self.norm1.with_sum(carried)
        shortcut = whole if self.downsample is None else self.downsample(looked_at)
        branch = self.conv1(looked_at)
        branch = self.conv2(self.norm2(branch))
        branch = self.conv3(self.norm3(branch))
        return shortcut, branch


def _is_bit(module: Any) -> bool:
    if not isinstance(module, ResNetV2):
        return False
    stages: Any = module.stages
    blocks = [block for stage in stages for block in stage.blocks]
    return all(isinstance(block, PreActBottleneck) for block in blocks) and all(
        isinstance(norm, GroupNormAct) and isinstance(norm.act, nn.ReLU)
        for norm in [module.norm, *(getattr(block, f"norm{i}") for block in blocks for i in (1, 2, 3))]
    )
