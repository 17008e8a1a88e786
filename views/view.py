"""What a view is: the integers and the one float that say exactly what is looked at.

A *view* is (sample, box, flip): which picture, which rectangle of it in whole pixels of the original,
mirrored or not. It has no resolution: teacher and student render the same box at sizes of their own.
A *row* is what a network sees: one view, or two of them mixed (mixup).

Arrays, not objects per row: a global batch of 4096 rows is five small arrays, and they travel as they are.
Only numpy is imported here. How views are drawn is in `draw.py`, how they become pixels in `render.py`.

Shape legend: V views, R rows (R <= V).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """Rows of one batch, closed under mixup: every partner is among the views.

    Row r shows view r, mixed with view partner[r]:

        lam[r] * view[r] + (1 - lam[r]) * view[partner[r]]

    Views R.. V-1 are there only as partners. A row without mixup has lam = 1 and is its own partner.
    """

    sample: NDArray[np.int64]
    """[V] row number of the picture in the data set's index (data_prep/index.py)."""
    box: NDArray[np.int32]
    """[V, 4] (y, x, height, width) in whole pixels of the upright original."""
    flip: NDArray[np.bool_]
    """[V] mirrored left-right, after the crop."""
    partner: NDArray[np.int32]
    """[R] position of the mixup partner among the V views."""
    lam: NDArray[np.float32]
    """[R] mixup coefficient lambda in [0, 1]: the weight of the row's own view."""

    def __post_init__(self) -> None:
        num_views, num_rows = len(self.sample), len(self.lam)
        shapes = {"box": (num_views, 4), "flip": (num_views,), "partner": (num_rows,)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected {shape}")
        if num_rows > num_views:
            raise ValueError(f"{num_rows} rows need at least as many views, got {num_views}")
        if num_rows and not (self.partner.min() >= 0 and self.partner.max() < num_views):
            raise ValueError(f"partner must lie in [0, {num_views}), got {self.partner}")

    def __len__(self) -> int:
        """Return the number of rows R."""
        return len(self.lam)

    @property
    def num_views(self) -> int:
        """The number of views V: rows plus the partners that are not rows themselves."""
        return len(self.sample)

    def views_of(self, start: int, stop: int) -> NDArray[np.int64]:
        """Positions of the views that rows start..stop-1 need: their own, then partners from outside."""
        partner = self.partner[start:stop]
        outside = partner[(partner < start) | (partner >= stop)]
        return np.concatenate([np.arange(start, stop, dtype=np.int64), np.unique(outside)])

    def take(self, start: int, stop: int) -> Rows:
        """Rows start..stop-1 as a batch of their own, closed under the partner again.

        A slice of a batch paired by roll-by-one carries one extra view; a row that is its own partner none.
        """
        views = self.views_of(start, stop)
        moved_to = np.zeros(self.num_views, dtype=np.int32)
        moved_to[views] = np.arange(len(views), dtype=np.int32)
        return Rows(
            sample=self.sample[views],
            box=self.box[views],
            flip=self.flip[views],
            partner=moved_to[self.partner[start:stop]],
            lam=self.lam[start:stop],
        )

    def alone(self, start: int, stop: int) -> Rows:
        """The views of rows start..stop-1, not mixed with anything."""
        return Rows(
            sample=self.sample[start:stop],
            box=self.box[start:stop],
            flip=self.flip[start:stop],
            partner=np.arange(stop - start, dtype=np.int32),
            lam=np.ones(stop - start, dtype=np.float32),
        )


def view_digest(pixels: NDArray[np.uint8]) -> bytes:
    """16 bytes that stand for a rendered view [size, size, 3]."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()
