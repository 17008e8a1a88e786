"""From encoded pictures and boxes to pixels: one DALI graph, called by the student's loader and by the teacher.

The order and the rounding are the reference's: decode the box, resize it, truncate to uint8, mirror. The uint8
view is canonical: its digest can be compared between machines. Turning it into floats and mixing is `mix.py`.

On the CPU, decoding is exact, and resizing differs from a float64 calculation by one grey level in 1 of 80,000
values, where float32 falls on the other side of a truncation (tests/test_render.py). Two CPUs agree to the last
bit. On the GPU nvJPEG's inverse DCT differs by a grey level here and there: views are then compared within a bound.

On the CPU, DALI resizes and numpy truncates, in one pass, the views of one run while DALI is at the next: DALI's own
floor and cast call libm for every number, and took a quarter of the time. What remains is decoding (the file's Huffman
codes above all) and DALI's resizing along rows.

Rejected: fn.random_resized_crop and friends (they hide the box and draw by another law), and resize(roi_start=...)
on the whole picture (its border taps see pixels outside the crop).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
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

# What DALI decodes and Pillow too. Others of Pillow's would let a file choose what runs: one starts a PostScript
# interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000")

_VIEWS_PER_THREAD = 16  # of one run on the CPU, where runs overlap with truncation

# How files of these formats begin, JPEG aside; TIFF and JPEG 2000 in two ways.
_SIGNATURES = (b"\x89PNG", b"RIFF", b"II*\0", b"MM\0*", b"BM", b"P", b"\0\0\0\x0c", b"\xff\x4f\xff\x51")

_INTERPOLATIONS = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}

# Truncation, as in the reference (big_vision pp/ops_image.py casts without rounding). DALI weights sum to 1 only up to
# float32 rounding, so a flat region of 200 may come out as 199.99999: the margin keeps it 200.
_TRUNCATION_MARGIN = 2.0**-10


_Graph = Callable[["Rendering", bool], Any]


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
        self._graphs: dict[_Graph, Any] = {}
        # Of the copies out of DALI's memory: on torch's default stream they would wait behind the model's kernels.
        self._stream = None if device_id is None else torch.cuda.Stream(device_id)  # type: ignore[no-untyped-call]
        self._graph(_box_of_file)

    def render(
        self,
        pictures: Sequence[NDArray[np.uint8]],
        image: NDArray[np.int32],
        box: NDArray[np.int32],
        flip: NDArray[np.bool_],
    ) -> torch.Tensor:
        """Render V views of the encoded pictures: uint8 [V, size, size, 3] on the renderer's device.

        View v shows box[v] of pictures[image[v]], mirrored if flip[v]. Where pictures are shown twice or more on
        average, each is decoded once, whole, and its boxes are cut from that; otherwise each box is decoded by itself,
        which for a JPEG costs less than the whole. On the CPU the pixels are the same; only a progressive JPEG that
        misses scans differs by some grey levels, where libjpeg guesses at what is missing. Not verified on a GPU.

        Raises:
            BadPictureError: a picture does not decode or a box leaves it; says which view. The renderer lives on.
        """
        shared = len(image) >= 2 * len(np.unique(image))
        parts: list[torch.Tensor] = []
        decoded: dict[int, Any] = {}
        looked_at: set[np.int32] = set()
        for start in range(0, len(image), self._max_views):
            part = slice(start, start + self._max_views)
            shown = [pictures[i] for i in image[part]]
            for view, picture in enumerate(shown):
                if image[start + view] not in looked_at and _is_suspect(picture):
                    self._raise_bad_picture(shown[view : view + 1], box[part][view : view + 1], start + view)
                looked_at.add(image[start + view])
            try:
                if shared:
                    # Views of one picture mostly follow each other: what the last part decoded is kept for this one.
                    decoded = self._decoded(pictures, image[part], decoded)
                    parts.append(self._cut_and_resize([decoded[i] for i in image[part]], box[part], flip[part]))
                else:
                    parts.append(self._decode_and_resize(shown, box[part], flip[part]))
            except RuntimeError as error:
                self._graphs.clear()  # a graph that failed is no longer valid
                self._raise_bad_picture(shown, box[part], start)
                self._raise_picture_that_dali_refuses(shown, start)
                raise RuntimeError(f"rendering failed, though every picture decodes: {error}") from error
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _decode_and_resize(
        self, pictures: list[NDArray[np.uint8]], box: NDArray[np.int32], flip: NDArray[np.bool_]
    ) -> torch.Tensor:
        graph = self._graph(_box_of_file)

        def start(part: slice) -> None:
            graph.feed_input("picture", pictures[part])
            graph.feed_input("start", np.ascontiguousarray(box[part, :2]))
            graph.feed_input("shape", np.ascontiguousarray(box[part, 2:]))
            graph.feed_input("flip", flip[part].astype(np.int32))
            graph.schedule_run()

        def finish() -> Any:
            (views,) = graph.share_outputs()
            graph.release_outputs()  # what we hold stays ours (exec_dynamic)
            return views.as_tensor()

        if self._device_id is not None:
            start(slice(None))
            return self._tensor(finish())
        pixels = np.empty((len(box), self.rendering.size, self.rendering.size, 3), np.uint8)
        step = _VIEWS_PER_THREAD * self._num_threads
        parts = [slice(first, first + step) for first in range(0, len(box), step)]
        try:
            start(parts[0])
            for part, following in zip(parts, [*parts[1:], None], strict=True):
                views = finish()
                if following:
                    start(following)
                self._truncate(views, pixels[part])
        except BaseException:
            self._graphs.clear()  # a run that was started and not finished would answer the next call
            raise
        return torch.from_numpy(pixels)

    def _decoded(
        self, pictures: Sequence[NDArray[np.uint8]], image: NDArray[np.int32], kept: dict[int, Any]
    ) -> dict[int, Any]:
        """The pictures that image names, whole: uint8 [H, W, 3] each, numpy on the CPU and torch on the GPU."""
        wanted = dict.fromkeys(image.tolist())
        decoded = {i: kept[i] for i in wanted if i in kept}
        if new := [i for i in wanted if i not in kept]:
            graph = self._graph(_whole_file)
            graph.feed_input("picture", [pictures[i] for i in new])
            (output,) = graph.run()
            decoded |= {i: self._array(output[place]) for place, i in enumerate(new)}
        return decoded

    def _cut_and_resize(self, pictures: list[Any], box: NDArray[np.int32], flip: NDArray[np.bool_]) -> torch.Tensor:
        crops: list[Any] = []
        for picture, (y, x, h, w) in zip(pictures, box.tolist(), strict=True):
            if min(y, x) < 0 or min(h, w) < 1 or y + h > picture.shape[0] or x + w > picture.shape[1]:
                raise RuntimeError("a box leaves its picture")  # render finds out which
            crop = picture[y : y + h, x : x + w]
            crops.append(np.ascontiguousarray(crop) if self._device_id is None else crop.contiguous())
        graph = self._graph(_crop)
        graph.feed_input("crop", crops)
        graph.feed_input("flip", flip.astype(np.int32))
        return self._tensor(graph.run()[0].as_tensor())

    def _array(self, decoded: Any) -> Any:
        return np.array(decoded) if self._device_id is None else self._copied(decoded)

    def _tensor(self, views: Any) -> torch.Tensor:
        if self._device_id is not None:
            return self._copied(views)
        pixels = np.empty(views.shape(), np.uint8)
        self._truncate(views, pixels)
        return torch.from_numpy(pixels)

    def _truncate(self, views: Any, pixels: NDArray[np.uint8]) -> None:
        """From DALI's floats, on the CPU."""
        exact = np.asarray(views)
        if self.rendering.interpolation == "cubic":  # leaves 0..255 beside an edge; a weighted mean cannot
            exact = np.clip(exact, 0, 255)
        np.add(exact, np.float32(_TRUNCATION_MARGIN), out=pixels, casting="unsafe")

    def _copied(self, lent: Any) -> torch.Tensor:
        """A copy of what lies in DALI's memory on the GPU, which DALI uses again once it is let go. Not run on one yet.

        DALI works on streams of its own, and its outputs are ready when we have them: only this thread has waited.
        """
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            copied = torch.utils.dlpack.from_dlpack(lent).clone()
        self._stream.synchronize()
        copied.record_stream(torch.cuda.current_stream(self._device_id))  # it was allocated on ours and is used there
        return copied

    def _graph(self, outputs: _Graph) -> Any:
        """The built graph; the first time it is made."""
        if outputs not in self._graphs:
            # exec_dynamic: inputs and outputs may change their batch size from run to run.
            pipeline = dali.Pipeline(
                batch_size=self._max_views,
                num_threads=self._num_threads,
                device_id=self._device_id,
                prefetch_queue_depth=1,
                exec_dynamic=True,
            )
            with pipeline:
                pipeline.set_outputs(outputs(self.rendering, self._device_id is not None))
            pipeline.build()
            self._graphs[outputs] = pipeline
        return self._graphs[outputs]

    @staticmethod
    def _raise_bad_picture(pictures: list[NDArray[np.uint8]], box: NDArray[np.int32], start: int) -> None:
        sizes: dict[int, tuple[int, int]] = {}  # decoded once, however many views show it
        for view, (picture, yxhw) in enumerate(zip(pictures, box, strict=True)):
            try:
                if id(picture) not in sizes:
                    sizes[id(picture)] = _decoded_size(picture)
                _check_box(yxhw, sizes[id(picture)])
            except ValueError as error:
                raise BadPictureError(start + view, str(error)) from error

    def _raise_picture_that_dali_refuses(self, pictures: list[NDArray[np.uint8]], start: int) -> None:
        """Raise for a picture that Pillow reads and DALI does not (1 in 10,000 damaged ones): each is decoded alone.

        A sound one goes first: if it fails too, it is the decoder that is broken, and no picture's fault.
        """
        if not self._decodes(_sound_picture()):
            return
        views = {id(picture): view for view, picture in reversed(list(enumerate(pictures)))}
        for view in sorted(views.values()):
            if not self._decodes(pictures[view]):
                size = len(pictures[view])
                raise BadPictureError(start + view, f"the picture ({size} bytes) does not decode: DALI refuses it")

    def _decodes(self, picture: NDArray[np.uint8]) -> bool:
        try:
            self._decoded([picture], np.zeros(1, np.int32), {})
        except RuntimeError:
            self._graphs.clear()
            return False
        return True


