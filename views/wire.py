"""Rows as messages and back; the only file that knows both. Checks here need no picture.

A request that says something impossible is refused in a sentence that names the row; what needs the data set
or the picture (is the box inside it?) is checked by the teacher, which has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from protos import teacher_pb2 as pb
from protos.arrays import from_message, to_message
from views.setting import Average
from views.view import Rows

Transport = Literal["reference", "encoded", "pixels"]

_AVERAGES: dict[Average, pb.Average] = {"logits": pb.LOGITS, "probabilities": pb.PROBABILITIES}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Question:
    """A checked Predict request. Legend: R rows, V views, M pictures, A audited views."""

    transport: Transport
    partner: NDArray[np.int32]
    """[R] position among the views."""
    lam: NDArray[np.float32]
    """[R] in [0, 1]."""
    mean_of: int
    """So many consecutive rows are averaged into one answer; 1: none."""
    average: Average
    """What is averaged."""
    audit: NDArray[np.int32]
    """[A] positions of views to vouch for."""
    sample: NDArray[np.int64]
    """[M] the pictures' row numbers in the data set; for encoded pictures the caller's names of them, perhaps
    empty; for pixels empty."""
    encoded: Sequence[bytes]
    """[M] picture files, for the encoded transport."""
    image: NDArray[np.int32]
    """[V] which picture a view shows."""
    box: NDArray[np.int32]
    """[V, 4] (y, x, h, w)."""
    flip: NDArray[np.bool_]
    """[V]."""
    pixels: NDArray[np.uint8] | None
    """[V, S, S, 3] rendered views, for the pixels transport."""

    @property
    def num_views(self) -> int:
        """The number of views V."""
        return len(self.image) if self.pixels is None else len(self.pixels)

    def without_pictures(self) -> Question:
        """The same without what its pictures or pixels weigh, for when they have been rendered."""
        return self if self.transport == "reference" else replace(self, encoded=(), pixels=None)

    def name(self, view: int) -> str:
        """What to call a view in an error: its row, and its sample where known."""
        row = f"row {view}" if view < len(self.lam) else f"view {view} (a mixup partner only)"
        if self.pixels is None and len(self.sample):
            return f"{row}, sample {self.sample[self.image[view]]}"
        return row


def ask_by_reference(rows: Rows, digest: str) -> pb.PredictRequest:
    """A request whose pictures the teacher reads itself, from the data set with this digest."""
    samples, request = _ask(rows)
    request.references.CopyFrom(pb.References(digest=digest, sample=to_message(samples)))
    return request


def ask_encoded(rows: Rows, pictures: Sequence[bytes]) -> pb.PredictRequest:
    """A request that carries the picture files: pictures[i] is that of the i-th of np.unique(rows.sample)."""
    samples, request = _ask(rows)
    request.encoded.CopyFrom(pb.EncodedImages(image=pictures, sample=to_message(samples)))
    return request


def ask_for_mean(request: pb.PredictRequest, mean_of: int, average: Average) -> None:
    """Make a request one for averages of each mean_of consecutive rows."""
    request.mean_of = mean_of
    request.average = _AVERAGES[average]


def ask_pixels(rows: Rows, pixels: NDArray[np.uint8]) -> pb.PredictRequest:
    """A request that carries the rendered views, uint8 [V, S, S, 3] at the teacher's size."""
    return pb.PredictRequest(pixels=to_message(pixels), partner=to_message(rows.partner), lam=to_message(rows.lam))


def _ask(rows: Rows) -> tuple[NDArray[np.int64], pb.PredictRequest]:
    samples, image = np.unique(rows.sample, return_inverse=True)
    views = pb.Views(image=to_message(image.astype(np.int32)), box=to_message(rows.box), flip=to_message(rows.flip))
    return samples, pb.PredictRequest(views=views, partner=to_message(rows.partner), lam=to_message(rows.lam))


