"""The start-up gate: is this network, in this precision, on this device, fit to be served?

Before the first request it answers real pictures, and is compared with itself in float32. Soft targets carry
their information in small numbers; a teacher that quietly overflows or rounds them away would still look alive.
The gate also measures what the fixed batch shape promises: that a row's logits are the same bits in another
place, with other batch-mates, and in a batch that is mostly padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_server.config import Config
from teacher_server.model import Scene, Teacher


class GateError(RuntimeError):
    """The network must not be served."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the gate saw."""

    num_images: int
    finite: bool
    """No NaN and no infinity in the logits, also in the dtype in which they travel."""
    max_difference: float
    """Largest |served - float32| of all logits."""
    mean_kl: float
    """KL(float32 || served) at temperature 1, nats, mean over the pictures."""
    agreement_top1: float
    """Share of pictures with the same top-1 class."""
    batch_invariant: bool
    """A row's logits were the same bits whatever its place and its batch-mates."""


def wire_dtype(precision: str) -> type[np.float16] | type[np.float32]:
    """The dtype in which logits travel: half precisions travel as float16, whose rounding is below their own."""
    return np.float32 if precision == "float32" else np.float16


def measure(served: Teacher, reference: Teacher | None, pixels: torch.Tensor) -> Report:
    """Answer uint8 views [V, S, S, 3] with both.

    Args:
        served: the teacher as it will answer.
        reference: the same network in float32, or None when `served` is that already.
        pixels: what to look at.
    """
    rows = Scene.unmixed(pixels).rows(0, len(pixels), served.card)
    ours = _all_logits(served, rows)
    theirs = ours if reference is None else _all_logits(reference, rows)
    finite = bool(torch.isfinite(torch.from_numpy(ours.numpy().astype(wire_dtype(served.precision)))).all())
    log_p, log_q = theirs.double().log_softmax(dim=1), ours.double().log_softmax(dim=1)
    return Report(
        num_images=len(pixels),
        finite=finite and bool(torch.isfinite(theirs).all()),
        max_difference=float((ours - theirs).abs().max()),
        mean_kl=max(0.0, float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean())),
        agreement_top1=float((ours.argmax(dim=1) == theirs.argmax(dim=1)).double().mean()),
        batch_invariant=_is_batch_invariant(served, rows),
    )


def judge(report: Report, config: Config) -> None:
    """Let pass, or raise GateError with a sentence that says what was measured and what to try."""
    if not report.finite:
        raise GateError(
            "the logits are not finite, or do not fit the dtype in which they travel: damaged weights, a wrong "
            "--architecture, or an overflow (then try --precision bfloat16 or float32)"
        )
    bounds = {
        f"the largest logit difference is {report.max_difference:.4g}, bound {config.gate_max_difference:g} "
        "(--gate-max-difference)": report.max_difference <= config.gate_max_difference,
        f"the mean KL is {report.mean_kl:.4g} nats, bound {config.gate_max_kl:g} (--gate-max-kl)": report.mean_kl
        <= config.gate_max_kl,
        f"top-1 agrees on {report.agreement_top1:.1%} of the pictures, bound {config.gate_min_agreement:.1%} "
        "(--gate-min-agreement)": report.agreement_top1 >= config.gate_min_agreement,
    }
    broken = [sentence for sentence, kept in bounds.items() if not kept]
    if broken:
        raise GateError(
            f"on {report.num_images} pictures the served network differs too much from its float32 self: "
            f"{'; '.join(broken)}. Serve with --precision float32, or another half precision"
        )


def synthetic_pixels(num: int, size: int) -> torch.Tensor:
    """Deterministic stand-ins for photographs: noise at five scales, contrasts as photographs have, uint8 NHWC."""
    rng = np.random.default_rng((2021, 6, 9, num))
    total: NDArray[np.float64] = np.zeros((num, size, size, 3))
    for cells in (2, 4, 8, 16, 32):
        coarse = rng.normal(size=(num, cells, cells, 3)) / np.sqrt(cells)
        at = np.arange(size) * cells // size
        total += coarse[:, at][:, :, at]
    scaled = 127.5 + 70 * total / total.std()
    return torch.from_numpy(scaled.clip(0, 255).astype(np.uint8))


def _all_logits(teacher: Teacher, rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([teacher.logits(part).cpu() for part in torch.split(rows, teacher.batch_rows)])


def _is_batch_invariant(teacher: Teacher, rows: torch.Tensor) -> bool:
    """Compare a full batch with itself turned, with other mates, and with a few of its rows alone."""
    full = rows.repeat(-(-teacher.batch_rows // len(rows)), 1, 1, 1)[: teacher.batch_rows]
    expected = teacher.logits(full)
    few = max(1, len(full) // 3)
    turned = teacher.logits(full.roll(few, dims=0)).roll(-few, dims=0)
    mated = teacher.logits(torch.cat([full[:few], full[few:].flip(3).flip(0)]))[:few]
    alone = teacher.logits(full[:few])
    last = teacher.logits(full[-1:])
    return (
        torch.equal(turned, expected)
        and torch.equal(mated, expected[:few])
        and torch.equal(alone, expected[:few])
        and torch.equal(last, expected[-1:])
    )
