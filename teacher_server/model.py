"""The frozen network: mixed views in, logits out. Nothing about requests or pictures' files.

Made to give one row the same logits whatever its batch-mates, its place, or the request that it came in:
every forward pass has the same padded shape, so the same kernels run; cudnn does not try kernels out
(`benchmark` chooses by the clock, and another choice means other last bits); TF32 is off (float32 means
float32; half precision is where the speed is). The start-up gate measures that it holds (gate.py).

Half precision is made by hand and not by autocast, which would cast all weights anew for each batch:
convolutions, matrices and everything else in half; norms in float32, statistics and all; the head in float32.

Legend: R rows, V views, S pixels a side, K classes, B rows of a padded batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers.std_conv import StdConv2d
from torch import nn
from torch.nn import functional

import models
from models import ModelCard
from teacher_server.batcher import Part
from teacher_server.config import Config, Precision
from teacher_server.ticket import DeviceError
from views.mix import mix

_BROKEN = re.compile(r"CUDA (runtime API |driver API )?error|CUDA allocation failed|cuDNN error", re.IGNORECASE)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DEFAULT_BATCH_ROWS = {"cpu": 32, "cuda": 128}
# modules/batchnorm.py keeps its base class private; these are what is public of it.
_NORMS = nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.RMSNorm


@dataclass(frozen=True, eq=False, slots=True)
class Scene:
    """The rendered views of one request, and how its rows are mixed from them."""

    pixels: torch.Tensor
    """uint8 [V, S, S, 3]."""
    partner: torch.Tensor
    """int64 [R] position among the views."""
    lam: torch.Tensor
    """float32 [R] weight of the row's own view."""

    @classmethod
    def unmixed(cls, pixels: torch.Tensor) -> Scene:
        """Rows that are plain views."""
        return cls(pixels, torch.arange(len(pixels)), torch.ones(len(pixels)))

    def rows(self, start: int, stop: int, card: ModelCard) -> torch.Tensor:
        """Rows start..stop-1 as the network sees them: float32 [stop - start, 3, S, S]."""
        num_rows = stop - start
        views = torch.cat([torch.arange(start, stop), self.partner[start:stop]]).to(self.pixels.device)
        partner = torch.arange(num_rows, 2 * num_rows)
        return mix(self.pixels[views], partner, self.lam[start:stop], card.mean, card.std)


class Teacher:
    """A frozen network on its device, in its precision, with a fixed batch shape."""

    def __init__(
        self, module: nn.Module, card: ModelCard, *, device: torch.device, precision: Precision, batch_rows: int
    ) -> None:
        """Take over the module, float32 on the CPU, folded or not; it is changed in place."""
        self.card = card
        self.device = device
        self.precision = precision
        self.batch_rows = batch_rows
        module = module.eval().requires_grad_(False)
        fold_standardisation(module)
        if precision != "float32":
            _to_half(module, _DTYPES[precision])
        module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._dtype = _DTYPES[precision]
        # One static shape, so one compilation, paid before the first request. On the CPU it would need a C++
        # compiler on the serving machine, and convolutions, which it does not touch, are the cost there.
        self._forward: Any = torch.compile(module, dynamic=False) if device.type == "cuda" else module
        self._module = module

    @torch.inference_mode()
    def logits(self, rows_NCHW: torch.Tensor) -> torch.Tensor:
        """Float32 [R, K] of at most batch_rows mixed, normalised rows [R, 3, S, S]."""
        assert not self._module.training, "somebody called .train() on a frozen teacher"
        num_rows, *shape = rows_NCHW.shape
        batch = torch.zeros(
            (self.batch_rows, *shape), dtype=self._dtype, device=self.device
        ).contiguous(memory_format=torch.channels_last)  # fmt: skip
        batch[:num_rows] = rows_NCHW.to(device=self.device, dtype=self._dtype)
        logits: torch.Tensor = self._forward(batch)[:num_rows].float()
        return logits

    def answer(self, parts: Sequence[Part[Scene]]) -> NDArray[np.float32]:
        """The batcher's model: float32 [rows of all parts, K].

        Raises:
            DeviceError: the device is broken.
        """
        try:
            rows = torch.cat([part.payload.rows(part.start, part.stop, self.card).to(self.device) for part in parts])
            logits: NDArray[np.float32] = self.logits(rows).cpu().numpy()
        except Exception as error:
            if (how := broken_device(error)) is None:
                raise
            raise DeviceError(how) from error
        return logits


def broken_device(error: BaseException) -> str | None:
    """How the device is broken, if that is what an error (or what it came from) says; else None.

    After a CUDA error no later call of this process can succeed. Out of memory is one of them: batches have one shape,
    which ran at start-up, so somebody else has taken the memory or it has leaked, and another replica is better off.
    Not verified on a GPU; the words are those of torch (c10/cuda/CUDAException.h) and of DALI.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError | torch.AcceleratorError):
            return str(cause)
        if isinstance(cause, RuntimeError) and _BROKEN.search(str(cause)):
            return str(cause)
        cause = cause.__cause__
    return None


def load(config: Config) -> tuple[nn.Module, ModelCard]:
    """The network that the config names, float32 on the CPU, as it lies in its file."""
    module, card = models.load(config.model, config.architecture)
    return module, dataclasses.replace(card, size=config.size or card.size)


def choose_device(name: str) -> torch.device:
    """Resolve --device.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number == "" or number.isdecimal()):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    index = int(number or 0)
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def choose_precision(name: str, device: torch.device) -> Precision:
    """Resolve --precision: float16 on CUDA, which errs less than bfloat16 at the same speed; float32 on the CPU."""
    if name == "auto":
        return "float16" if device.type == "cuda" else "float32"
    assert name in _DTYPES
    return name  # type: ignore[return-value]


def choose_batch_rows(asked: int | None, device: torch.device) -> int:
    """Resolve --batch-rows."""
    return asked or _DEFAULT_BATCH_ROWS[device.type]


def be_reproducible(num_threads: int) -> None:
    """Settings of the whole process; the module's docstring says why."""
    torch.set_num_threads(num_threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "ieee"


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


def fingerprint(facts: dict[str, Any]) -> str:
    """Hex digest of all that can change a logit; equal fingerprints mean interchangeable teachers."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


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


def _to_half(module: nn.Module, dtype: torch.dtype) -> None:
    """Everything in dtype, but norms and the head in float32."""
    module.to(dtype)
    for child in module.modules():
        if isinstance(child, _NORMS):
            child.float()
            child.register_forward_pre_hook(_input_to(torch.float32))
            child.register_forward_hook(_output_to(dtype))
    for head in _heads(module):
        head.float()
        head.register_forward_pre_hook(_input_to(torch.float32))


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
