"""What a recipe is: a name, where in the paper it is from, what came out there, and the config that it resolves to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from student_trainer.config import Config

_MIXUP = (
    "Mixup as in the released code since 2024: lambda folded to [1/2, 1], partners in the global batch; paper: lambda "
    "in [0, 1], --views.no-fold-lambda; code of 2022: partners within a device, --views.mixup-groups NUM_DEVICES"
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment."""

    config: Config
    section: str = ""
    """Of the paper (Beyer et al., CVPR 2022), with its table or figure."""
    expected: float | None = None
    """The student's top-1 in percent that the paper reports, on the split that the recipe evaluates."""
    says: str
    """What it is, in a sentence."""
    follows: str = ""
    """Where paper and released code differ, or both are silent: what was chosen, and the setting for the other."""

    @property
    def choices(self) -> tuple[str, ...]:
        """All that was chosen where paper and code differ or are silent: its own, and that of all mixed views."""
        mixed = self.config.views.setting.endswith("+mix")
        return tuple(filter(None, (self.follows, _MIXUP if mixed else "")))

    @property
    def name(self) -> str:
        """Its name on the command line."""
        return self.config.recipe

    @property
    def command(self) -> str:
        """How to run it."""
        return f"torchrun student_trainer/main.py --recipe {self.name}"


def patient(config: Config, num_train: int, every: int) -> Config:
    """Set how often a long run evaluates, saves and logs.

    Args:
        config: the run.
        num_train: pictures of the training split.
        every: steps between evaluations, and between checkpoints.
    """
    steps = config.optim.epochs * num_train / config.optim.batch_size
    # A record of fifty thousand lines shows as much as one of two million, and is read in a second.
    log_every = max(1, int(steps // 50_000))
    return dataclasses.replace(config, evaluate_every=every, checkpoint_every=every, log_every=log_every)
