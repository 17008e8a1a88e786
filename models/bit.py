"""BiT's .npz files: three namings of one network, read into timm's ResNetV2.

What lives here: which tensor of a file is which of the module, and which architecture a file holds. Only numpy.
What does not: making modules and copying tensors into them (weights.py).

The namings, as facts read in google-research/big_transfer and big_vision (models/bit_paper.py):

1. big_transfer: `resnet/block1/unit01/a/standardized_conv2d/kernel`, `resnet/group_norm/gamma`,
   `resnet/head/conv2d/kernel` of shape [1, 1, C, K].
2. the same with numbered layers: `.../a/standardized_conv2d_7/kernel`.
3. big_vision's own trees: `block1/unit01/conv1/kernel`, `norm-pre-head/scale` of shape [1, 1, 1, C],
   `head/kernel` of shape [C, K]; bare, or under `params/` or `opt/target/` in a training checkpoint.

Kernels are HWIO (height, width, in, out); torch wants OIHW. All three are translated into naming 3 with HWIO
kernels, then into timm's. timm's own loader knows naming 1 alone, and overlooks tensors that it does not use.
The stem's max-pool pads with 0 in big_transfer and in timm, with -inf in big_vision; we follow timm, whose
evaluation of the released files reproduces the published accuracy.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float32]]

_ROOT = "root_block/conv_root/kernel"
_PREFIXES = "", "params/", "opt/target/"
_DEPTHS = {(1, 1, 1, 1): 14, (2, 2, 2, 2): 26, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
_TOP_NAMES = {
    "resnet/root_block/standardized_conv2d/kernel": _ROOT,
    "resnet/group_norm/gamma": "norm-pre-head/scale",
    "resnet/group_norm/beta": "norm-pre-head/bias",
    "resnet/head/conv2d/kernel": "head/kernel",
    "resnet/head/conv2d/bias": "head/bias",
}
_UNIT_NAME = re.compile(
    r"resnet/(block\d+/unit\d+)/([abc])/(proj/standardized_conv2d/kernel|standardized_conv2d/kernel"
    r"|group_norm/gamma|group_norm/beta)"
)
_NATIVE_UNIT = re.compile(r"block(\d+)/unit(\d+)/(conv|gn)([123]|_proj)/(kernel|scale|bias)")


def read(path: Path) -> Tensors:
    """Read a BiT .npz file: float32 arrays under timm's names, kernels OIHW.

    Raises:
        ValueError: not an .npz archive, a pickled array, no BiT naming, or a tensor that BiT does not have.
    """
    native = _native(_arrays(path), path)
    tensors: Tensors = {}
    foreign = [name for name in native if _timm_name(name) is None]
    if foreign:
        raise ValueError(f"{path}: tensors that a BiT network does not have: {some(foreign)}")
    for name, array in native.items():
        timm_name = _timm_name(name)
        assert timm_name is not None
        tensors[timm_name] = _oriented(name, array, path)
    return tensors


def architecture(tensors: Mapping[str, NDArray[np.float32]], path: Path) -> str:
    """Tell timm's name of the network from what `read` returned: the units of each block, and the stem's width.

    Raises:
        ValueError: a depth that has no name.
    """
    units = {
        tuple(map(int, m.groups())) for m in map(re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.").match, tensors) if m
    }
    layers = tuple(sum(block == stage for block, _ in units) for stage in range(4))
    if layers not in _DEPTHS:
        known = ", ".join(map(str, _DEPTHS))
        raise ValueError(f"{path}: blocks of {layers} units are no BiT that has a name; named are {known}")
    stem = tensors["stem.conv.weight"].shape[0]
    width = "05" if stem == 32 else f"{stem / 64:g}"
    return f"resnetv2_{_DEPTHS[layers]}x{width}_bit"


def _arrays(path: Path) -> Tensors:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: _float32(archive[name]) for name in archive.files}
    except (OSError, EOFError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as an .npz file of plain arrays: {error}") from error


def _float32(array: NDArray[np.generic]) -> NDArray[np.float32]:
    # numpy has no bfloat16: jax's arrays of it come back as two raw bytes, the upper half of a float32.
    if array.dtype == np.dtype("V2"):
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _native(arrays: Tensors, path: Path) -> Tensors:
    """Translate any of the three namings into big_vision's."""
    if any(name.startswith("resnet/") for name in arrays):
        return {_from_big_transfer(name): array for name, array in arrays.items()}
    for prefix in _PREFIXES:
        if prefix + _ROOT in arrays:
            # Beside the parameters a checkpoint holds the optimiser's state: not ours.
            return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    wanted = ["resnet/root_block/standardized_conv2d/kernel", *(prefix + _ROOT for prefix in _PREFIXES)]
    raise ValueError(f"{path}: no BiT file: none of {wanted} is in it, but {some(sorted(arrays))}")


