"""What a user would write instead of our loader: torchvision in a DataLoader, and webdataset with torchvision.

Both in their usual form: a worker process makes a sample at a time, whole pictures are decoded, and every sample is
normalised by itself. Both show the boxes that they are given, cut first, then resized bilinearly without antialias, as
ours; torchvision rounds to uint8, ours truncates. torchvision decodes by its own JPEG decoder, webdataset by Pillow.

Workers are spawned (DALI's threads do not survive a fork) and kept between rounds, so that importing is not timed.
Rejected: one resize of the PIL image, which would always be antialiased.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from data_prep.index import Index
from views.view import Rows

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, on the 0..1 scale."""


class Loader(Protocol):
    """Yields pairs of samples, int64 [N], and normalised images, float32 [N, 3, S, S]."""

    def __call__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Make the views once."""


class Views(Dataset[tuple[int, torch.Tensor]]):
    """Each view of some rows, several times over: read from the shards, decoded, cut, resized, normalised."""

    def __init__(self, index: Index, rows: Rows, size: int, passes: int) -> None:
        self._index, self._rows, self._size, self._passes = index, rows, size, passes

    def __len__(self) -> int:
        return len(self._rows) * self._passes

    def __getitem__(self, place: int) -> tuple[int, torch.Tensor]:
        view = place % len(self._rows)
        sample = int(self._rows.sample[view])
        (file,) = self._index.read([sample])
        with warnings.catch_warnings():  # torchvision 0.29 gives its decoders up; they are its fastest, so we compare
            warnings.simplefilter("ignore", DeprecationWarning)
            picture = decode_jpeg(torch.from_numpy(file), mode=ImageReadMode.RGB)
        y, x, h, w = self._rows.box[view].tolist()
        cut = transforms.resized_crop(
            picture, y, x, h, w, [self._size] * 2, interpolation=InterpolationMode.BILINEAR, antialias=False
        )
        return sample, _normalised(cut, bool(self._rows.flip[view]))


def torchvision_loader(index: Index, rows: Rows, size: int, passes: int, batch_size: int, workers: int) -> Loader:
    """Transforms of torchvision v2 in a DataLoader; pictures are read from the shards by their index."""
    loader = DataLoader(
        Views(index, rows, size, passes), batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
    )  # fmt: skip
    return lambda: iter(loader)


def webdataset_loader(index: Index, rows: Rows, size: int, passes: int, batch_size: int, workers: int) -> Loader:
    """The shards read in order by webdataset, each worker its share; transforms of torchvision v2."""
    views = {
        bytes(index.key[sample]).decode(): (int(sample), box, bool(flip))
        for sample, box, flip in zip(rows.sample, rows.box, rows.flip, strict=True)
    }
    shards = [str(index.root / shard.name) for shard in index.shards]
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=False)
        .repeat(passes)
        .decode("pilrgb")
        .map(partial(_view_of, views=views, size=size))
        .batched(batch_size)
    )
    loader = webdataset.WebLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
    )
    return lambda: iter(loader)


def _view_of(
    stored: Mapping[str, Any], views: Mapping[str, tuple[int, NDArray[np.int32], bool]], size: int
) -> tuple[int, torch.Tensor]:
    picture: Image.Image = stored["jpg"]
    sample, (y, x, h, w), flip = views[stored["__key__"]]
    cut = transforms.pil_to_tensor(picture.crop((int(x), int(y), int(x + w), int(y + h))))
    resized = transforms.resize(cut, [size, size], interpolation=InterpolationMode.BILINEAR, antialias=False)
    return sample, _normalised(resized, flip)


def _normalised(view: torch.Tensor, flip: bool) -> torch.Tensor:
    view = transforms.horizontal_flip(view) if flip else view
    scaled = transforms.to_dtype(view, torch.float32, scale=True)
    normalised: torch.Tensor = transforms.normalize(scaled, list(MEAN), list(STD))
    return normalised
