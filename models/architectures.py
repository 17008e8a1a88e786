"""Networks by name: everything timm knows, and what it lacks: small BiTs, and MobileNetV3 with GroupNorm.

What lives here: making a network with random weights, and the one initialisation that the recipe changes.
What does not: weight files (weights.py, bit.py).

These nets are registered with timm itself, so a name means the same everywhere (cards, command lines,
`timm.create_model`). A table of our own beside timm's would have needed a second look-up in each place.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct
from timm.layers.std_conv import StdConv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, list_models, register_model
from timm.models.resnetv2 import ResNetV2
from torch import nn

# timm adds every net that a module registers to that module's list of names.
__all__ = ["check_name", "create", "default_cfg", "init_as_bit", "zero_head"]

_NUM_GROUPS = 32  # of every GroupNorm in BiT
_NUM_GROUPS_MOBILENET = 8
_STD_OF_CUT_NORMAL = 0.87962566103423978  # of a standard normal cut at -2 and 2

# The paper's code standardises weights with eps 1e-10, timm's own BiTs with 1e-8. It matters only when the raw
# filters shrink to a variance near eps, which a long run with weight decay does; so the nets that we train
# from scratch have the paper's.
_STANDARDISE_EPS = 1e-10


def _bit_cfg() -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 128, 128),
        "pool_size": (4, 4),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem.conv",
        "classifier": "head.fc",
    }


def _mobilenet_cfg() -> dict[str, Any]:
    return _bit_cfg() | {"first_conv": "conv_stem", "classifier": "classifier", "pool_size": (1, 1)}


# timm's register_model reads this name from the module of the function that it registers.
default_cfgs = generate_default_cfgs(
    {
        "resnetv2_14x05_bit.untrained": _bit_cfg(),
        "resnetv2_26x05_bit.untrained": _bit_cfg(),
        "mobilenetv3_large_100_gn8.untrained": _mobilenet_cfg(),
        "mobilenetv3_small_100_gn8.untrained": _mobilenet_cfg(),
        "mobilenetv3_small_050_gn8.untrained": _mobilenet_cfg(),
    }
)


def _small_bit(name: str, layers: Sequence[int], width: float, **kwargs: Any) -> nn.Module:
    """A pre-activation bottleneck ResNet with GroupNorm and standardised weights (BiT, arXiv 1912.11370)."""
    stem = int(64 * width)
    if stem % _NUM_GROUPS:
        raise ValueError(f"{name}: GroupNorm needs channels in multiples of {_NUM_GROUPS}, the stem has {stem}")
    model: nn.Module = build_model_with_cfg(
        ResNetV2,
        name,
        feature_cfg={"flatten_sequential": True},
        layers=layers,
        width_factor=width,
        stem_type="fixed",
        conv_layer=partial(StdConv2d, eps=_STANDARDISE_EPS),
        **kwargs,
    )
    return model


@register_model
def resnetv2_14x05_bit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """One bottleneck a stage, half of R50's width: 2.0 M parameters at 10 classes."""
    return _small_bit("resnetv2_14x05_bit", (1, 1, 1, 1), 0.5, pretrained=pretrained, **kwargs)


@register_model
def resnetv2_26x05_bit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Two bottlenecks a stage, half of R50's width: 3.5 M parameters at 10 classes."""
    return _small_bit("resnetv2_26x05_bit", (2, 2, 2, 2), 0.5, pretrained=pretrained, **kwargs)


def _with_group_norm(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """timm's MobileNetV3 with GroupNorm for BatchNorm, 8 groups as in section 3.6: its widths are multiples of 8."""
    if pretrained:
        raise ValueError(f"{name} has no published weights with GroupNorm")
    # The name under which timm's register_model calls us is for the card; the body is that of the plain network.
    own = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    model: nn.Module = timm.create_model(name, **{k: v for k, v in kwargs.items() if k not in own})
    norms = [(parent, child_name, child) for parent in model.modules() for child_name, child in parent.named_children()
             if isinstance(child, nn.BatchNorm2d)]  # fmt: skip
    for parent, child_name, norm in norms:
        grouped = GroupNormAct(norm.num_features, num_groups=_NUM_GROUPS_MOBILENET, apply_act=False)
        grouped.act = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
        setattr(parent, child_name, grouped)
    return model


@register_model
def mobilenetv3_large_100_gn8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV3-Large with GroupNorm(8): the paper's small student."""
    return _with_group_norm("mobilenetv3_large_100", pretrained, **kwargs)


@register_model
def mobilenetv3_small_100_gn8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV3-Small with GroupNorm(8)."""
    return _with_group_norm("mobilenetv3_small_100", pretrained, **kwargs)


@register_model
def mobilenetv3_small_050_gn8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV3-Small at half its width with GroupNorm(8), for laptops."""
    return _with_group_norm("mobilenetv3_small_050", pretrained, **kwargs)


def create(name: str, num_classes: int) -> nn.Module:
    """Make a network with random weights from torch's global generator; nothing is downloaded.

    Args:
        name: timm's name, with or without a `.tag`, for instance "resnetv2_50x1_bit".
        num_classes: outputs of the head, at least 1.

    Raises:
        ValueError: an unknown name (the message lists the nearest known ones) or a bad number of classes.
    """
    check_name(name)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes)
    return model


def check_name(name: str) -> None:
    """Raise ValueError unless timm, our own nets included, knows the architecture and the tag."""
    base, _, tag = name.partition(".")
    if not is_model(base):
        near = difflib.get_close_matches(base, list_models(), n=5, cutoff=0.4)
        raise ValueError(f"unknown architecture {name!r}; the nearest known names are {near}")
    if tag and f"{base}.{tag}" not in list_models(f"{base}.*", include_tags=True):
        known = list_models(f"{base}.*", include_tags=True)
        raise ValueError(f"architecture {base!r} has no tag {tag!r}; known are {known}")


def default_cfg(name: str) -> dict[str, Any]:
    """timm's facts about an architecture: input_size (C, H, W), mean, std, and the head's name."""
    check_name(name)
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        raise ValueError(f"timm states no input size, mean or std for {name!r}")
    return dataclasses.asdict(cfg)


def init_as_bit(model: nn.Module) -> None:
    """Draw the standardised convolutions anew as the paper's code does, in place: bit_paper.py leaves them flax's
    default, LeCun's normal over the inputs, cut at two standard deviations. Other layers and networks stay as they are.

    Standardisation hides the scale from the network but not from the optimizer: how far a step turns a kernel, and how
    soon decay shrinks it, depend on its norm. timm draws with the number of outputs instead.
    """
    for conv in model.modules():
        if isinstance(conv, StdConv2d):
            fan_in = conv.weight[0].numel()
            std = fan_in**-0.5 / _STD_OF_CUT_NORMAL
            nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)


def zero_head(model: nn.Module) -> None:
    """Set the head's kernel and bias to zero, in place: how the paper's code starts a student (bit_paper.py)."""
    head = model.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear | nn.Conv2d):
        raise ValueError(f"cannot zero a head of type {type(head).__name__}; expected a Linear or a 1x1 Conv2d")
    nn.init.zeros_(head.weight)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