def _from_big_transfer(name: str) -> str:
    """big_transfer's name as big_vision's; a name of neither stays and is refused later."""
    plain = re.sub(r"(standardized_conv2d|group_norm)_\d+(?=/)", r"\1", name)
    if plain in _TOP_NAMES:
        return _TOP_NAMES[plain]
    match = _UNIT_NAME.fullmatch(plain)
    if not match:
        return name
    unit, branch, leaf = match.groups()
    number = " abc".index(branch)
    if leaf.startswith("proj/"):
        return f"{unit}/conv_proj/kernel"
    if leaf.startswith("standardized_conv2d/"):
        return f"{unit}/conv{number}/kernel"
    return f"{unit}/gn{number}/{'scale' if leaf.endswith('gamma') else 'bias'}"


def _timm_name(name: str) -> str | None:
    """big_vision's name as timm's, or None."""
    top = {
        _ROOT: "stem.conv.weight",
        "norm-pre-head/scale": "norm.weight",
        "norm-pre-head/bias": "norm.bias",
        "head/kernel": "head.fc.weight",
        "head/bias": "head.fc.bias",
    }
    if name in top:
        return top[name]
    match = _NATIVE_UNIT.fullmatch(name)
    if not match:
        return None
    block, unit, kind, number, leaf = match.groups()
    at = f"stages.{int(block) - 1}.blocks.{int(unit) - 1}"
    if (kind, number, leaf) == ("conv", "_proj", "kernel"):
        return f"{at}.downsample.conv.weight"
    if kind == "conv" and leaf == "kernel" and number != "_proj":
        return f"{at}.conv{number}.weight"
    if kind == "gn" and leaf != "kernel" and number != "_proj":
        return f"{at}.norm{number}.{'weight' if leaf == 'scale' else 'bias'}"
    return None


def _oriented(name: str, array: NDArray[np.float32], path: Path) -> NDArray[np.float32]:
    """HWIO to OIHW; a dense head [C, K] to a 1x1 convolution; [1, 1, 1, C] to [C]."""
    if not name.endswith("/kernel"):
        if array.size != array.shape[-1:][0] if array.ndim else True:
            raise ValueError(f"{path}: {name} has shape {array.shape}, expected one axis, or 1s before it")
        return array.reshape(-1)
    if name == "head/kernel" and array.ndim == 2:
        array = array[None, None]
    if array.ndim != 4:
        raise ValueError(f"{path}: {name} has shape {array.shape}, expected (height, width, in, out)")
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1))


def native(tensors: Mapping[str, NDArray[np.float32]]) -> Tensors:
    """The way back: a BiT under timm's names as big_vision's own tree, for np.savez."""
    return {_native_name(name): _hwio(name, array) for name, array in tensors.items()}


def _native_name(name: str) -> str:
    top = {
        "stem.conv.weight": _ROOT,
        "norm.weight": "norm-pre-head/scale",
        "norm.bias": "norm-pre-head/bias",
        "head.fc.weight": "head/kernel",
        "head.fc.bias": "head/bias",
    }
    if name in top:
        return top[name]
    match = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(conv|norm|downsample\.conv)(\d?)\.(weight|bias)", name)
    if not match:
        raise ValueError(f"{name} is no tensor of a BiT")
    stage, block, kind, number, leaf = match.groups()
    at = f"block{int(stage) + 1}/unit{int(block) + 1:02d}"
    if kind == "norm":
        return f"{at}/gn{number}/{'scale' if leaf == 'weight' else 'bias'}"
    return f"{at}/conv{number or '_proj'}/kernel"


def _hwio(name: str, array: NDArray[np.float32]) -> NDArray[np.float32]:
    if array.ndim != 4:
        return array
    turned = np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return turned[0, 0] if name == "head.fc.weight" else turned


def some(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
