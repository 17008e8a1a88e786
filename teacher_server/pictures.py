"""From a checked question to uint8 views: the data sets of this machine, and the renderers.

What lives here: the checks that need a picture or a data set. What does not: what the wire says (views/wire.py),
status codes (service.py).

DALI is imported when the renderers are made: without it a server still answers views that come as pixels.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.index import Index
from views.wire import Question

if TYPE_CHECKING:
    from views.render import Renderer

_VIEWS_AT_ONCE = 128  # of one run of the DALI graph: bounds the memory of full-size crops in between


class BadRequestError(ValueError):
    """The request cannot be answered by any teacher; the sentence names the row."""


class UnknownSampleError(BadRequestError):
    """A sample that the data set does not have."""


class NotHereError(BadRequestError):
    """Another teacher might: a data set, a shard or a transport that is not offered here."""


class Pictures:
    """Finds and renders what a question looks at. Thread-safe."""

    def __init__(self, indexes: Sequence[Index], renderers: Sequence[Renderer]) -> None:
        """Take data sets to refer to, and renderers to share; without renderers only pixels are taken."""
        self.data_sets: Mapping[str, Index] = {index.digest: index for index in indexes}
        self.renders = bool(renderers)
        self._renderers: queue.LifoQueue[Renderer] = queue.LifoQueue()
        for renderer in renderers:
            self._renderers.put(renderer)

    def views(self, question: Question, digest: str) -> torch.Tensor:
        """Render all views: uint8 [V, size, size, 3] on the renderers' device; pixels stay on the CPU.

        Args:
            question: what to look at.
            digest: of the data set, for references.

        Raises:
            BadRequestError: or one of its kinds; the sentence names row and sample.
        """
        if question.pixels is not None:
            return torch.from_numpy(question.pixels.copy())  # the wire's buffer is read-only
        if not self.renders:
            raise NotHereError("this teacher has no renderer (DALI is not installed): send rendered pixels")
        if question.transport == "reference":
            pictures = self._read(question, digest)
        else:
            pictures = [np.frombuffer(picture, np.uint8) for picture in question.encoded]
        return self._render(question, pictures)

    def whole(self, index: Index, sample: NDArray[np.int64]) -> torch.Tensor:
        """Whole pictures of a data set as views, uint8 [V, size, size, 3]: what the start-up gate looks at."""
        height, width = index.height[sample], index.width[sample]
        box = np.stack([np.zeros_like(height), np.zeros_like(width), height, width], axis=1).astype(np.int32)
        image = np.arange(len(sample), dtype=np.int32)
        with self._renderer() as renderer:
            return renderer.render(index.read(sample), image, box, np.zeros(len(sample), np.bool_))

    def _read(self, question: Question, digest: str) -> list[NDArray[np.uint8]]:
        index = self.data_sets.get(digest)
        if index is None:
            here = ", ".join(f"{i.name} ({i.digest[:12]})" for i in self.data_sets.values()) or "none"
            raise NotHereError(f"data set {digest[:12] or '(no digest)'} is not here; here: {here}")
        _check_samples(question, index)
        _check_boxes(question, index)
        try:
            return index.read(question.sample)
        except OSError as error:
            raise NotHereError(f"{_row_that_cannot_be_read(question, index)}: {error}") from error

    def _render(self, question: Question, pictures: list[NDArray[np.uint8]]) -> torch.Tensor:
        from views.render import BadPictureError

        for view, picture in enumerate(question.image):
            if not len(pictures[picture]):
                raise BadRequestError(f"{question.name(view)}: the picture is empty")
        try:
            with self._renderer() as renderer:
                return renderer.render(pictures, question.image, question.box, question.flip)
        except BadPictureError as error:
            raise BadRequestError(f"{question.name(error.view)}: {error}") from error

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
    return [Renderer(rendering, _VIEWS_AT_ONCE, device.index, threads) for _ in range(num)], RENDER_VERSION


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


def _row_that_cannot_be_read(question: Question, index: Index) -> str:
    """The name of the first row whose picture cannot be read."""
    for picture, sample in enumerate(question.sample):
        try:
            index.read([int(sample)])
        except OSError:
            return _name_of_picture(question, picture)
    return "a row"  # it can be read again: say what the error said


def _name_of_picture(question: Question, picture: int) -> str:
    views = np.flatnonzero(question.image == picture)
    if len(views):
        return question.name(int(views[0]))
    return f"picture {picture} (no view shows it), sample {question.sample[picture]}"
