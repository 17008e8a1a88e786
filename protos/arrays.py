"""numpy arrays as `Array` messages and back. The wire is little-endian; so is every machine we run on."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos import teacher_pb2 as pb

assert sys.byteorder == "little", "the wire format is little-endian; this machine is not"

_DTYPES: dict[pb.Array.DType, np.dtype[Any]] = {
    pb.Array.UINT8: np.dtype("<u1"),
    pb.Array.INT32: np.dtype("<i4"),
    pb.Array.INT64: np.dtype("<i8"),
    pb.Array.FLOAT16: np.dtype("<f2"),
    pb.Array.FLOAT32: np.dtype("<f4"),
}
_HALF_EXPONENT = np.uint16(0x7C00)  # all ones: infinite or NaN
_MAX_DIMS = 8  # beyond, a shape is not even repeated in the sentence about it
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def to_message(array: NDArray[Any]) -> pb.Array:
    """Pack an array of one of the wire's dtypes; bool travels as uint8. Copies once."""
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    if array.dtype not in _CODES:
        raise ValueError(f"dtype {array.dtype} does not travel; use one of {[str(d) for d in _CODES]}")
    return pb.Array(dtype=_CODES[array.dtype], shape=array.shape, data=array.tobytes())


def all_finite(array: NDArray[np.floating[Any]]) -> bool:
    """Whether no element of a float16 or float32 array is infinite or NaN."""
    if array.dtype != np.float16:
        return bool(np.isfinite(array).all())
    # numpy looks at half precision number by number; as integers they go many at once (64,000: 7 us in place of 75).
    exponents = np.ascontiguousarray(array).view(np.uint16) & _HALF_EXPONENT
    return bool(exponents.max(initial=0) < _HALF_EXPONENT)


def from_message(message: pb.Array, name: str, dtype: type[np.generic], shape: tuple[int | None, ...]) -> NDArray[Any]:
    """Unpack without copying (read-only), after checking dtype and shape; None in shape accepts any length.

    Raises:
        ValueError: a sentence that names the array and says what was sent and what is expected.
    """
    if message.dtype not in _DTYPES:
        raise ValueError(f"{name} has unknown dtype code {message.dtype}; expected {np.dtype(dtype)}")
    sent: np.dtype[Any] = _DTYPES[message.dtype]
    if sent != np.dtype(dtype):
        raise ValueError(f"{name} has dtype {sent}, expected {np.dtype(dtype)}")
    if len(message.shape) > _MAX_DIMS:
        raise ValueError(f"{name} has {len(message.shape)} dimensions, expected {len(shape)}")
    dims = tuple(message.shape)
    if len(dims) != len(shape) or any(want not in (None, got) for got, want in zip(dims, shape, strict=True)):
        wanted = "[" + ", ".join("any" if want is None else str(want) for want in shape) + "]"
        raise ValueError(f"{name} has shape {list(dims)}, expected {wanted}")
    expected = math.prod(dims) * sent.itemsize
    if len(message.data) != expected:
        raise ValueError(f"{name} of shape {list(dims)} has {len(message.data)} bytes, expected {expected}")
    flat: NDArray[Any] = np.frombuffer(message.data, dtype=sent)
    return flat.reshape(dims)
