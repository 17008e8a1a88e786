"""Weight files: a network together with what one must know to use it.

What lives here: saving and loading. What does not: the card itself (card.py), the naming of BiT's files (bit.py), and
teachers that are no torch modules (onnx_network.py).

Ours is one .safetensors file whose header carries the card as JSON, so that weights and their meaning cannot be
parted; a second file beside the weights was the alternative, and would be lost at the first copy. Pickles
(.pt, .pth, .bin, .ckpt) are refused: opening one runs whatever code it holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import is_model_pretrained
from torch import nn

from models import bit, onnx_network
from models.architectures import check_name, create, default_cfg, zero_head
from models.card import HEADER, ModelCard, Triple

_SUFFIXES = ".safetensors", ".npz"
_PICKLES = ".pt", ".pth", ".ts", ".bin", ".ckpt", ".pkl", ".tar"
_TIMM_SOURCES = "hf-hub:", "local-dir:"  # what timm itself puts before a name


def save(path: str | Path, model: nn.Module, card: ModelCard) -> None:
    """Write weights and card to one .safetensors file; a reader sees the old file or the new one, whole."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are saved as .safetensors")
    # Cloned: safetensors refuses tensors that share memory, and wants each in plain row-major order.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, partial, metadata={HEADER: card.to_json()})
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(
    name_or_file: str | Path,
    architecture: str | None = None,
    num_classes: int | None = None,
    *,
    mean: Triple | None = None,
    std: Triple | None = None,
    size: int | None = None,
) -> tuple[nn.Module, ModelCard]:
    """Load a network in float32 on the CPU, in training mode as torch makes it, with its card.

    Args:
        name_or_file: a .safetensors file (ours, or another's with `architecture`), a BiT .npz file, an ONNX file, a
            released BiT file by name (bit:NAME, zoo.py), timm's name of a network with published weights, hf-hub:NAME,
            or local-dir:DIR (a folder as `funmatch export` writes it). Released and published ones are downloaded.
        architecture: timm's name, for files that do not say; must agree with those that do.
        num_classes: a number other than the file's replaces the head by a zero one, to fine-tune on.
        mean: of RGB on the scale 0..1; for files that do not say, or say wrongly. std and size likewise.
        std: see mean.
        size: pixels a side.

    Raises:
        OSError: no such file, or it cannot be downloaded.
        ValueError: not a weight file that we read, or tensors that do not fit (the message names them).
    """
    path = Path(name_or_file)
    if str(name_or_file).startswith("bit:"):
        model, card = _load_released(str(name_or_file), architecture)
    elif str(name_or_file).startswith(_TIMM_SOURCES):
        model, card = _load_timm_folder(str(name_or_file), architecture)
    elif path.suffix in _PICKLES:
        raise ValueError(
            f"{path}: a pickle (or TorchScript) file runs code when it is opened; convert it to .safetensors, or write "
            "the network as ONNX, which runs none"
        )
    elif path.suffix == onnx_network.SUFFIX:
        if num_classes is not None:
            raise ValueError(f"{path}: an ONNX file can teach and not learn; start the student from .safetensors")
        return onnx_network.load(path, mean, std, size)
    elif path.suffix in _SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"no such weight file: {path}")
        model, card = (_load_npz if path.suffix == ".npz" else _load_safetensors)(path, architecture)
    else:
        model, card = _load_published(str(name_or_file), architecture)
    if num_classes is not None and num_classes != card.num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
        zero_head(model)
        card = dataclasses.replace(card, num_classes=num_classes, data_set="")
    return model, dataclasses.replace(card, size=size or card.size, mean=mean or card.mean, std=std or card.std)


