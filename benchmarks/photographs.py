"""A prepared data set for benchmarks: JPEGs as large as ImageNet's, made on the spot, and prepared as any others are.

Noise with structure at many scales: at quality 90 a file weighs about what a photograph does (75 to 110 kB for 500 x
375). Rejected: flat colours or white noise, which decode faster and slower than any photograph.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.index import Index
from data_prep.prepare import prepare

HEIGHT, WIDTH = 375, 500
"""Pixels, ImageNet's most common size."""

_CELLS = 3, 8, 20, 60, 180
_CLASSES = 2


def prepared(folder: Path, num: int) -> Index:
    """A set of so many pictures below a folder, half of it in each of two classes; all of them to train on."""
    rng = np.random.default_rng(2021)
    for number in range(num):
        where = folder / "pictures" / "train" / f"class_{number % _CLASSES}"
        where.mkdir(parents=True, exist_ok=True)
        _photograph(rng).save(where / f"{number:05d}.jpg", quality=90)
    prepare("folder", folder / "pictures", folder / "prepared", workers=1, progress=False)
    return Index.open(folder / "prepared")


def _photograph(rng: np.random.Generator) -> Image.Image:
    total = np.zeros((HEIGHT, WIDTH, 3))
    for cells in _CELLS:
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    return Image.fromarray((total / len(_CELLS)).astype(np.uint8))
