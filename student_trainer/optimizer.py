"""The paper's optimizer, as torch's AdamW: clip, Adam, decoupled decay of the kernels, one multiplier over all.

The released code chains (optax)

    clip_by_global_norm(1.0) -> scale_by_adam(mu_dtype=bfloat16) -> * lr -> + wd * w (kernels) -> * s(t) -> * -1

that is, w -= s(t) * (lr * adam(g) + wd * w): the decay is multiplied by the schedule, but not by the
learning rate. torch's AdamW does w -= lr_t * adam(g) + lr_t * weight_decay * w, so lr_t = lr * s(t) and
weight_decay = wd / lr make it the same update; tests/test_optimizer.py compares the two over 50 steps.

What s(t) is belongs to schedule.py; unscaling gradients for mixed precision to the loop, before clipping.

Rejected: AdamW(weight_decay=wd), the usual reading of "AdamW": its decay would be 100 times too weak at lr 0.01.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

_BETA1 = 0.9
# optax multiplies its bfloat16 moment by 0.9 as a bfloat16, which is this number. Over many steps that makes
# mu, and with it the update, 1.6 % smaller than 0.9 would: part of the reference, so part of this.
_BETA1_BF16 = 0.8984375


def kernels(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that decay: weights of convolutions and dense layers, the head's included.

    Not biases, not the scales of norms, not embeddings or tokens (the released code: `.*/kernel$`).
    """
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    weights = [module.get_parameter("weight") for module in model.modules() if isinstance(module, layers)]
    return [weight for weight in dict.fromkeys(weights) if weight.requires_grad]


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, mu_dtype: Literal["float32", "bfloat16"] = "bfloat16"
) -> torch.optim.AdamW:
    """Adam with the paper's decay over the trainable parameters of `model`.

    Args:
        model: what to train; also when wrapped in DDP.
        lr: peak learning rate, > 0: that of s(t) = 1.
        weight_decay: decay per step at s(t) = 1, as in the paper; not multiplied by `lr`.
        mu_dtype: precision of Adam's first moment (paper: bfloat16). The moment is *stored* in float32
            either way: bfloat16 is there to reproduce the numbers, and does not save memory.
    """
    if lr <= 0:
        raise ValueError(f"lr must be positive, got {lr}: the decay is given relative to it")
    if mu_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"mu_dtype must be 'float32' or 'bfloat16', got {mu_dtype!r}")
    decayed = kernels(model)
    ids = {id(parameter) for parameter in decayed}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups = [
        {"params": decayed, "weight_decay": weight_decay / lr},
        {"params": others, "weight_decay": 0.0},
    ]
    # foreach, never fused: with a gradient scaler the fused step is called even when it is to be skipped,
    # and the hook below would then decay the moment twice.
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(_BETA1, 0.999), eps=1e-8, foreach=True)
    for group in optimizer.param_groups:
        group["peak_lr"] = lr
    if mu_dtype == "bfloat16":
        optimizer.register_step_pre_hook(_decay_mu_in_bfloat16)
    return optimizer


def set_schedule(optimizer: torch.optim.Optimizer, multiplier: float) -> float:
    """Scale the next update, learning rate and decay alike, by s(t); return the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier
    return float(optimizer.param_groups[0]["lr"])


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients down together so that their global norm is at most max_norm; return the norm before.

    Call it on the gradients averaged over ranks (after backward under DDP) and unscaled, before the step.
    A non-finite norm is returned, not raised: check it before stepping. torch divides by norm + 1e-6, optax
    by norm: a relative difference of 1e-6 at most where it clips to 1.
    """
    return nn.utils.clip_grad_norm_(parameters, max_norm)


@torch.no_grad()
def _decay_mu_in_bfloat16(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step: let mu be what optax's bfloat16 moment would contribute to it.

    optax rounds mu to bfloat16 when it stores it; the update of this step uses it unrounded. Compiled, XLA
    keeps b1 * mu in float32 (run op by op, as nobody trains, jax rounds the product once more). AdamW
    multiplies by 0.9 itself, hence the ratio.
    """
    moments = [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state]
    for mu in moments:
        mu.copy_(mu.bfloat16()).mul_(_BETA1_BF16 / _BETA1)