def weights_digest(model: nn.Module) -> str:
    """Hex SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _load_safetensors(path: Path, architecture: str | None) -> tuple[nn.Module, ModelCard]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: not a .safetensors file: {error}") from error
    if header is not None:
        card = ModelCard.from_json(header, path)
        _must_agree(architecture, card.architecture, path)
    elif architecture is not None:
        card = _foreign_card(architecture, tensors, path)
    else:
        raise ValueError(f"{path}: the file does not say which network it is; give architecture= (--architecture)")
    model = create(card.architecture, card.num_classes)
    _fill(model, tensors, path)
    return model, card


def _load_npz(path: Path, architecture: str | None) -> tuple[nn.Module, ModelCard]:
    arrays = bit.read(path)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    architecture = architecture or bit.architecture(arrays, path)
    card = _foreign_card(architecture, tensors, path)
    model = create(card.architecture, card.num_classes)
    _fill(model, tensors, path)
    # The released files say their size in their name alone (R152x2_T_384.npz, R152x2_T_pet128.npz).
    size = re.search(r"(?<!\d)\d{3}$", path.stem)
    return model, dataclasses.replace(card, size=int(size.group())) if size else card


def _load_released(name: str, architecture: str | None) -> tuple[nn.Module, ModelCard]:
    from models import zoo  # a program of its own too: `python -m models.zoo`

    entry = zoo.released(name)
    _must_agree(architecture, entry.architecture, name)
    path = zoo.fetch(name)
    model, card = _load_npz(path, None)
    if (card.architecture, card.num_classes) != (entry.architecture, entry.num_classes):
        raise ValueError(
            f"{path}: holds {card.architecture} with {card.num_classes} classes; {name} is {entry.architecture} with "
            f"{entry.num_classes}. Delete it and {path.name}.sha256 to download it anew"
        )
    return model, dataclasses.replace(card, size=entry.size)


def _load_timm_folder(name: str, architecture: str | None) -> tuple[nn.Module, ModelCard]:
    """A model of the Hugging Face hub, or a folder like those, read by timm: configuration and weights."""
    source, _, where = name.partition(":")
    if source == "local-dir" and not (Path(where) / "model.safetensors").is_file():
        raise FileNotFoundError(f"{where} holds no model.safetensors: is it a folder of `funmatch export`?")
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:  # of the hub, the folder, or the network
        raise ValueError(f"timm cannot load {name}: {' '.join(str(error).split())[:500]}") from error
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    _must_agree(architecture, cfg["architecture"], name)
    return model, _card_from_cfg(cfg["architecture"], int(cfg["num_classes"]), cfg)


def _load_published(name: str, architecture: str | None) -> tuple[nn.Module, ModelCard]:
    check_name(name)
    _must_agree(architecture, name, name)
    if not is_model_pretrained(name):
        raise ValueError(f"{name} has no published weights; give a weight file")
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:  # of the hub, the network, or the cache
        raise OSError(
            f"cannot download the weights of {name}: {error}. Fetch its .safetensors by hand, and give that file (with "
            f"the architecture {name.partition('.')[0]})"
        ) from error
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return model, _card_from_cfg(name, int(cfg["num_classes"]), cfg)


def _must_agree(asked: str | None, found: str, source: str | Path) -> None:
    # A tag names weights of an architecture, not another architecture.
    if asked is not None and asked.partition(".")[0] != found.partition(".")[0]:
        raise ValueError(f"{source}: holds architecture {found!r}, not {asked!r}; leave architecture away")


def _foreign_card(architecture: str, tensors: Mapping[str, torch.Tensor], path: Path) -> ModelCard:
    """A card for a file without one: the head's shape gives the classes, timm the rest."""
    cfg = default_cfg(architecture)
    head = f"{cfg['classifier']}.weight" if isinstance(cfg.get("classifier"), str) else ""
    if head not in tensors:
        raise ValueError(f"{path}: no tensor {head!r}, the head of {architecture}; is it another architecture?")
    return _card_from_cfg(architecture, tensors[head].shape[0], cfg)


def _card_from_cfg(architecture: str, num_classes: int, cfg: Mapping[str, Any]) -> ModelCard:
    return ModelCard(
        architecture=architecture,
        num_classes=num_classes,
        size=int(cfg["input_size"][1]),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
    )


def _fill(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copy tensors into the model, after checking that names and shapes are exactly its own."""
    own = model.state_dict()
    # BatchNorm's counter of training steps: older files lack it, and no forward pass of ours reads it.
    optional = {name for name in own if name.endswith(".num_batches_tracked")}
    complaints = {
        "missing": sorted(own.keys() - tensors.keys() - optional),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "misshapen": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(own.keys() & tensors.keys())
            if tensors[name].shape != own[name].shape
        ],
    }
    if any(complaints.values()):
        found = "; ".join(f"{kind}: {bit.some(names)}" for kind, names in complaints.items() if names)
        raise ValueError(f"{path}: the tensors do not fit {type(model).__name__}: {found}")
    model.load_state_dict(tensors, strict=False)
