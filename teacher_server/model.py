"""The frozen network: mixed views in, logits out. Nothing about requests or pictures' files.

Made to give one row the same logits whatever its batch-mates, its place, or the request that it came in:
every forward pass has the same padded shape, so the same kernels run; cudnn does not try kernels out
(`benchmark` chooses by the clock, and another choice means other last bits); TF32 is off (float32 means
float32; half precision is where the speed is). The start-up gate measures that it holds (gate.py).

On CUDA that shape is recorded and replayed (replay.py). In half precision (frozen.py) a BiT has its additions, norms
and ReLUs fused (fused.py), and any other network is compiled; in float32, which is there to compare with, neither.

Legend: R rows, V views, S pixels a side, K classes, B rows of a padded batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import models
from models import ModelCard
from teacher_server.batcher import Part
from teacher_server.config import Config, Precision
from teacher_server.frozen import fold_standardisation, halve
from teacher_server.replay import Replay
from teacher_server.ticket import DeviceError
from views.mix import mix

_BROKEN = re.compile(r"CUDA (runtime API |driver API )?error|CUDA allocation failed|cuDNN error", re.IGNORECASE)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DEFAULT_BATCH_ROWS = {"cpu": 32, "cuda": 128}
Kernels = Literal["own", "fused", "compiled"]
"""The network's own, one after the other; a BiT's norms in one pass (fused.py); or torch.compile's."""


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

    def rows_on(self, device: torch.device, start: int, stop: int, card: ModelCard) -> torch.Tensor:
        """The same, mixed on a CUDA device: each view crosses once, as uint8, without stopping the current stream."""
        used, place = self.seen_by(start, stop)
        if self.pixels.device.type == "cpu":
            staged = torch.empty((len(used), *self.pixels.shape[1:]), dtype=torch.uint8, pin_memory=True)
            pixels = _uploaded(torch.index_select(self.pixels, 0, used, out=staged), device)
        else:
            pixels = self.pixels[_uploaded(used, device)]
        num_rows = stop - start
        partner = torch.arange(num_rows, 2 * num_rows, device=device)
        views, lam = pixels[_uploaded(place, device)], _uploaded(self.lam[start:stop], device)
        return mix(views, partner, lam, card.mean, card.std)

    def seen_by(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The views that rows start..stop-1 need, each once; and where among them are theirs, then their partners'."""
        used, place = torch.unique(
            torch.cat([torch.arange(start, stop), self.partner[start:stop]]), return_inverse=True
        )  # fmt: skip
        return used, place


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
            halve(module, _DTYPES[precision])
        module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(module, models.OnnxNetwork):
            module.run_on(device)
        self._dtype = _DTYPES[precision]
        self._module = module
        self._forward: Any = module
        self.kernels: Kernels = "own"
        """Whose kernels run: each kind rounds in its own way, and is another teacher."""
        if device.type == "cuda" and precision != "float32":
            self._forward, self.kernels = _made_fast(module)
        # What onnxruntime computes runs in streams of its own, which cannot be recorded.
        self._records = device.type == "cuda" and not isinstance(module, models.OnnxNetwork)
        self._replay: Replay | None = None

    @torch.inference_mode()
    def logits(self, rows_NCHW: torch.Tensor) -> torch.Tensor:
        """Float32 [R, K] of at most batch_rows mixed, normalised rows [R, 3, S, S]."""
        assert not self._module.training, "somebody called .train() on a frozen teacher"
        num_rows, *shape = rows_NCHW.shape
        if self._records:
            return self._recorded(shape).logits(rows_NCHW)
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
        return self.begin(parts)()

    @torch.inference_mode()
    def begin(self, parts: Sequence[Part[Scene]]) -> Callable[[], NDArray[np.float32]]:
        """Put a batch on its way; what is returned waits for the answer. On CUDA the next may be begun before.

        Raises:
            DeviceError: the device is broken; so does what is returned.
        """
        with _naming_broken_device():
            if self._records:
                _, size, _, channels = parts[0].payload.pixels.shape
                wait = self._recorded((channels, size, size)).begin(
                    lambda: [part.payload.rows_on(self.device, part.start, part.stop, self.card) for part in parts]
                )
                return _naming_broken_device()(wait)
            rows = torch.cat([part.payload.rows(part.start, part.stop, self.card) for part in parts])
            logits: NDArray[np.float32] = self.logits(rows).cpu().numpy()
        return lambda: logits

    def _recorded(self, shape: Sequence[int]) -> Replay:
        """The first call records, which is paid before the first request: by the gate."""
        if self._replay is None:
            self._replay = Replay(self._forward, (self.batch_rows, *shape), self._dtype, self.device)
        return self._replay


def _made_fast(module: nn.Module) -> tuple[Any, Kernels]:
    """What to call on CUDA in half precision. On the CPU convolutions are the cost, which no compiler touches."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":  # Triton needs a C compiler as well
        return module, "own"
    from teacher_server.fused import fuse  # Triton is not everywhere where torch is

    return (module, "fused") if fuse(module) else (torch.compile(module, dynamic=False), "compiled")


@contextmanager
def _naming_broken_device() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if (how := broken_device(error)) is None:
            raise
        raise DeviceError(how) from error


def _uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a CPU tensor, in the order of the current stream."""
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


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
    return models.load(config.model, config.architecture, mean=config.mean, std=config.std, size=config.size)


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


def choose_for_onnx(network: models.OnnxNetwork, precision: str, asked_rows: int | None) -> int | None:
    """Resolve --precision and --batch-rows of an ONNX file, which has its own; the rows, None where any number will do.

    Raises:
        ValueError: another one is asked for.
    """
    if precision not in ("auto", "float32"):
        raise ValueError(f"an ONNX file is served in its own precision: leave out --precision {precision}")
    rows = network.batch_rows
    if rows and asked_rows not in (None, rows):
        raise ValueError(f"this ONNX file takes batches of exactly {rows} rows: leave out --batch-rows {asked_rows}")
    return rows or asked_rows


def be_reproducible(num_threads: int) -> None:
    """Settings of the whole process; the module's docstring says why."""
    torch.set_num_threads(num_threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def fingerprint(facts: dict[str, Any]) -> str:
    """Hex digest of all that can change a logit; equal fingerprints mean interchangeable teachers.

    Not among the facts: the model of the GPU, and versions of torch, cuDNN and onnxruntime. They change last bits: a
    fleet of unlike machines must bear that, and the gate's bound holds on each.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
