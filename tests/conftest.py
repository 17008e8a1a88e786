"""A prepared data set and a network, both tiny and real, for every test that needs one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NUM_PICTURES = 24
NUM_CLASSES = 6


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Noise with structure at several scales: unlike flat colours it shows every wrong pixel."""
    total = np.zeros((height, width, 3))
    for cells in (3, 8, 20):
        coarse = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        total += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray((total / 3).astype(np.uint8))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a prepared set of 24 JPEGs, 30 to 90 pixels a side, in 6 classes; splits train 18, val 6."""
    from data_prep.prepare import prepare

    root = tmp_path_factory.mktemp("tiny")
    source, out = root / "tiny_pictures", root / "prepared"
    rng = np.random.default_rng((2021, 6))
    for number in range(NUM_PICTURES):
        split = "val" if number % 4 == 3 else "train"
        folder = source / split / f"class_{number % NUM_CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(30, 91, 2)
        photograph(rng, height, width).save(folder / f"picture_{number:02d}.jpg", quality=90)
    prepare("folder", source, out, workers=1, pictures_per_shard=10, progress=False)
    return out


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a random resnetv2_14x05_bit for 32-pixel pictures and 6 classes, as .safetensors."""
    import torch

    import models

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = models.create("resnetv2_14x05_bit", NUM_CLASSES)
        # As made, all norms are the identity, and logits hardly differ between pictures.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.4)
        torch.nn.init.normal_(model.head.fc.weight, 0.0, 0.15)
    card = models.ModelCard(
        architecture="resnetv2_14x05_bit",
        num_classes=NUM_CLASSES,
        size=32,
        mean=(0.5, 0.4, 0.3),
        std=(0.25, 0.2, 0.3),
        data_set="tiny_pictures",
    )
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    models.save(path, model, card)
    return path
