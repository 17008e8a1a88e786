"""Where a fixed teacher's logits are kept: the key, the packed value, and the door to the two stores.

    file_store.py    a dense array in a file, one record a sample; the default
    redis_store.py   a Redis server, for trainers on several machines without a shared disk

A `StoreKey` is made from `FixedViews`, and nothing else has a key: views that are new at every step (same/*, ind/*)
cannot reach a store, by type. All that can change a logit is in the key, so another teacher, data set, view, number of
crops or space of averaging finds nothing.

A value says its dtype and shape and carries a checksum over itself, its key and its sample: a value that was cut, that
rotted, or that lies under another sample's name is *damaged*, which is counted, and never used.

Rejected: pickles (reading one runs code), and an LMDB file (4,124 bytes for a value of 2,000, measured).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import struct
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from views.setting import FixedViews

_SCHEMA = 1  # of keys and values together: another number finds nothing of the old
_HEADER = struct.Struct("<2sBBI")  # magic, dtype code, number of dimensions, number of classes
_MAGIC = b"FL"
_CODES = {"float16": 1, "float32": 2}
_CHECKSUM_BYTES = 8

# Header and checksum together; 1000 float16 logits then stay below 2048 bytes, where Redis's allocator would take the
# next size, a quarter larger.
OVERHEAD_BYTES = _HEADER.size + _CHECKSUM_BYTES


class StoreGoneError(RuntimeError):
    """The store cannot be reached, or does not take anything."""


@dataclass(frozen=True, kw_only=True)
class StoreKey:
    """Whose logits, of what, seen how: everything that can change one."""

    fingerprint: str
    """Of the teacher: weights, precision, rendering, size (teacher.proto)."""
    data_digest: str
    """Of the data set's index; a sample is a row number in it."""
    views: FixedViews
    num_samples: int
    """Of the whole index."""
    num_classes: int
    dtype: Literal["float16", "float32"]
    """In which the teacher answers, and the logits are kept: nothing is rounded here."""

    def facts(self) -> dict[str, Any]:
        """As plain values, for people and for the digest."""
        return {
            "schema": _SCHEMA,
            "teacher": self.fingerprint,
            "data_set": self.data_digest,
            "views": self.views.facts(),
            "num_samples": self.num_samples,
            "num_classes": self.num_classes,
            "dtype": self.dtype,
        }

    @functools.cached_property
    def digest(self) -> str:
        """32 hex digits that stand for all the facts."""
        text = json.dumps(self.facts(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def value_bytes(self) -> int:
        """Size of one packed value."""
        return OVERHEAD_BYTES + self.num_classes * np.dtype(self.dtype).itemsize


@dataclass(slots=True)
class Counts:
    """What a store was asked, in samples."""

    found: int = 0
    absent: int = 0
    damaged: int = 0
    written: int = 0


class LogitStore(Protocol):
    """Logits by sample. Raises StoreGoneError wherever it cannot be reached. May be used by several threads."""

    counts: Counts

    def get(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Logits [N, num_classes] of samples [N], and which were found [N]: a damaged one is not."""

    def put(self, samples: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """Keep logits [N, num_classes] of samples [N]; what was there is replaced."""

    def close(self) -> None:
        """Let go of it."""


def open_store(where: str, key: StoreKey) -> LogitStore:
    """The store at `where`: a folder, or a URL (redis://, rediss:// with TLS, unix://).

    Raises:
        StoreGoneError: it cannot be opened; says why and what to do.
    """
    if re.match(r"(rediss?|unix)://", where):
        from student_trainer.redis_store import RedisStore

        return RedisStore(where, key)
    from student_trainer.file_store import FileStore

    return FileStore(where, key)


def absent(store: LogitStore, samples: NDArray[np.int64], at_once: int = 4096) -> NDArray[np.int64]:
    """Those of samples [N] without a sound value."""
    parts = [samples[i : i + at_once] for i in range(0, len(samples), at_once)]
    return np.concatenate([part[~store.get(part)[1]] for part in parts] or [samples])


def pack(key: StoreKey, sample: int, logits: NDArray[np.floating[Any]]) -> bytes:
    """One value: header, little-endian data, checksum."""
    header = _HEADER.pack(_MAGIC, _CODES[key.dtype], 1, len(logits))
    body = header + logits.astype(np.dtype(key.dtype).newbyteorder("<")).tobytes()
    return body + _checksum(key, sample, body)


def unpack(key: StoreKey, sample: int, value: bytes | None, counts: Counts) -> NDArray[np.float32] | None:
    """The logits of a value, or None; counts it as found, absent or damaged."""
    if value is None or value == bytes(len(value)):  # a hole of a file reads as zeros
        counts.absent += 1
        return None
    body, checksum = value[:-_CHECKSUM_BYTES], value[-_CHECKSUM_BYTES:]
    expected = _HEADER.pack(_MAGIC, _CODES[key.dtype], 1, key.num_classes)
    sound = len(value) == key.value_bytes and value.startswith(expected) and checksum == _checksum(key, sample, body)
    if not sound:
        counts.damaged += 1
        return None
    counts.found += 1
    data = np.frombuffer(body, np.dtype(key.dtype).newbyteorder("<"), offset=_HEADER.size)
    return data.astype(np.float32)


def unpack_all(
    key: StoreKey, samples: NDArray[np.int64], values: list[bytes | None], counts: Counts
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """What LogitStore.get returns, of as many values as samples."""
    logits = np.zeros((len(samples), key.num_classes), dtype=np.float32)
    found = np.zeros(len(samples), dtype=np.bool_)
    for i, (sample, value) in enumerate(zip(samples.tolist(), values, strict=True)):
        one = unpack(key, sample, value, counts)
        if one is not None:
            logits[i], found[i] = one, True
    return logits, found


def redacted(where: str) -> str:
    """A store's address without its passwords, for logs and records. Rather too much is hidden than too little."""
    where = re.sub(r"(?<=://)([^:@/]*):.*@", r"\1:***@", where)  # to the last @: one may be in the password, unquoted
    return re.sub(r"(password=)[^&]*", r"\1***", where)  # redis-py takes ?password= and ?ssl_password= too


def _checksum(key: StoreKey, sample: int, body: bytes) -> bytes:
    salt = bytes.fromhex(key.digest) + sample.to_bytes(8, "little")
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES, key=salt).digest()
