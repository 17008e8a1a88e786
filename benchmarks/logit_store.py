"""Where logits may lie: a file, hashes in Redis, or a plain Redis key a sample. `python -m benchmarks.logit_store`.

1000 float16 logits a sample, as ImageNet's teachers send them. A real redis-server is started on a unix socket. Reads
are of 256 random samples, as a training step's. The plain keys are what student_trainer/redis_store.py does not do.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import redis

from student_trainer.file_store import FileStore
from student_trainer.logit_store import Counts, StoreKey, pack, unpack_all
from student_trainer.redis_store import RedisStore
from views.setting import ViewSetting

_NUM_CLASSES, _BATCH, _READS = 1000, 256, 60


class PlainKeys:
    """The alternative: MGET and MSET of a key a sample."""

    def __init__(self, url: str, key: StoreKey) -> None:
        self.counts = Counts()
        self._key = key
        self._redis: redis.Redis = redis.from_url(url)

    def _names(self, samples: np.ndarray) -> list[str]:
        return [f"funmatch:logits:{self._key.digest}:{sample}" for sample in samples.tolist()]

    def put(self, samples: np.ndarray, logits: np.ndarray) -> None:
        """Write."""
        values = [pack(self._key, sample, one) for sample, one in zip(samples.tolist(), logits, strict=True)]
        self._redis.mset(dict(zip(self._names(samples), values, strict=True)))

    def get(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read."""
        values: list[Any] = list(self._redis.mget(self._names(samples)))
        return unpack_all(self._key, samples, values, self.counts)


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, store: FileStore | RedisStore | PlainKeys, num: int, bytes_used: Callable[[], int]) -> None:
    """Fill, read, and print a line."""
    rng = np.random.default_rng(0)
    before = bytes_used()
    logits = rng.normal(size=(_BATCH, _NUM_CLASSES)).astype(np.float32)
    fill_s = sum(
        seconds(lambda start=start: store.put(np.arange(start, start + _BATCH), logits))  # type: ignore[misc]
        for start in range(0, num, _BATCH)
    )
    used = (bytes_used() - before) / num
    reads = [seconds(lambda: store.get(rng.integers(0, num, _BATCH))) for _ in range(_READS)]
    assert store.counts.found == _BATCH * _READS
    print(f"{name:24}{used:12.0f}{num / fill_s:14,.0f}{1000 * statistics.median(reads):12.2f}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40 * 256 * 2)
    num = parser.parse_args().samples // _BATCH * _BATCH
    binary = shutil.which("redis-server") or sys.exit("this benchmark needs redis-server on the PATH")
    key = StoreKey(
        fingerprint="f", data_digest="d", views=ViewSetting(setting="fix/cc").fixed, num_samples=num,
        num_classes=_NUM_CLASSES, dtype="float16",
    )  # fmt: skip
    print(f"{num:,} samples of {_NUM_CLASSES} float16 logits, values of {key.value_bytes} bytes\n")
    print(f"{'':24}{'bytes each':>12}{'writes/s':>14}{'256, ms':>12}")
    with tempfile.TemporaryDirectory() as folder:
        file = FileStore(Path(folder), key)
        measure("file", file, num, lambda: 512 * file.path.stat().st_blocks)
        server = subprocess.Popen(
            [binary, "--port", "0", "--unixsocket", f"{folder}/redis.sock", "--save", ""], stdout=subprocess.DEVNULL
        )
        try:
            while not Path(folder, "redis.sock").exists():
                time.sleep(0.05)
            url = f"unix://{folder}/redis.sock"
            client = redis.from_url(url)

            def used() -> int:
                return int(client.info("memory")["used_memory"])

            measure("Redis, hashes of 128", RedisStore(url, key), num, used)
            client.flushall()
            measure("Redis, a key a sample", PlainKeys(url, key), num, used)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
