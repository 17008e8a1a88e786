"""From encoded pictures and boxes to pixels: one DALI graph, called by the student's loader and by the teacher.

The order and the rounding are the reference's: decode the box, resize it, truncate to uint8, mirror. The uint8
view is canonical: its digest can be compared between machines. Turning it into floats and mixing is `mix.py`.

On the CPU, decoding is exact, and resizing differs from a float64 calculation by one grey level in 1 of 80,000
values, where float32 falls on the other side of a truncation (tests/test_render.py). Two CPUs agree to the last
bit. On the GPU nvJPEG's inverse DCT differs by a grey level here and there: views are then compared within a bound.

Rejected: fn.random_resized_crop and friends (they hide the box and draw by another law), and resize(roi_start=...)
on the whole picture (its border taps see pixels outside the crop).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import nvidia.dali as dali
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from nvidia.dali import fn, types
from PIL import Image, ImageOps

RENDER_VERSION = "funmatch-render-1"
"""Changes whenever the same box of the same file would give other pixels."""

MAX_PIXEL_DIFFERENCE = {"cpu": 0, "cuda": 8}
"""Largest |difference| in grey levels between two renderings of one view that is still the same view, by the
device of the less exact side. For CUDA this is an assumption, not measured yet."""

_INTERPOLATIONS = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}

# Truncation, as in the reference (big_vision pp/ops_image.py casts without rounding). DALI weights sum to 1 only up to
# float32 rounding, so a flat region of 200 may come out as 199.99999: the margin keeps it 200.
_TRUNCATION_MARGIN = 2.0**-10


class BadPictureError(ValueError):
    """A picture that does not decode, or a box that leaves it."""

    def __init__(self, view: int, reason: str) -> None:
        super().__init__(reason)
        self.view = view
        """Position of the view in the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """How a box becomes pixels."""

    size: int
    """Height and width of the rendered view, in pixels."""
    interpolation: Literal["linear", "cubic"] = "linear"
    """The reference: linear."""
    antialias: bool = False
    """Low-pass filter before shrinking. The reference: no."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 4096:
            raise ValueError(f"size is {self.size}; a view has 1 to 4096 pixels a side")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}; choose one of {list(_INTERPOLATIONS)}")


class Renderer:
    """Renders views of encoded pictures. One thread at a time; keep several for several threads."""

    def __init__(self, rendering: Rendering, max_views: int, device_id: int | None, num_threads: int) -> None:
        """Build the graph.

        Args:
            rendering: size and interpolation.
            max_views: views rendered at once; larger batches are rendered in parts.
            device_id: the CUDA device that decodes and resizes, or None for the CPU.
            num_threads: decoding threads.
        """
        self.rendering = rendering
        self._max_views = max_views
        self._device_id = device_id
        self._num_threads = num_threads
        self._graph = self._build()

    def render(
        self,
        pictures: Sequence[NDArray[np.uint8]],
        image: NDArray[np.int32],
        box: NDArray[np.int32],
        flip: NDArray[np.bool_],
    ) -> torch.Tensor:
        """Render V views of the encoded pictures: uint8 [V, size, size, 3] on the renderer's device.

        View v shows box[v] of pictures[image[v]], mirrored if flip[v].

        Raises:
            BadPictureError: a picture does not decode or a box leaves it; says which view. The renderer lives on.
        """
        parts = []
        for start in range(0, len(image), self._max_views):
            part = slice(start, start + self._max_views)
            shown = [pictures[i] for i in image[part]]
            for view, picture in enumerate(shown):
                # A decoder that needs only the top of a picture does not notice that its end is missing.
                if _is_jpeg_without_end(picture):
                    self._raise_bad_picture(shown[view : view + 1], box[part][view : view + 1], start + view)
            parts.append(self._render_part(shown, box[part], flip[part], start))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _render_part(
        self, pictures: list[NDArray[np.uint8]], box: NDArray[np.int32], flip: NDArray[np.bool_], start: int
    ) -> torch.Tensor:
        feed: Any = self._graph.feed_input
        feed("picture", pictures)
        feed("start", np.ascontiguousarray(box[:, :2]))
        feed("shape", np.ascontiguousarray(box[:, 2:]))
        feed("flip", flip.astype(np.int32))
        try:
            views = self._graph.run()[0].as_tensor()
        except RuntimeError as error:
            self._graph = self._build()  # a graph that failed is no longer valid
            self._raise_bad_picture(pictures, box, start)
            raise RuntimeError(f"rendering failed, though every picture decodes: {error}") from error
        if self._device_id is None:
            return torch.from_numpy(np.array(views))
        return torch.utils.dlpack.from_dlpack(views).clone()

    def _build(self) -> Any:
        # exec_dynamic: inputs and outputs may change their batch size from run to run.
        pipeline = dali.Pipeline(
            batch_size=self._max_views,
            num_threads=self._num_threads,
            device_id=self._device_id,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with pipeline:
            pipeline.set_outputs(_graph(self.rendering, on_gpu=self._device_id is not None))
        pipeline.build()
        return pipeline

    @staticmethod
    def _raise_bad_picture(pictures: list[NDArray[np.uint8]], box: NDArray[np.int32], start: int) -> None:
        for view, (picture, yxhw) in enumerate(zip(pictures, box, strict=True)):
            reason = _find_fault(picture, yxhw)
            if reason:
                raise BadPictureError(start + view, reason)


def _graph(rendering: Rendering, on_gpu: bool) -> Any:
    picture = fn.external_source(name="picture", dtype=types.UINT8, ndim=1)
    start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    # axis_names: DALI's own order of a window is width, height. Fancy upsampling: nvJPEG's default for chroma
    # is nearest-neighbour, libjpeg-turbo's is not; the two sides would see other colours.
    gpu_decoder = {"device": "mixed", "jpeg_fancy_upsampling": True}
    crop = fn.decoders.image_slice(
        picture, start, shape, axis_names="HW", normalized_anchor=False, normalized_shape=False,
        output_type=types.RGB, **(gpu_decoder if on_gpu else {"device": "cpu"}),
    )  # fmt: skip
    resized: Any = fn.resize(
        crop,
        size=(rendering.size, rendering.size),
        interp_type=_INTERPOLATIONS[rendering.interpolation],
        antialias=rendering.antialias,
        dtype=types.FLOAT,
    )
    truncated = fn.cast(dali.math.floor(resized + _TRUNCATION_MARGIN), dtype=types.UINT8)
    return fn.flip(truncated, horizontal=flip)


def _is_jpeg_without_end(picture: NDArray[np.uint8]) -> bool:
    head, tail = picture[:2].tobytes(), picture[-2:].tobytes()
    return head == b"\xff\xd8" and tail != b"\xff\xd9"


def _find_fault(picture: NDArray[np.uint8], box: NDArray[np.int32]) -> str | None:
    """Why this box of this picture cannot be rendered, by a second decoder; None if it can."""
    try:
        with Image.open(io.BytesIO(picture.tobytes())) as opened:
            width, height = ImageOps.exif_transpose(opened).size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return f"the picture ({len(picture)} bytes) does not decode: {error}"
    y, x, h, w = (int(number) for number in box)
    if y < 0 or x < 0 or h < 1 or w < 1 or y + h > height or x + w > width:
        return f"the box (y={y}, x={x}, h={h}, w={w}) leaves the picture of {height} x {width} pixels (h x w)"
    return None