def _box_of_file(rendering: Rendering, on_gpu: bool) -> Any:
    """Decode a box of a file, and render it."""
    picture = fn.external_source(name="picture", dtype=types.UINT8, ndim=1)
    start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    # axis_names: DALI's own order of a window is width, height.
    crop = fn.decoders.image_slice(
        picture, start, shape, axis_names="HW", normalized_anchor=False, normalized_shape=False,
        output_type=types.RGB, **_decoder(on_gpu),
    )  # fmt: skip
    return _rendered(crop, rendering, on_gpu)


def _whole_file(rendering: Rendering, on_gpu: bool) -> Any:  # noqa: ARG001 - decoding knows no size
    """Decode a file."""
    picture = fn.external_source(name="picture", dtype=types.UINT8, ndim=1)
    return fn.decoders.image(picture, output_type=types.RGB, **_decoder(on_gpu))


def _crop(rendering: Rendering, on_gpu: bool) -> Any:
    """Render pixels that are decoded and cut already."""
    # Without no_copy, 128 crops of 12 megapixels each took 1.4 GB more. On the CPU the caller keeps them until the run
    # has ended; on the GPU they may be freed while DALI's stream still reads them.
    crop = fn.external_source(
        name="crop", dtype=types.UINT8, ndim=3, layout="HWC", device="gpu" if on_gpu else "cpu", no_copy=not on_gpu
    )
    return _rendered(crop, rendering, on_gpu)


