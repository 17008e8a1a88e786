"""The paper's optimizers: Adam for nearly all of it, SGD with momentum and Shampoo for two of its studies.

All of them clip, decay kernels in a decoupled way, and obey one multiplier over all. Adam is torch's AdamW. The
released code chains (optax)

    clip_by_global_norm(1.0) -> scale_by_adam(mu_dtype=bfloat16) -> * lr -> + wd * w (kernels) -> * s(t) -> * -1

that is, w -= s(t) * (lr * adam(g) + wd * w): the decay is multiplied by the schedule, but not by the
learning rate. torch's AdamW does w -= lr_t * adam(g) + lr_t * weight_decay * w, so lr_t = lr * s(t) and
weight_decay = wd / lr make it the same update; tests/test_optimizer.py compares the two over 50 steps.

What s(t) is belongs to schedule.py; unscaling gradients for mixed precision to the loop, before clipping.

Rejected: AdamW(weight_decay=wd), the usual reading of "AdamW": its decay would be 100 times too weak at lr 0.01.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pytorch_optimizer import ScalableShampoo
from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting
from pytorch_optimizer.optimizer.utils.preconditioner import PreConditioner
from pytorch_optimizer.optimizer.utils.shape import merge_small_dims
from torch import Tensor, nn

from student_trainer.config import OptimConfig

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


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of a recipe over the trainable parameters of `model`.

    Whatever the optimizer, with u its update for learning rate 1:  w -= s(t) * (lr * u + wd * w), the decay for
    kernels only.

    Args:
        model: what to train; also when wrapped in DDP.
        optim: which one, peak learning rate (that of s(t) = 1), and decay per step at s(t) = 1.
    """
    decayed = kernels(model)
    ids = {id(parameter) for parameter in decayed}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": optim.weight_decay / optim.lr},
        {"params": others, "weight_decay": 0.0},
    ]
    make = {"adam": _adam, "sgdm": _sgdm, "shampoo": _shampoo}[optim.optimizer]
    optimizer = make(groups, optim)
    for group in optimizer.param_groups:
        group["peak_lr"] = optim.lr
    return optimizer


def _adam(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """The paper's. The first moment is *stored* in float32 also when it is bfloat16's: that is there to reproduce the
    numbers, and does not save memory.
    """
    # foreach, never fused: with a gradient scaler the fused step is called even when it is to be skipped,
    # and the hook below would then decay the moment twice.
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(_BETA1, 0.999), eps=1e-8, foreach=True)
    if optim.mu_dtype == "bfloat16":
        optimizer.register_step_pre_hook(_decay_mu_in_bfloat16)
    return optimizer


def _sgdm(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum (section 3.9; BiT's fine-tuning). torch's own decay goes through the momentum."""
    decays = [group.pop("weight_decay") for group in groups]
    optimizer = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, foreach=True)
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["decoupled_decay"] = decay
    optimizer.register_step_pre_hook(_decay_kernels)
    return optimizer


def _shampoo(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """Shampoo as in appendix D: blocks of 128, inverse roots at every step, Nesterov momentum.

    The appendix names neither learning rate, nor betas, nor grafting. Here the length of each layer's step is that of
    RMSProp, and momentum is a mean: Adam's lengths, so that Adam's learning rates keep their meaning. But for the
    start: RMSProp's mean of squares begins at 0 and nothing corrects it, so steps are 1 / sqrt(1 - 0.999^t) times as
    long, 3.2 times after 100, 1.1 after the appendix's warm-up of 1800. Do not shorten that without a smaller lr.
    The library takes the direction, too, from RMSProp in the first 24 updates.
    """
    return _Shampoo(
        groups,
        lr=optim.lr,
        betas=(_BETA1, 0.999),
        moving_average_for_momentum=True,
        decoupled_weight_decay=True,
        nesterov=True,
        block_size=128,
        preconditioning_compute_steps=optim.inverse_every,
        graft_type=LayerWiseGrafting.RMSPROP,
    )


# Where the objects of a parameter's state keep their numbers: (object, attribute).
_SHAMPOO_TENSORS = (
    ("pre_conditioner", "statistics"),
    ("pre_conditioner", "pre_conditioners"),
    ("graft", "momentum"),
    ("graft", "statistics"),
)


class _Shampoo(ScalableShampoo):
    """The library's Shampoo, which ranks can run in step and checkpoints can hold."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update. The library estimates eigenvalues from random vectors: they become a function of the step."""
        devices = {p.device for group in self.param_groups for p in group["params"] if p.is_cuda}
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.param_groups[0].get("step", 0))
            return super().step(closure)

    def init_group(self, group: dict[str, Any], **kwargs: Any) -> None:
        """Make missing state. Where a kernel's first dimension is larger than a block, the library puts a dimension of
        1 before it, and conditions that one too: roots become too high (6 instead of 4), and blocks get lengths of
        their own. Its shapes are made without.
        """
        new = [p for p in group["params"] if p.grad is not None and p not in self.state]
        super().init_group(group, **kwargs)
        for p in new:
            shape = [size for size in merge_small_dims(p.shape, self.block_size) if size > 1] or [p.numel()]
            self.state[p]["pre_conditioner"] = PreConditioner(
                p.detach().reshape(shape),
                beta2=group["betas"][1],
                inverse_exponent_override=0,
                block_size=self.block_size,
                skip_preconditioning_rank_lt=self.skip_preconditioning_rank_lt,
                no_preconditioning_for_layers_with_dim_gt=self.no_preconditioning_for_layers_with_dim_gt,
                shape_interpretation=False,
                pre_conditioner_type=self.pre_conditioner_type,
                matrix_eps=self.matrix_eps,
                use_svd=self.use_svd,
            )
            self.state[p]["pre_conditioner"].original_shape = p.shape

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only: the library's own holds objects, which a safe loader refuses."""
        plain: dict[str, Any] = super().state_dict()
        plain["state"] = {
            number: {"momentum": state["momentum"]} | {
                f"{owner}.{name}": getattr(state[owner], name) for owner, name in _SHAMPOO_TENSORS
            }
            for number, state in plain["state"].items()
        }  # fmt: skip
        return plain

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo `state_dict`: let the library make its objects, and fill them."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        saved = {parameters[number]: state for number, state in state_dict["state"].items()}
        for p in parameters:
            p.grad = torch.zeros_like(p) if p in saved else None  # the library makes state where there is a gradient
        for group in self.param_groups:
            self.init_group(group)
        for p, state in saved.items():
            p.grad = None
            self.state[p]["momentum"].copy_(state["momentum"])
            for owner, name in _SHAMPOO_TENSORS:
                _copy_into(getattr(self.state[p][owner], name), state[f"{owner}.{name}"])


def _copy_into(own: Any, saved: Any) -> None:
    """A tensor, or a list of tensors of different shapes."""
    if isinstance(own, Tensor):
        own.copy_(saved)
        return
    for one, other in zip(own, saved, strict=True):
        one.copy_(other)


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
def _decay_kernels(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step of SGD: w -= s(t) * wd * w."""
    for group in optimizer.param_groups:
        if group["decoupled_decay"]:
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["decoupled_decay"])


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
