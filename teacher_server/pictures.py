"""From a checked question to uint8 views: the data sets of this machine, and the renderers.

What lives here: the checks that need a picture or a data set, and the bounds of what decoding may cost. What does not:
what the wire says (views/wire.py), how a picture file says its size (picture_header.py), status codes (service.py).

Memory while decoding is bounded: a picture that a request carries has max_pixels at most by its header, and pictures
are read and rendered in portions of _PIXELS_AT_ONCE, boxes included. Pictures of our own data sets are as large as
whoever prepared them wanted; they come in the same portions. Between two portions other requests have their turns.

DALI is imported when the renderers are made: without it a server still answers views that come as pixels.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.index import Index
from teacher_server.picture_header import HeaderError, claimed_size
from views.wire import Question

if TYPE_CHECKING:
    from views.render import Renderer

Turn = Callable[[int], AbstractContextManager[None]]
"""A place at work for a portion of so many pixels; entering it may wait."""

_BEHIND = 10  # niceness: a tenth of a core where all cores are wanted, so that nobody starves it
_VIEWS_AT_ONCE = 128  # of one run of the DALI graph
_PIXELS_AT_ONCE = 2**27  # of pictures and boxes in one portion: 3 bytes each, up to 8 in a PNG of 16 bits


class BadRequestError(ValueError):
    """The request cannot be answered by any teacher; the sentence names the row."""


class UnknownSampleError(BadRequestError):
    """A sample that the data set does not have."""


class NotHereError(BadRequestError):
    """Another teacher might: a data set, a shard or a transport that is not offered here."""


class Pictures:
    """Finds and renders what a question looks at. Thread-safe."""

    def __init__(
        self, indexes: Sequence[Index], renderers: Sequence[Renderer], *, max_pixels: int, max_bytes: int
    ) -> None:
        """Take data sets to refer to, and renderers to share; without renderers only pixels are taken.

        Args:
            indexes: the data sets.
            renderers: what decodes.
            max_pixels: of one picture that a request carries.
            max_bytes: of its file.
        """
        self._max_pixels, self._max_bytes = max_pixels, max_bytes
        self.data_sets: Mapping[str, Index] = {index.digest: index for index in indexes}
        self.renders = bool(renderers)
        self._renderers: queue.LifoQueue[Renderer] = queue.LifoQueue()
        for renderer in renderers:
            self._renderers.put(renderer)

    def views(self, question: Question, digest: str, turn: Turn) -> torch.Tensor:
        """Render all views: uint8 [V, size, size, 3] on the renderers' device; pixels stay on the CPU.

        Args:
            question: what to look at.
            digest: of the data set, for references.
            turn: entered for each portion of the work, with the pixels that are looked at; may raise to end it there.

        Raises:
            BadRequestError: or one of its kinds; the sentence names row and sample.
        """
        if question.pixels is not None:
            with turn(question.pixels.size // 3):
                return torch.from_numpy(question.pixels.copy())  # the wire's buffer is read-only
        if not self.renders:
            raise NotHereError("this teacher has no renderer (DALI is not installed): send rendered pixels")
        if question.transport == "reference":
            index = self._index(question, digest)
            sizes = index.height[question.sample].astype(np.int64) * index.width[question.sample]
        else:
            index, sizes = None, self._checked_sizes(question)
        done: list[torch.Tensor] = []
        for part, num_pixels in _portions(question, sizes):
            with turn(num_pixels):
                done.append(self._render(question, part, index))
        return torch.cat(done) if len(done) > 1 else done[0]

    def whole(self, index: Index, sample: NDArray[np.int64]) -> torch.Tensor:
        """Whole pictures of a data set as views, uint8 [V, size, size, 3]: what the start-up gate looks at."""
        height, width = index.height[sample], index.width[sample]
        box = np.stack([np.zeros_like(height), np.zeros_like(width), height, width], axis=1).astype(np.int32)
        image = np.arange(len(sample), dtype=np.int32)
        with self._renderer() as renderer:
            return renderer.render(index.read(sample), image, box, np.zeros(len(sample), np.bool_))

    def _index(self, question: Question, digest: str) -> Index:
        """The data set that the question refers to, after checking that samples and boxes are in it."""
        index = self.data_sets.get(digest)
        if index is None:
            here = ", ".join(f"{i.name} ({i.digest[:12]})" for i in self.data_sets.values()) or "none"
            raise NotHereError(f"data set {digest[:12] or '(no digest)'} is not here; here: {here}")
        _check_samples(question, index)
        _check_boxes(question, index)
        return index

    def _checked_sizes(self, question: Question) -> NDArray[np.int64]:
        """Pixels of each picture that the request carries, by its header; none has been decoded yet."""
        sizes = np.zeros(len(question.encoded), np.int64)
        for picture, file in enumerate(question.encoded):
            try:
                sizes[picture] = self._checked_size(file)
            except ValueError as error:
                raise BadRequestError(f"{_name_of_picture(question, picture)}: {error}") from error
        return sizes

    def _checked_size(self, file: bytes) -> int:
        if not file:
            raise ValueError("the picture is empty")
        if len(file) > self._max_bytes:
            raise ValueError(
                f"the picture file has {len(file)} bytes, this teacher takes {self._max_bytes} (--max-picture-bytes)"
            )
        try:
            height, width = claimed_size(file)
        except HeaderError as error:
            raise ValueError(f"the picture ({len(file)} bytes) does not decode: {error}") from error
        if height * width > self._max_pixels:
            raise ValueError(
                f"the picture says that it has {height} x {width} pixels (h x w), this teacher takes "
                f"{self._max_pixels} in all (--max-picture-pixels)"
            )
        return height * width

    def _render(self, question: Question, part: slice, index: Index | None) -> torch.Tensor:
        """The views of one portion; its pictures are read for it alone."""
        from views.render import BadPictureError

        used, image = np.unique(question.image[part], return_inverse=True)
        if index is not None:
            pictures = _read(question, used, index)
        else:
            pictures = [np.frombuffer(question.encoded[picture], np.uint8) for picture in used]
        with self._renderer() as renderer:
            try:
                return renderer.render(pictures, image.astype(np.int32), question.box[part], question.flip[part])
            except BadPictureError as error:
                raise BadRequestError(f"{question.name(part.start + error.view)}: {error}") from error

    @contextmanager
    def _renderer(self) -> Iterator[Renderer]:
        renderer = self._renderers.get()
        try:
            yield renderer
        finally:
            self._renderers.put(renderer)


def make_renderers(
    size: int, interpolation: str, antialias: bool, *, device: torch.device, num_threads: int, num: int
) -> tuple[list[Renderer], str]:
    """Renderers that share the decoding threads, and the version of the rendering law; ([], "") without DALI."""
    try:
        from views.render import RENDER_VERSION, Renderer, Rendering
    except ImportError:
        return [], ""
    rendering = Rendering(size=size, interpolation=interpolation, antialias=antialias)  # type: ignore[arg-type]
    threads = max(1, num_threads // num)

    def make() -> list[Renderer]:
        return [Renderer(rendering, _VIEWS_AT_ONCE, device.index, threads) for _ in range(num)]

    return (_behind_the_network(make) if device.type == "cpu" else make()), RENDER_VERSION


def _behind_the_network(make: Callable[[], list[Renderer]]) -> list[Renderer]:
    """Made by a thread of lower priority, which DALI's threads inherit.

    On the CPU the network's threads meet after every layer: one that shares its core with a decoder keeps all others
    waiting. So pictures are decoded where the network leaves a core, or has nothing to do. Measured on two cores with
    EfficientNet-Lite0 at 224, 256 rows a request: 0.49 of the network's own rate without, 0.77 with it.
    Graphs that are built later, for pictures that many views share or after a broken one, decode as others do.
    """
    with ThreadPoolExecutor(1, initializer=_give_way) as thread:
        return thread.submit(make).result()


def _give_way() -> None:
    here = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, here, os.getpriority(os.PRIO_PROCESS, here) + _BEHIND)  # Linux: this thread alone


@dataclass(slots=True)
class _Portion:
    """Consecutive views that are rendered in one go."""

    start: int
    stop: int
    pictures: set[int] = field(default_factory=set)
    boxes: int = 0  # pixels of all boxes
    once: int = 0  # pixels of the pictures, each counted once
    each: int = 0  # the same for each view

    def pixels(self) -> int:
        """What decoding and cutting touch: a renderer decodes a picture once if two views on average show it."""
        shared = self.stop - self.start >= 2 * len(self.pictures)
        return self.boxes + (self.once if shared else self.each)

    def add(self, picture: int, size: int, box: int) -> None:
        """Take one more view, with the pixels of its picture and of its box."""
        self.once += 0 if picture in self.pictures else size
        self.pictures.add(picture)
        self.each += size
        self.boxes += box
        self.stop += 1


def _portions(question: Question, sizes: NDArray[np.int64]) -> Iterator[tuple[slice, int]]:
    """The question's views in portions of _PIXELS_AT_ONCE at most, or of one view; and how many pixels each has."""
    if (whole := _in_one_go(question, sizes)) is not None:
        yield slice(0, question.num_views), whole
        return
    areas: list[int] = (question.box[:, 2].astype(np.int64) * question.box[:, 3]).tolist()
    portion, pixels = _Portion(0, 0), 0
    for view, (picture, area) in enumerate(zip(question.image.tolist(), areas, strict=True)):
        portion.add(picture, size := int(sizes[picture]), area)
        if portion.pixels() > _PIXELS_AT_ONCE and view > portion.start:
            yield slice(portion.start, view), pixels
            portion = _Portion(view, view)
            portion.add(picture, size, area)
        pixels = portion.pixels()
    yield slice(portion.start, portion.stop), pixels


