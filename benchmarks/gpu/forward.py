"""The forward pass of a BiT on a GPU, beside timm's own: one network at one size (rows 1 and 2).

`python -m benchmarks.gpu.forward NETWORK SIZE` prints a figure as JSON on each line. Ours is `Teacher.logits` as it is
served: half precision, its fixed batch, recorded. timm's is what its benchmark script does: autocast, channels_last,
256 pictures, kernels chosen by the clock; eager, and compiled. All have the same random weights and look at the same
pictures, in turns, and each is compared with float32 before a time of it counts.

Legend: R rows, K classes, S pixels a side.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import models
from benchmarks.figure import Figure
from benchmarks.gpu.limits import Machine, flops_per_image, half_bytes_per_image
from benchmarks.turns import Contender, in_turns, paired, rates
from models import ModelCard
from teacher_server import gate
from teacher_server.config import Config
from teacher_server.model import Scene, Teacher, be_reproducible, choose_batch_rows, choose_precision

_CLASSES = 1000
_THEIR_ROWS = {"cuda": 256, "cpu": 8}  # 256 is the default of timm's benchmark script
_PICTURES = 64  # that are compared
_EAGER, _COMPILED = "timm eager, amp", "timm compiled, amp"
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Parity:
    """How far logits are from those in float32."""

    max_difference: float
    mean_kl: float
    """KL(float32 || these) at temperature 1, nats."""
    agreement_top1: float

    @classmethod
    def of(cls, logits_RK: torch.Tensor, reference_RK: torch.Tensor) -> Parity:
        """Compare."""
        ours, theirs = logits_RK.double(), reference_RK.double()
        log_p, log_q = theirs.log_softmax(1), ours.log_softmax(1)
        return cls(
            float((ours - theirs).abs().max()),
            max(0.0, float((log_p.exp() * (log_p - log_q)).sum(1).mean())),
            float((ours.argmax(1) == theirs.argmax(1)).double().mean()),
        )

    def __str__(self) -> str:
        return f"|d| {self.max_difference:.2g}, KL {self.mean_kl:.2g}, top-1 {self.agreement_top1:.1%}"


def random_bit(architecture: str, num_classes: int = _CLASSES) -> nn.Module:
    """A network whose logits differ between pictures: as made, all norms are the identity and the head is small."""
    torch.manual_seed(0)
    module = models.create(architecture, num_classes).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, float(name.endswith("weight")), 0.2)
    nn.init.normal_(module.get_classifier().weight, 0.0, 0.05)  # type: ignore[operator]
    return module


def measure(
    architecture: str, size: int, device: torch.device, machine: Machine, *, rounds: int = 7, burst_s: float = 0.7,
    compiled: bool = True,
) -> Iterator[Figure]:  # fmt: skip
    """The figures of one network at one size, those that take longest last.

    Raises:
        GateError: a fast wrong logit is no result.
    """
    be_reproducible(len(os.sched_getaffinity(0)))
    module = random_bit(architecture)
    card = ModelCard(architecture=architecture, num_classes=_CLASSES, size=size, mean=_HALF, std=_HALF)
    pixels = gate.synthetic_pixels(_PICTURES, size)
    ours, report, reference_RK = _gated(module, card, device, pixels)
    module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pictures = Scene.unmixed(pixels).rows(0, len(pixels), card).to(device)
    contenders = {"ours": _ours(ours, pictures), _EAGER: _timm(module, pictures)}
    said = (
        f"ours: |d| {report.max_difference:.2g}, KL {report.mean_kl:.2g}, top-1 {report.agreement_top1:.1%}, batch "
        f"invariant: {report.batch_invariant}; {_EAGER}: {_parity(module, pictures, reference_RK)}"
    )

    name, row = _named(architecture, size)
    times = in_turns(contenders, device, rounds=rounds, burst_s=burst_s)
    speed = rates(contenders, times)
    flops, moved = flops_per_image(architecture, size), half_bytes_per_image(architecture, size)
    floor = machine.flops / flops
    apart = 1 / (flops / machine.flops + moved / machine.bytes_per_s)
    yield Figure(
        row=row, name=f"{name}, beside timm eager", value=speed["ours"], unit="images/s",
        beside=f"{_EAGER}, {contenders[_EAGER].num_rows} rows", alternative=speed[_EAGER], floor=floor,
        goal=(">=", 2.0) if row == "1" else None, judged=paired(contenders, times, "ours", _EAGER),
        note=f"against float32, {len(pixels)} pictures, {said}",
    )  # fmt: skip
    yield Figure(
        row=row, name=f"{name}, of the floor", value=speed["ours"], unit="images/s", floor=floor,
        goal=(">=", 0.5) if row == "1" else None, judged=speed["ours"] / floor,
        note=f"floor: {flops / 1e9:.1f} GFLOP an image at {machine.flops / 1e12:.0f} TFLOP/s; {moved / 1e6:.0f} MB an "
        f"image at {machine.bytes_per_s / 1e12:.2f} TB/s after that would allow {apart:.0f}",
    )  # fmt: skip
    if compiled:
        quick = torch.compile(module, dynamic=False)
        contenders = {"ours": contenders["ours"], _COMPILED: _timm(quick, pictures)}
        times = in_turns(contenders, device, rounds=rounds, burst_s=burst_s)
        speed = rates(contenders, times)
        yield Figure(
            row="2", name=f"{name}, beside timm compiled", value=speed["ours"], unit="images/s",
            beside=f"{_COMPILED}, {contenders[_COMPILED].num_rows} rows", alternative=speed[_COMPILED], floor=floor,
            goal=(">=", 1.15), judged=paired(contenders, times, "ours", _COMPILED),
            note=f"{_COMPILED}: {_parity(quick, pictures, reference_RK)}",
        )  # fmt: skip


def norm_figure(device: torch.device, machine: Machine, shape: tuple[int, ...] = (128, 2048, 14, 14)) -> Figure:
    """The fused addition, norm and ReLU, of the shape that a R152x2 has most, beside torch's three."""
    from teacher_server.group_norm import add_group_norm_relu

    generator = torch.Generator(device).manual_seed(0)
    x, branch = (
        torch.randn(shape, generator=generator, device=device).half().contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight, bias = (torch.randn(shape[1], generator=generator, device=device) for _ in range(2))

    def theirs() -> torch.Tensor:
        normed = nn.functional.group_norm((x + branch).float(), 32, weight, bias)
        return normed.relu().half()

    _, ours = add_group_norm_relu(x, branch, weight, bias, 32, 1e-5)
    difference = float((ours.float() - theirs().float()).abs().max())
    contenders = {
        "ours": Contender(1, lambda: add_group_norm_relu(x, branch, weight, bias, 32, 1e-5)),
        "torch": Contender(1, theirs),
    }
    times = in_turns(contenders, device, rounds=7, burst_s=0.1)
    moved = 4 * 2 * x.numel() / 1e9  # two halves are read, two are written
    speed = {name: moved / statistics.median(seconds) for name, seconds in times.items()}
    return Figure(
        row="1", name=f"addition, norm and ReLU of {' x '.join(map(str, shape))}", value=speed["ours"], unit="GB/s",
        beside="torch's, in float32", alternative=speed["torch"], floor=machine.bytes_per_s / 1e9,
        note=f"each is read and written once; floor: a copy's rate. Largest difference {difference:.2g}",
    )  # fmt: skip


def unmeasured(architecture: str, size: int, why: str) -> Iterator[Figure]:
    """The rows of the table without their numbers."""
    name, row = _named(architecture, size)
    goals = {"beside timm eager": (row, 2.0), "of the floor": (row, 0.5), "beside timm compiled": ("2", 1.15)}
    for what, (number, goal) in goals.items():
        wanted = number == "1" or what == "beside timm compiled"
        yield Figure(
            row=number, name=f"{name}, {what}", value=None, unit="images/s", goal=(">=", goal) if wanted else None,
            note=why,
        )  # fmt: skip


def _named(architecture: str, size: int) -> tuple[str, str]:
    """A figure's name, and its row."""
    short = architecture.removeprefix("resnetv2_").removesuffix("_bit")
    return f"BiT-R{short} forward at {size}", "1" if (short, size) == ("152x2", 224) else "2"


def _gated(
    module: nn.Module, card: ModelCard, device: torch.device, pixels: torch.Tensor
) -> tuple[Teacher, gate.Report, torch.Tensor]:
    """Ours as it is served, what the gate saw, and the logits in float32."""
    precision = choose_precision("auto" if device.type == "cuda" else "bfloat16", device)
    shape: dict[str, Any] = {"device": device, "batch_rows": choose_batch_rows(None, device)}
    reference = Teacher(copy.deepcopy(module), card, precision="float32", **shape)
    ours = Teacher(copy.deepcopy(module), card, precision=precision, **shape)
    report = gate.measure(ours, reference, pixels)
    gate.judge(report, Config(model=card.architecture))
    rows = Scene.unmixed(pixels).rows(0, len(pixels), card)
    parts = [reference.logits(part).cpu() for part in torch.split(rows, reference.batch_rows)]
    return ours, report, torch.cat(parts)


def _ours(teacher: Teacher, pictures: torch.Tensor) -> Contender:
    batch = _repeated(pictures, teacher.batch_rows)
    return Contender(len(batch), lambda: teacher.logits(batch))


def _timm(module: Any, pictures: torch.Tensor) -> Contender:
    batch = _repeated(pictures, _THEIR_ROWS[pictures.device.type])
    return Contender(len(batch), lambda: _amp(module, batch), _as_timm)


def _repeated(pictures: torch.Tensor, num_rows: int) -> torch.Tensor:
    times = -(-num_rows // len(pictures))
    return pictures.repeat(times, 1, 1, 1)[:num_rows].contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def _amp(module: Any, batch: torch.Tensor) -> torch.Tensor:
    dtype = torch.float16 if batch.device.type == "cuda" else torch.bfloat16
    with torch.autocast(batch.device.type, dtype):
        logits: torch.Tensor = module(batch)
    return logits


def _parity(module: Any, pictures: torch.Tensor, reference_RK: torch.Tensor) -> Parity:
    with _as_timm():
        num_rows = _THEIR_ROWS[pictures.device.type]  # of one shape always, or a compiler would begin anew
        parts = [
            _amp(module, _repeated(part, num_rows))[: len(part)].float().cpu()
            for part in torch.split(pictures, num_rows)
        ]
    return Parity.of(torch.cat(parts), reference_RK)


@contextlib.contextmanager
def _as_timm() -> Iterator[None]:
    """The settings of timm's scripts, and ours again."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.benchmark, cudnn.deterministic = True, False
    cudnn.conv.fp32_precision = matmul.fp32_precision = "tf32"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        be_reproducible(torch.get_num_threads())


def main() -> None:
    """Print a figure a line, as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="resnetv2_152x2_bit, resnetv2_50x1_bit")
    parser.add_argument("size", type=int, help="pixels a side")
    parser.add_argument("--quick", action="store_true", help="one round, and timm's is not compiled")
    parser.add_argument("--norm", action="store_true", help="the fused norm alone, too")
    asked = parser.parse_args()
    device = torch.device("cuda", 0)
    machine = Machine.measured(device)
    length: dict[str, Any] = {"rounds": 1, "burst_s": 0.1, "compiled": False} if asked.quick else {}
    for one in measure(asked.network, asked.size, device, machine, **length):
        print(json.dumps(dataclasses.asdict(one)), flush=True)
    if asked.norm:
        print(json.dumps(dataclasses.asdict(norm_figure(device, machine))), flush=True)


if __name__ == "__main__":
    main()
