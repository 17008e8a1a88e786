"""What one must know of a network to feed it and to read its answers; it stands in the header of weight files.

Only the card lives here; files are weights.py's and onnx_network.py's.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

HEADER = "funmatch"
"""The name under which a file's metadata holds its card."""


Triple = tuple[float, float, float]
"""One number a colour, red first."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What one must know of a network to feed it and to read its answers."""

    architecture: str
    """timm's name, for `create`."""
    num_classes: int
    """Outputs of the head."""
    size: int
    """Height and width, in pixels, of the pictures that it was made for."""
    mean: Triple
    """Subtracted from RGB on the scale 0..1 (timm's convention)."""
    std: Triple
    """Then divided by this; positive."""
    data_set: str = ""
    """Name of the data set whose classes the outputs are; "" if unknown."""

    def __post_init__(self) -> None:
        if self.num_classes < 1 or self.size < 1:
            raise ValueError(f"num_classes and size must be positive, got {self.num_classes} and {self.size}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need three numbers, std positive; got {self.mean} and {self.std}")

    def to_json(self) -> str:
        """As it stands in a file's header."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, header: str, path: Path) -> ModelCard:
        """Read it back.

        Raises:
            ValueError: names the file that holds a damaged card.
        """
        try:
            fields = json.loads(header)
            return cls(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: the card in the file's header is damaged: {error}") from error
