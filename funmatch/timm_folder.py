"""A student as a folder that timm reads: `timm.create_model("local-dir:DIR", pretrained=True)`, with nothing of ours.

Most students are timm's own networks and are written as they are. Our small BiTs are not: they are written as timm's
ResNetV2 with plain convolutions that hold the standardised weights, which answers the same to the last bit. Our
MobileNets with GroupNorm have no equal in timm and are refused.

Not here: what the numbers of a run say (export.py). Rejected: timm's own writer of such folders. It keeps what it knows
of the published weights of a name (their address, their tests' size, their licence), which are not the student's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import model_entrypoint
from torch import nn

from models import ModelCard, check_name
from teacher_server.frozen import fold_standardisation

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How a picture becomes the network's input, in timm's words."""

    interpolation: str
    """bilinear or bicubic."""
    crop_mode: str
    """center: the short side is resized and the centre cut out; squash: the whole picture, whatever its shape."""
    crop_pct: float
    """Share of the short side that the centre keeps."""


def write(folder: Path, model: nn.Module, card: ModelCard, seen: Preprocessing, classes: Sequence[str]) -> nn.Module:
    """Write FOLDER/model.safetensors and FOLDER/config.json; returns the network as timm reads it back, for comparison.

    Raises:
        ValueError: timm has no network that is this one.
    """
    architecture, arguments, plain = portable(model, card.architecture)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in plain.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = _config(architecture, arguments, plain, card, seen, classes)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    read_back: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return read_back.eval()


def portable(model: nn.Module, architecture: str) -> tuple[str, dict[str, Any], nn.Module]:
    """(timm's name, its arguments, the network with that one's parameters); the model itself stays as it is.

    Raises:
        ValueError: timm has no network that is this one.
    """
    check_name(architecture)
    base = architecture.partition(".")[0]
    if model_entrypoint(base).__module__.startswith("timm."):
        return base, {}, model
    if base not in _IN_TIMM:
        raise ValueError(
            f"timm has no network that is {base}: a folder for timm cannot be written. Export with --only-onnx, or "
            "keep the run's model.safetensors, which funmatch reads"
        )
    folded = copy.deepcopy(model).eval()
    fold_standardisation(folded)
    name, arguments = _IN_TIMM[base]
    return name, arguments, folded


def _plain_bit(layers: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """timm's ResNetV2 with GroupNorm and plain convolutions, with BiT's stem, its shortcuts, and half its width."""
    return "resnetv2_50d_gn", {
        "layers": list(layers), "width_factor": 0.5, "stem_type": "fixed", "avg_down": False,
    }  # fmt: skip


_IN_TIMM = {"resnetv2_14x05_bit": _plain_bit((1, 1, 1, 1)), "resnetv2_26x05_bit": _plain_bit((2, 2, 2, 2))}


def _config(
    architecture: str, arguments: Mapping[str, Any], model: nn.Module, card: ModelCard, seen: Preprocessing,
    classes: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    known: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": card.num_classes,
        "num_features": getattr(model, "num_features", None),
        "pretrained_cfg": {
            "num_classes": card.num_classes,
            "input_size": [3, card.size, card.size],
            "fixed_input_size": bool(known.get("fixed_input_size", False)),
            "mean": list(card.mean),
            "std": list(card.std),
            "interpolation": seen.interpolation,
            "crop_mode": seen.crop_mode,
            "crop_pct": seen.crop_pct,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }
    if arguments:
        config["model_args"] = dict(arguments)
    if classes:
        config["label_names"] = list(classes)
    return config


@torch.inference_mode()
def answers(model: nn.Module, images_N3SS: torch.Tensor) -> torch.Tensor:
    """Float32 [N, K] of pictures as the network sees them, in batches of one size."""
    return torch.cat([model(part).float() for part in torch.split(images_N3SS, 16)])
