"""The network that learns: made or loaded, and what it takes as input."""

from __future__ import annotations

from torch import nn

import models
from student_trainer.config import Config


def make_student(config: Config, num_classes: int, data_set: str) -> tuple[nn.Module, models.ModelCard]:
    """The network and how its input is normalised: as its weights want it, or to -1..1 as the reference does."""
    half = (0.5, 0.5, 0.5)
    if config.student.weights:
        model, card = models.load(config.student.weights, config.student.architecture, num_classes)
        half_or_own = {"mean": card.mean, "std": card.std}
    else:
        model = models.create(config.student.architecture, num_classes)
        models.init_as_bit(model)
        half_or_own = {"mean": half, "std": half}
        if config.student.zero_head:
            models.zero_head(model)
    return model, models.ModelCard(
        architecture=config.student.architecture, num_classes=num_classes, size=config.student.size,
        data_set=data_set, **half_or_own,
    )  # fmt: skip
