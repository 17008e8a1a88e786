"""Counter-based random numbers: Philox4x32-10, vectorised over counters.

A draw is a pure function of its key and counter, so no generator state exists anywhere: any row of any step
can be drawn alone, in any order, on any machine. numpy has a Philox of its own, but one object per stream;
here the counters are arrays. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011);
the test holds the authors' known answers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_NUM_ROUNDS = 10


def philox(key: int, c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike) -> NDArray[np.uint64]:
    """Four random 32-bit words per counter (c0, c1, c2, c3), under a 64-bit key.

    The counters broadcast against each other, each word in [0, 2**32); returns [4, ...] uint64.
    """
    words = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3)))
    return np.stack(_rounds(key, *words))


def philox_once(key: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]:
    """The same for one counter, in plain integers: thirty times quicker than an array of one."""
    return _rounds(key, c0, c1, c2, c3)


def _rounds(key: int, x0: Any, x1: Any, x2: Any, x3: Any) -> tuple[Any, Any, Any, Any]:
    """Of integers or of uint64 arrays: the same operators mean the same."""
    k0, k1 = key & _LOW, key >> 32
    for _ in range(_NUM_ROUNDS):
        product0 = x0 * _MULTIPLIERS[0]
        product1 = x2 * _MULTIPLIERS[1]
        x0, x1 = (product1 >> 32) ^ x1 ^ k0, product1 & _LOW
        x2, x3 = (product0 >> 32) ^ x3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return x0, x1, x2, x3


def uniform(word: NDArray[np.uint64]) -> NDArray[np.float64]:
    """A 32-bit word as a float in [0, 1)."""
    return word.astype(np.float64) * 2.0**-32


def below(word: NDArray[np.uint64], limit: NDArray[np.int64]) -> NDArray[np.int64]:
    """A 32-bit word as an integer in [0, limit); limit >= 1. The bias is below limit / 2**32."""
    return ((word * limit.astype(np.uint64)) >> 32).astype(np.int64)
