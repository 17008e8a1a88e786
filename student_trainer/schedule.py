"""How long to train, and the multiplier s(step) in [0, 1] of the whole update at each step.

The paper's code knows one shape: a linear warm-up times one cosine down to zero, without restarts. Its Shampoo runs
(appendix D) decay quadratically, and BiT's fine-tuning in stairs. The multiplier scales the learning rate and the
weight decay alike (optimizer.py).

Rejected: torch's LR schedulers. They hold state of their own, which would have to go into the checkpoint,
and chaining them gives a warm-up *followed by* a cosine through state; this is one line, a function of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


def num_steps(epochs: float, num_train: int, batch_size: int) -> int:
    """Steps of the global batch that show `epochs` times `num_train` pictures, to the nearest step.

    The stream of samples never ends and batches cross epoch borders, so an epoch need not be a whole number
    of steps: Flowers102 is 1.99 steps of 512.
    """
    return max(1, round(epochs * num_train / batch_size))


def warmup_of(steps_or_share: float, num_steps: int) -> int:
    """Steps of the warm-up of a run of `num_steps`: as many as given or, below 1, this share of the run."""
    return round(steps_or_share * num_steps if 0 < steps_or_share < 1 else steps_or_share)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """s(t) = min(1, t / warmup) * decay(t), with p = clip((t - warmup) / (num_steps - warmup), 0, 1):

        cosine      (1 + cos(pi * p)) / 2
        quadratic   (1 - p)^2
        staircase   divided by 10 after each of `stairs`, shares of num_steps (big_transfer bit_hyperrule.py)

    t counts the updates done before this one: the first update has s(0) = 0 and only fills Adam's moments.
    """

    num_steps: int
    """Length of the run in optimizer steps."""
    warmup_steps: int
    """Steps of linear warm-up (paper: 1500 for the small data sets, 5000 for ImageNet); 0 for none."""
    decay: Literal["cosine", "quadratic", "staircase"] = "cosine"
    stairs: tuple[float, ...] = (0.3, 0.6, 0.9)
    """Shares of num_steps. BiT's own: these from 20 000 pictures on, (0.4, 0.6, 0.8) of 500 steps below."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.num_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but the run has {self.num_steps} steps: give it at least 0 and "
                "fewer than the run's steps (--optim.warmup-steps 0.05 is a twentieth of any run), or train longer "
                "(--optim.epochs)"
            )

    def __call__(self, step: int) -> float:
        """Return s(step), for step = 0, 1, ..., num_steps - 1; zero from num_steps on, but for stairs."""
        warmup = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        if self.decay == "staircase":
            return warmup * 0.1 ** sum(step > share * self.num_steps for share in self.stairs)
        progress = (step - self.warmup_steps) / (self.num_steps - self.warmup_steps)
        progress = min(1.0, max(0.0, progress))
        if self.decay == "quadratic":
            return warmup * (1.0 - progress) ** 2
        return warmup * 0.5 * (1.0 + math.cos(math.pi * progress))
