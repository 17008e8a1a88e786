"""Which files are really decoded: what reaches a DALI graph's decoder, whichever of the renderer's graphs it is.

Rejected: counting calls inside the renderer, which would count what it believes it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import nvidia.dali as dali
import pytest


@contextmanager
def files_decoded() -> Iterator[list[bytes]]:
    """The files given to decoders of this process meanwhile, in their order, each as often as it was."""
    files: list[bytes] = []
    feed = dali.Pipeline.feed_input

    def watched(pipeline: dali.Pipeline, name: str, data: Any, **options: Any) -> None:
        # A decoder takes files: flat arrays of bytes. Decoded pictures have three dimensions.
        if isinstance(data, list) and data[0].ndim == 1:
            files.extend(np.asarray(file).tobytes() for file in data)
        feed(pipeline, name, data, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dali.Pipeline, "feed_input", watched)
        yield files
