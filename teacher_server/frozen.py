"""What is done to a network that will not learn any more: standardised weights for good, and half precision.

Half precision is made by hand and not by autocast, which would cast all weights anew for each batch: convolutions,
matrices and everything else in half; norms in float32, statistics and all; the head in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.std_conv import StdConv2d
from torch import nn
from torch.nn import functional

# modules/batchnorm.py keeps its base class private; these are what is public of it.
_NORMS = nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.RMSNorm


def fold_standardisation(module: nn.Module) -> int:
    """Replace each weight-standardised convolution by a plain one that holds the standardised weights.

    The weights are standardised once, in float32, by the very call that timm makes in every forward pass, with
    the layer's own eps, so float32 logits do not change by a bit. Returns how many were replaced.
    """
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is StdConv2d
    ]
    for parent, name, child in found:
        setattr(parent, name, _folded(child))
    return len(found)


def halve(module: nn.Module, dtype: torch.dtype) -> None:
    """Everything in dtype, in place, but norms and the head in float32."""
    module.to(dtype)
    for child in module.modules():
        if isinstance(child, _NORMS):
            child.float()
            child.register_forward_pre_hook(_input_to(torch.float32))
            child.register_forward_hook(_output_to(dtype))
    for head in _heads(module):
        head.float()
        head.register_forward_pre_hook(_input_to(torch.float32))


def _folded(conv: Any) -> nn.Conv2d:
    weight = conv.weight.detach().float()
    standardised = functional.batch_norm(
        weight.reshape(1, conv.out_channels, -1), None, None, training=True, momentum=0.0, eps=conv.eps
    )
    shape = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    plain = nn.Conv2d(*shape, bias=conv.bias is not None, device="meta")
    plain.weight = nn.Parameter(standardised.reshape_as(weight), requires_grad=False)
    plain.bias = conv.bias
    return plain.eval()


def _heads(module: nn.Module) -> list[nn.Module]:
    """The classifier, or the classifiers of nets that have two (distilled transformers)."""
    head = module.get_classifier()  # type: ignore[operator]
    return [head] if isinstance(head, nn.Module) else list(head)


def _input_to(dtype: torch.dtype) -> Any:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        first, *others = inputs
        return first.to(dtype), *others

    return hook


def _output_to(dtype: torch.dtype) -> Any:
    def hook(_module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output.to(dtype)

    return hook
