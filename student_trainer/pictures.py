"""The pictures of a batch: read once, rendered by whoever needs them, and named when one of them is bad."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.index import Index
from views.render import BadPictureError, Renderer
from views.view import Rows


class PictureError(RuntimeError):
    """A picture of the data set cannot be rendered."""


class Pictures:
    """The pictures that some rows look at. Legend: M pictures, V views."""

    def __init__(self, index: Index, rows: Rows) -> None:
        self.index = index
        self.sample: NDArray[np.int64] = np.unique(rows.sample)
        """[M] sorted, each once."""

    @functools.cached_property
    def files(self) -> list[NDArray[np.uint8]]:
        """[M] as they lie in the shards; read when first needed: a teacher that sees the data set needs none."""
        return self.index.read(self.sample)

    def file(self, sample: int) -> bytes:
        """One picture's file."""
        return self.files[int(np.searchsorted(self.sample, sample))].tobytes()

    def render(self, renderer: Renderer, rows: Rows) -> torch.Tensor:
        """The views of rows that look at these pictures: uint8 [V, size, size, 3] on the renderer's device.

        Raises:
            PictureError: names the sample, its data set and what is wrong.
        """
        image = np.searchsorted(self.sample, rows.sample).astype(np.int32)
        try:
            return renderer.render(self.files, image, rows.box, rows.flip)
        except BadPictureError as error:
            sample = int(rows.sample[error.view])
            raise PictureError(
                f"sample {sample} ({self.index.key[sample].decode()}) of {self.index.root}: {error}. "
                "`python -m data_prep.check` re-reads a data set; prepare it anew if it was damaged."
            ) from error
