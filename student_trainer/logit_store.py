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
from collections.abc import Sequence
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
    return pack_records(key, np.array([sample]), logits[None]).tobytes()


def pack_records(key: StoreKey, samples: NDArray[np.int64], logits: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """The values of samples [N], one after the other in memory [N, value_bytes]."""
    num_classes = logits.shape[1]
    dtype = np.dtype(key.dtype).newbyteorder("<")
    body_bytes = _HEADER.size + num_classes * dtype.itemsize
    records = np.empty((len(samples), body_bytes + _CHECKSUM_BYTES), np.uint8)
    records[:, : _HEADER.size] = _header(key, num_classes)
    records[:, _HEADER.size : body_bytes] = logits.astype(dtype).view(np.uint8)
    records[:, body_bytes:] = checksums(key, samples, records)
    return records


def unpack(key: StoreKey, sample: int, value: bytes | None, counts: Counts) -> NDArray[np.float32] | None:
    """The logits of a value, or None; counts it as found, absent or damaged."""
    logits, found = unpack_all(key, np.array([sample]), [value], counts)
    return logits[0] if found[0] else None


def unpack_all(
    key: StoreKey, samples: NDArray[np.int64], values: Sequence[bytes | None], counts: Counts
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """What LogitStore.get returns, of as many values as samples."""
    is_whole = np.array([value is not None and len(value) == key.value_bytes for value in values], dtype=np.bool_)
    if is_whole.all():
        return unpack_records(key, samples, _records(key, values), counts)
    others = [value for value, is_one in zip(values, is_whole, strict=True) if not is_one]
    num_damaged = sum(value is not None and any(value) for value in others)
    counts.damaged += num_damaged
    counts.absent += len(others) - num_damaged
    logits = np.zeros((len(samples), key.num_classes), dtype=np.float32)
    found = np.zeros(len(samples), dtype=np.bool_)
    whole = _records(key, [value for value, is_one in zip(values, is_whole, strict=True) if is_one])
    logits[is_whole], found[is_whole] = unpack_records(key, samples[is_whole], whole, counts)
    return logits, found


def unpack_records(
    key: StoreKey, samples: NDArray[np.int64], records: NDArray[np.uint8], counts: Counts
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The same of values [N, value_bytes] that lie one after the other in memory.

    Each is checked, header and checksum. All but the checksum is done for all at once: a value of 1000 half-precision
    logits takes 5 us, 3.5 of them its checksum, and took 9 where each was unpacked by itself (one core).
    """
    body_bytes = key.value_bytes - _CHECKSUM_BYTES
    found = (records[:, : _HEADER.size] == _header(key, key.num_classes)).all(axis=1)
    found &= (records[:, body_bytes:] == checksums(key, samples, records)).all(axis=1)
    bad = records[~found]
    num_damaged = int(bad.any(axis=1).sum())  # a hole of a file reads as zeros
    counts.found += len(records) - len(bad)
    counts.damaged += num_damaged
    counts.absent += len(bad) - num_damaged
    logits = records[:, _HEADER.size : body_bytes].view(np.dtype(key.dtype).newbyteorder("<")).astype(np.float32)
    logits[~found] = 0
    return logits, found


def redacted(where: str) -> str:
    """A store's address without its passwords, for logs and records. Rather too much is hidden than too little."""
    where = re.sub(r"(?<=://)([^:@/]*):.*@", r"\1:***@", where)  # to the last @: one may be in the password, unquoted
    return re.sub(r"(password=)[^&]*", r"\1***", where)  # redis-py takes ?password= and ?ssl_password= too


def _records(key: StoreKey, values: Sequence[bytes | None]) -> NDArray[np.uint8]:
    """Values of the right length [N, value_bytes]."""
    joined = b"".join(value for value in values if value is not None)
    return np.frombuffer(joined, np.uint8).reshape(-1, key.value_bytes)


def _header(key: StoreKey, num_classes: int) -> NDArray[np.uint8]:
    return np.frombuffer(_HEADER.pack(_MAGIC, _CODES[key.dtype], 1, num_classes), np.uint8)


def checksums(key: StoreKey, samples: NDArray[np.int64], records: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What each record's last bytes should be [N, _CHECKSUM_BYTES]."""
    salt, flat = bytes.fromhex(key.digest), records.reshape(-1).data
    size = records.shape[1]
    starts = range(0, len(flat), size)
    sums = [
        hashlib.blake2b(
            flat[start : start + size - _CHECKSUM_BYTES],
            digest_size=_CHECKSUM_BYTES,
            key=salt + sample.to_bytes(8, "little"),
        ).digest()
        for sample, start in zip(samples.tolist(), starts, strict=True)
    ]
    return np.frombuffer(b"".join(sums), np.uint8).reshape(-1, _CHECKSUM_BYTES)