def _rendered(crop: Any, rendering: Rendering, on_gpu: bool) -> Any:
    """uint8 on the GPU; on the CPU floats, not yet truncated."""
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    resized: Any = fn.resize(
        crop,
        size=(rendering.size, rendering.size),
        interp_type=_INTERPOLATIONS[rendering.interpolation],
        antialias=rendering.antialias,
        dtype=types.FLOAT,
    )
    if on_gpu:
        resized = fn.cast(dali.math.floor(resized + _TRUNCATION_MARGIN), dtype=types.UINT8)
    return fn.flip(resized, horizontal=flip)


def _decoder(on_gpu: bool) -> dict[str, Any]:
    # Fancy upsampling: nvJPEG's default for chroma is nearest-neighbour, libjpeg-turbo's is not; the two sides would
    # see other colours.
    return {"device": "mixed", "jpeg_fancy_upsampling": True} if on_gpu else {"device": "cpu"}


def _is_suspect(picture: NDArray[np.uint8]) -> bool:
    """Whether a second decoder should look first.

    A decoder that needs only the top of a picture does not notice that a JPEG's end is missing; and what is no picture
    at all can end the process (DALI 2.4, a segmentation fault, in batches of dozens).
    """
    head = picture[:4].tobytes()
    if head.startswith(b"\xff\xd8"):
        return picture[-2:].tobytes() != b"\xff\xd9"
    return not head.startswith(_SIGNATURES)


def _sound_picture() -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "grey").save(buffer, "JPEG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _decoded_size(picture: NDArray[np.uint8]) -> tuple[int, int]:
    """(height, width), upright, by a second decoder; ValueError where that does not decode either."""
    try:
        with Image.open(io.BytesIO(picture.tobytes()), formats=_FORMATS) as opened:
            width, height = ImageOps.exif_transpose(opened).size
    except MemoryError:
        raise
    except Exception as error:  # broken files surface as SyntaxError, struct.error, ZeroDivisionError, ...
        raise ValueError(f"the picture ({len(picture)} bytes) does not decode: {error}") from error
    return height, width


def _check_box(box: NDArray[np.int32], size: tuple[int, int]) -> None:
    (y, x, h, w), (height, width) = box.tolist(), size
    if y < 0 or x < 0 or h < 1 or w < 1 or y + h > height or x + w > width:
        raise ValueError(
            f"the box (y={y}, x={x}, h={h}, w={w}) leaves the picture of {height} x {width} pixels (h x w)"
        )
