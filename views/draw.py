"""The law of views: a pure function from (seed, step) to the rows of that step.

Nothing here holds state. The order of pictures is a keyed permutation of each epoch, computed position by
position in O(1) memory; crops and flips are drawn per (seed, epoch, sample); lambda per (seed, step). So a
row depends on nothing else: not on rank, world size, prefetching, retries or what was drawn before.
Batches are cut from one endless stream of epochs: they cross epoch borders, and nothing is dropped.

Crop laws (paper, section 3.1.1), each ending in a box of whole pixels of the original:

    rs  the whole picture, resized to a square
    cc  the central square: `keep` of the short side
    rc  the mild random crop: `keep` of each side, anywhere (reference: resize to 160 x 160, crop 128 x 128)
    ic  the inception crop: TensorFlow's sample_distorted_bounding_box, drawn by its own law. That of
        torchvision and DALI differs: their crops are about 20 % larger on average.

Rejected: numpy generators seeded by tuples (11 us a sample), and seeds on the wire (two machines, two streams).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from views.philox import below, philox, philox_once, uniform
from views.view import Rows

Crop = Literal["rs", "cc", "rc", "ic"]

# Whose crops and flips are drawn: the student's, those of a teacher that sees others of its own (ind/), or those of a
# fixed teacher. The order of pictures, partners and lambda are the same for all.
Stream = Literal["student", "teacher", "fixed"]

# What a random word is for: the high half of the counter's last word; the low half numbers the draws.
_ORDER, _MIXUP = 0 << 16, 3 << 16
_CROP: dict[Stream, int] = {"student": 1 << 16, "teacher": 4 << 16, "fixed": 6 << 16}
_FLIP: dict[Stream, int] = {"student": 2 << 16, "teacher": 5 << 16, "fixed": 7 << 16}

# Inception crop, tf.image.sample_distorted_bounding_box as the reference calls it (big_vision pp/ops_image.py).
_MIN_RATIO, _MAX_RATIO = 0.75, 1.33  # width / height, drawn uniformly; 1.33, not 4/3
_MAX_ATTEMPTS = 100

_NUM_FEISTEL_ROUNDS = 12  # with 8, sets of 5 to 16 pictures were measurably uneven over 100,000 epochs
_MIN_FEISTEL_SIDE = 8  # a network over fewer has too few states to mix


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewLaw:
    """How the views of training are drawn. Function matching is ic with flip and mixup."""

    crop: Crop = "ic"
    """Crop law: rs, cc, rc or ic."""
    flip: bool = True
    """Mirror with probability 1/2."""
    mixup: bool = True
    """Mix each row with its neighbour in the batch, by one lambda per step: a ~ Beta."""
    mixup_alpha: float = 1.0
    """Both parameters of the Beta distribution. 1: uniform, as FunMatch has it; BiT's fine-tuning takes 0.1."""
    fold_lambda: bool = True
    """lambda is max(a, 1 - a), as in the released code; else a itself, as the paper says: then a row's own view may be
    the lesser one."""
    mixup_groups: int = 1
    """The batch is cut into so many equal groups, and rows are mixed within theirs. 1: over the global batch, as the
    code of 2024; the number of devices: as that of 2022."""
    min_area: float = 0.05
    """ic: smallest crop, as a share of the picture's area; the largest is the whole picture."""
    keep: float = 128 / 160
    """rc, cc: the share of a side that the crop keeps."""

    def __post_init__(self) -> None:
        if self.crop not in ("rs", "cc", "rc", "ic"):
            raise ValueError(f"crop is {self.crop!r}; choose rs, cc, rc or ic")
        if not 0.01 <= self.mixup_alpha <= 1:
            raise ValueError(f"mixup_alpha is {self.mixup_alpha}; it must lie in [0.01, 1]")
        if self.mixup_groups < 1:
            raise ValueError(f"mixup_groups is {self.mixup_groups}; it must be at least 1")
        if not 0 < self.min_area <= 1:
            raise ValueError(f"min_area is {self.min_area}; it is a share of the area, in (0, 1]")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; it is a share of the side, in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """The rows of every step of a run."""

    seed: int
    """In [0, 2**64)."""
    batch_size: int
    """Rows of the global batch."""
    law: ViewLaw
    samples: range
    """The split: row numbers in the data set's index."""
    height: NDArray[np.int32]
    """Heights of all pictures of the index, in pixels; may be memory-mapped."""
    width: NDArray[np.int32]
    """Widths, likewise."""
    stream: Stream = "student"
    """Whose crops and flips: nothing else of the rows depends on it."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2**64)")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if not self.samples:
            raise ValueError("the split holds no pictures")
        if self.law.mixup and self.batch_size % self.law.mixup_groups:
            raise ValueError(f"{self.law.mixup_groups} mixup_groups do not divide a batch of {self.batch_size} rows")

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> Rows:
        """Rows start..stop-1 of step's global batch (all of them by default), with the partners they need.

        The rows of a part are the rows of the whole: `rows(s).take(a, b)` and `rows(s, a, b)` are the same.
        """
        stop = self.batch_size if stop is None else stop
        if not (step >= 0 and 0 <= start < stop <= self.batch_size):
            raise ValueError(f"no rows {start}..{stop - 1} of step {step} in batches of {self.batch_size}")
        own = np.arange(start, stop, dtype=np.int64)
        num_rows = len(own)
        if not self.law.mixup:
            lam = np.ones(num_rows, dtype=np.float32)
            return self._views(step, own, partner=np.arange(num_rows, dtype=np.int32), lam=lam)
        # The reference rolls the batch, or each group, by one: a row is mixed with the one before, the first with the
        # last.
        group = self.batch_size // self.law.mixup_groups
        mate = np.where(own % group, own - 1, own + group - 1)
        outside = np.unique(mate[(mate < start) | (mate >= stop)])
        partner = np.where((mate < start) | (mate >= stop), num_rows + np.searchsorted(outside, mate), mate - start)
        lam = np.full(num_rows, self._lambda(step), dtype=np.float32)
        return self._views(step, np.concatenate([own, outside]), partner.astype(np.int32), lam)

    def _views(
        self, step: int, position: NDArray[np.int64], partner: NDArray[np.int32], lam: NDArray[np.float32]
    ) -> Rows:
        epoch, place = np.divmod(np.int64(step) * self.batch_size + position, len(self.samples))
        sample = self.samples.start + permute(self.seed, epoch, place, len(self.samples))
        height, width = self.height[sample].astype(np.int64), self.width[sample].astype(np.int64)
        return Rows(
            sample=sample,
            box=draw_boxes(self.law, self.seed, epoch, sample, height, width, self.stream),
            flip=draw_flips(self.law, self.seed, epoch, sample, self.stream),
            partner=partner,
            lam=lam,
        )

    def _lambda(self, step: int) -> float:
        a = _draw_beta(self.law.mixup_alpha, self.seed, step)
        return max(a, 1 - a) if self.law.fold_lambda else a


def _draw_beta(alpha: float, seed: int, step: int) -> float:
    """One number of Beta(alpha, alpha), alpha <= 1: uniform at 1, below by Jöhnk's rejection (at least half pass)."""
    for draw in range(_MAX_ATTEMPTS):
        words = philox_once(seed, step & 0xFFFFFFFF, step >> 32, 0, _MIXUP | draw)
        u, v = words[0] * 2.0**-32, words[1] * 2.0**-32
        if alpha == 1:
            return u
        x, y = math.pow(u, 1 / alpha), math.pow(v, 1 / alpha)
        if 0 < x + y <= 1:
            return x / (x + y)
    raise AssertionError(f"{_MAX_ATTEMPTS} draws of Beta({alpha}, {alpha}) in a row were rejected")