def read_question(request: pb.PredictRequest, size: int) -> Question:
    """Unpack and check a request, for a teacher that sees views of size x size pixels.

    Raises:
        ValueError: what is wrong, naming the array and the row.
    """
    lam = from_message(request.lam, "lam", np.float32, (None,))
    num_rows = len(lam)
    if not num_rows:
        raise ValueError("the request has no rows: lam is empty")
    partner = from_message(request.partner, "partner", np.int32, (num_rows,))
    audit = np.zeros(0, np.int32)
    if request.HasField("audit"):
        audit = from_message(request.audit, "audit", np.int32, (None,))
    transport, pixels = request.WhichOneof("pictures"), None
    none: NDArray[np.int64] = np.zeros(0, np.int64)
    sample, image = none, none.astype(np.int32)
    encoded: Sequence[bytes] = ()
    box, flip = np.zeros((0, 4), np.int32), np.zeros(0, np.uint8)
    if transport is None:
        raise ValueError("the request has no pictures: set references, encoded or pixels")
    if transport == "pixels":
        pixels = from_message(request.pixels, "pixels", np.uint8, (None, size, size, 3))
        num_views = len(pixels)
    else:
        if transport == "references":
            sample = from_message(request.references.sample, "references.sample", np.int64, (None,))
            num_pictures = len(sample)
        else:
            encoded = request.encoded.image
            num_pictures = len(encoded)
            if request.encoded.HasField("sample"):
                sample = from_message(request.encoded.sample, "encoded.sample", np.int64, (num_pictures,))
        image = from_message(request.views.image, "views.image", np.int32, (None,))
        num_views = len(image)
        box = from_message(request.views.box, "views.box", np.int32, (num_views, 4))
        flip = from_message(request.views.flip, "views.flip", np.uint8, (num_views,))
        _check(
            image,
            (image >= 0) & (image < num_pictures),
            f"views.image must lie in [0, {num_pictures})",
            "view",
        )
        _check(box, ((box >= 0) & (box[:, 2:].min(axis=1, initial=1)[:, None] >= 1)).all(axis=1),
               "a box is (y, x, h, w) with y, x >= 0 and h, w >= 1", "view")  # fmt: skip
        _check(flip, flip <= 1, "views.flip must be 0 or 1", "view")
    if num_rows > num_views:
        raise ValueError(f"{num_rows} rows need at least as many views, got {num_views}")
    _check(lam, (lam >= 0) & (lam <= 1), "lam must lie in [0, 1]", "row")
    _check(partner, (partner >= 0) & (partner < num_views), f"partner must lie in [0, {num_views})", "row")
    if len(audit) > num_views:  # each is rendered pixels: four bytes here would cost 150 kB
        raise ValueError(f"audit names {len(audit)} views of {num_views}: each once at most")
    _check(audit, (audit >= 0) & (audit < num_views), f"audit must lie in [0, {num_views})", "audit entry")
    mean_of, average = _read_mean(request, partner, lam)
    return Question(
        transport="reference" if transport == "references" else transport,
        partner=partner,
        lam=lam,
        mean_of=mean_of,
        average=average,
        audit=audit,
        sample=sample,
        encoded=encoded,
        image=image,
        box=box,
        flip=flip.view(np.bool_),
        pixels=pixels,
    )


def _read_mean(request: pb.PredictRequest, partner: NDArray[np.int32], lam: NDArray[np.float32]) -> tuple[int, Average]:
    mean_of = max(1, request.mean_of)
    if mean_of == 1:
        return 1, "probabilities"
    if len(lam) % mean_of:
        raise ValueError(f"{len(lam)} rows cannot be averaged {mean_of} at a time (mean_of)")
    average = next((name for name, number in _AVERAGES.items() if number == request.average), None)
    if average is None:
        raise ValueError("mean_of needs average: LOGITS or PROBABILITIES")
    alone = (partner == np.arange(len(lam))) & (lam == 1)
    _check(lam, alone, "a row that is averaged is not mixed: lam must be 1 and the row its own partner", "row")
    return mean_of, average


def _check(values: NDArray[np.generic], good: NDArray[np.bool_], rule: str, what: str) -> None:
    if not good.all():
        first = int(np.argmin(good))
        raise ValueError(f"{what} {first}: {rule}, got {values[first].tolist()}")
