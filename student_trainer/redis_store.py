"""Logits in Redis, for trainers on several machines without a shared disk.

Samples lie in hashes of _BUCKET, `funmatch:logits:KEY:NUMBER`: 1.28 million samples are ten thousand keys. One round
trip for a batch, whichever way. Timeouts, retries, TLS (rediss://) and users (redis://USER:PASSWORD@HOST, an ACL user
needs +hmget +hset +ping on funmatch:logits:*) are redis-py's; a password may also come from REDISCLI_AUTH.

Give the server `maxmemory` with `noeviction`: with pictures in a new order each epoch, evicting to make room evicts
what is asked for next (27 to 40 % hits against 51 %, measured where half an epoch fitted). What is evicted is absent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from student_trainer.logit_store import Counts, StoreGoneError, StoreKey, pack, redacted, unpack_all

_BUCKET = 128  # samples of a hash

# redis-py would try 11 times before it says that a server is gone. Here one that hangs is told after three times
# _TIMEOUT_S. No shorter: beside twenty busy processes on two cores a sound server was silent for up to 1.6 s
# (measured), and a run that stops without need costs more than 15 s.
_CONNECT_TIMEOUT_S = 2.0
_TIMEOUT_S = 5.0
_RETRIES = 2


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a server says of its memory."""

    used: int
    """Bytes."""
    most: int
    """maxmemory, bytes; 0: as much as the machine has."""
    policy: str
    """maxmemory-policy: what goes when it is full."""


class RedisStore:
    """Packed values in hashes. Implements LogitStore."""

    def __init__(self, url: str, key: StoreKey) -> None:
        """Connect.

        Raises:
            StoreGoneError: no server answers there, or it does not let us in.
        """
        self.counts = Counts()
        self._key = key
        self._name = redacted(url)
        try:
            self._redis: redis.Redis = redis.from_url(
                url,
                password=os.environ.get("REDISCLI_AUTH"),
                socket_timeout=_TIMEOUT_S,
                retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), _RETRIES),
                **({} if url.startswith("unix") else {"socket_connect_timeout": _CONNECT_TIMEOUT_S}),
            )
            self._redis.ping()
        except redis.RedisError as error:
            raise self._gone(error) from error
        except ValueError:  # its text may hold a piece of the password
            raise StoreGoneError(
                f"{self._name} is no address of a Redis server. Write redis://USER:PASSWORD@HOST:PORT/NUMBER, and in "
                "a password %2F for /, %3F for ?, %23 for # and %25 for %"
            ) from None

    def get(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """See LogitStore."""
        order, buckets = self._buckets(samples)
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for bucket, members in buckets:
                    pipeline.hmget(bucket, [str(sample) for sample in samples[members].tolist()])
                answers = pipeline.execute()
        except redis.RedisError as error:
            raise self._gone(error) from error
        values: list[bytes | None] = [None] * len(samples)
        for place, value in zip(order.tolist(), (value for answer in answers for value in answer), strict=True):
            values[place] = value
        return unpack_all(self._key, samples, values, self.counts)

    def put(self, samples: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """See LogitStore."""
        _, buckets = self._buckets(samples)
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for bucket, members in buckets:
                    values: dict[Any, Any] = {
                        str(int(samples[i])): pack(self._key, int(samples[i]), logits[i]) for i in members.tolist()
                    }
                    pipeline.hset(bucket, mapping=values)
                pipeline.execute()
        except redis.RedisError as error:
            raise self._gone(error) from error
        self.counts.written += len(samples)

    def memory(self) -> Memory | None:
        """How full the server is; None where this user may not ask (+info)."""
        try:
            told: Any = self._redis.info("memory")
        except redis.exceptions.NoPermissionError:
            return None
        except redis.RedisError as error:
            raise self._gone(error) from error
        return Memory(used=told["used_memory"], most=told["maxmemory"], policy=told["maxmemory_policy"])

    def close(self) -> None:
        """See LogitStore."""
        self._redis.close()

    def _buckets(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[tuple[str, NDArray[np.int64]]]]:
        """Places of the samples ordered by bucket, and the same cut into (name of the hash, places)."""
        order = np.argsort(samples // _BUCKET, kind="stable")
        numbers, starts = np.unique(samples[order] // _BUCKET, return_index=True)
        parts = np.split(order, starts[1:])
        names = [f"funmatch:logits:{self._key.digest}:{number}" for number in numbers.tolist()]
        return order, list(zip(names, parts, strict=True)) if len(samples) else []

    def _gone(self, error: Exception) -> StoreGoneError:
        if isinstance(error, redis.exceptions.OutOfMemoryError):
            cure = "It is full: raise its maxmemory"
        elif isinstance(error, redis.exceptions.AuthenticationError | redis.exceptions.NoPermissionError):
            cure = "Give user and password in the URL (redis://USER:PASSWORD@HOST), or the password in REDISCLI_AUTH"
        else:
            cure = "Start it again, or choose another store (--teacher.store)"
        why = f"{type(error).__name__}: {error}".rstrip(".")
        return StoreGoneError(f"the logit store {self._name} cannot be used: {why}. {cure}")