def draw_boxes(
    law: ViewLaw,
    seed: int,
    epoch: NDArray[np.int64],
    sample: NDArray[np.int64],
    height: NDArray[np.int64],
    width: NDArray[np.int64],
    stream: Stream = "student",
) -> NDArray[np.int32]:
    """Boxes [N, 4] (y, x, h, w) for N pictures of the given sizes in pixels."""

    def words(which: NDArray[np.int64] | slice, draw: int) -> NDArray[np.uint64]:
        ids = sample[which]
        return philox(seed, ids & 0xFFFFFFFF, ids >> 32, epoch[which], _CROP[stream] | draw)

    if law.crop == "ic":
        return _inception_boxes(words, height, width, law.min_area)
    if law.crop == "rs":
        return _boxes(np.zeros_like(height), np.zeros_like(width), height, width)
    if law.crop == "cc":
        side = np.maximum(np.rint(np.minimum(height, width) * law.keep).astype(np.int64), 1)
        return _boxes((height - side) // 2, (width - side) // 2, side, side)
    h = np.maximum(np.rint(height * law.keep).astype(np.int64), 1)
    w = np.maximum(np.rint(width * law.keep).astype(np.int64), 1)
    word = words(slice(None), 0)
    return _boxes(below(word[0], height - h + 1), below(word[1], width - w + 1), h, w)


def draw_flips(
    law: ViewLaw, seed: int, epoch: NDArray[np.int64], sample: NDArray[np.int64], stream: Stream = "student"
) -> NDArray[np.bool_]:
    """[N] whether each view is mirrored."""
    if not law.flip:
        return np.zeros(len(sample), dtype=np.bool_)
    word = philox(seed, sample & 0xFFFFFFFF, sample >> 32, epoch, _FLIP[stream])[0]
    odd: NDArray[np.bool_] = (word & 1) == 1
    return odd


def permute(seed: int, epoch: NDArray[np.int64], place: NDArray[np.int64], num: int) -> NDArray[np.int64]:
    """The picture, in [0, num), that stands at each place of its epoch's order: a permutation per epoch.

    A Feistel network over the smallest rectangle of numbers that holds num, walked until it lands below num; so
    an epoch of a billion pictures costs no memory and no pause at its border.
    """
    epochs, which = np.unique(epoch, return_inverse=True)
    blocks = philox(seed, np.arange(_NUM_FEISTEL_ROUNDS // 4)[:, None], 0, epochs, _ORDER)
    keys = blocks.reshape(_NUM_FEISTEL_ROUNDS, len(epochs))[:, which]
    width = max(_MIN_FEISTEL_SIDE, math.isqrt(num - 1) + 1)
    height = max(_MIN_FEISTEL_SIDE, -(-num // width))
    out = _feistel(place.astype(np.uint64), keys, width, height)
    while (outside := np.flatnonzero(out >= num)).size:
        out[outside] = _feistel(out[outside], keys[:, outside], width, height)
    return out.astype(np.int64)


def _feistel(x: NDArray[np.uint64], keys: NDArray[np.uint64], width: int, height: int) -> NDArray[np.uint64]:
    """A keyed bijection of [0, width * height): in turn, a hash of one coordinate is added to the other."""
    row, column = np.divmod(x, np.uint64(width))
    for i in range(0, len(keys), 2):
        column = (column + _hash32(row ^ keys[i])) % np.uint64(width)
        row = (row + _hash32(column ^ keys[i + 1])) % np.uint64(height)
    return row * np.uint64(width) + column


def _hash32(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """MurmurHash3's 32-bit finaliser (Appleby, public domain): every input bit moves every output bit."""
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(multiplier)) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(16))


def _inception_boxes(
    words: Callable[[NDArray[np.int64], int], NDArray[np.uint64]],
    height: NDArray[np.int64],
    width: NDArray[np.int64],
    min_area: float,
) -> NDArray[np.int32]:
    """Try each picture until a crop fits; after 100 failures its view is the whole picture."""
    boxes = _boxes(np.zeros_like(height), np.zeros_like(width), height, width)
    todo = np.arange(len(height))
    for attempt in range(_MAX_ATTEMPTS):
        candidate, fits = _inception_attempt(words(todo, attempt), height[todo], width[todo], min_area)
        boxes[todo[fits]] = candidate[fits]
        todo = todo[~fits]
        if not len(todo):
            break
    return boxes


def _inception_attempt(
    word: NDArray[np.uint64], height: NDArray[np.int64], width: NDArray[np.int64], min_area: float
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """One attempt for every picture: (boxes [N, 4], whether each satisfies the law [N])."""
    ratio = _MIN_RATIO + uniform(word[0]) * (_MAX_RATIO - _MIN_RATIO)
    smallest, largest = min_area * (height * width), (height * width).astype(np.float64)

    def width_of(h: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.rint(h * ratio).astype(np.int64)

    high = np.rint(np.sqrt(largest / ratio)).astype(np.int64)
    fitting = ((width + 0.5 - 1e-7) / ratio).astype(np.int64)  # the largest h whose width still fits
    fitting -= width_of(fitting) > width
    high = np.minimum(np.where(width_of(high) > width, fitting, high), height)
    low = np.minimum(np.rint(np.sqrt(smallest / ratio)).astype(np.int64), high)
    h = low + below(word[1], high - low + 1)  # the height is uniform: the area is not
    # Rounding may leave the area just outside: one pixel more, or one less, before giving up.
    h += h * width_of(h) < smallest
    h -= h * width_of(h) > largest
    w = width_of(h)
    fits = (h * w >= smallest) & (h * w <= largest) & (h <= height) & (w <= width) & (h > 0) & (w > 0)
    # The offsets' bound is exclusive in the reference: the last position of a smaller crop is never drawn.
    y = below(word[2], np.maximum(height - h, 1))
    x = below(word[3], np.maximum(width - w, 1))
    return _boxes(y, x, h, w), fits


def _boxes(y: NDArray[np.int64], x: NDArray[np.int64], h: NDArray[np.int64], w: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.stack([y, x, h, w], axis=1).astype(np.int32)