def _in_one_go(question: Question, sizes: NDArray[np.int64]) -> int | None:
    """The pixels of all views, if they fit a portion however they are counted; most requests' do, in no loop."""
    boxes = int((question.box[:, 2].astype(np.int64) * question.box[:, 3]).sum())
    each = int(sizes[question.image].sum())
    if boxes + each > _PIXELS_AT_ONCE:
        return None
    shown = np.bincount(question.image, minlength=len(sizes)) > 0
    shared = question.num_views >= 2 * int(shown.sum())
    return boxes + (int(sizes[shown].sum()) if shared else each)


def _check_samples(question: Question, index: Index) -> None:
    known = (question.sample >= 0) & (question.sample < len(index))
    if known.all():
        return
    picture = int(np.argmin(known))
    raise UnknownSampleError(
        f"{_name_of_picture(question, picture)}: data set {index.name} has samples 0..{len(index) - 1}"
    )


def _check_boxes(question: Question, index: Index) -> None:
    sample = question.sample[question.image]
    y, x, h, w = question.box.astype(np.int64).T  # int64: no sum of two int32 overflows
    height, width = index.height[sample], index.width[sample]
    inside = (y + h <= height) & (x + w <= width)
    if not inside.all():
        v = int(np.argmin(inside))
        raise BadRequestError(
            f"{question.name(v)}: the box (y={y[v]}, x={x[v]}, h={h[v]}, w={w[v]}) leaves the picture of "
            f"{height[v]} x {width[v]} pixels (h x w)"
        )


def _read(question: Question, used: NDArray[np.int32], index: Index) -> list[NDArray[np.uint8]]:
    """The files of the pictures used, numbers among those of the question."""
    files = []
    for picture in used.tolist():
        try:
            files += index.read([int(question.sample[picture])])
        except OSError as error:
            raise NotHereError(f"{_name_of_picture(question, picture)}: {error}") from error
    return files


def _name_of_picture(question: Question, picture: int) -> str:
    views = np.flatnonzero(question.image == picture)
    if len(views):
        return question.name(int(views[0]))
    sample = f", sample {question.sample[picture]}" if len(question.sample) else ""
    return f"picture {picture} (no view shows it){sample}"
