"""Row 6: images a second from shards to normalised tensors, on the CPU: `python -m benchmarks.loader`.

Ours is the student's loader as the training loop uses it: Index, views drawn, DALI with two threads, a thread that runs
ahead, and `mix` where the loop has it. Beside it torchvision and webdataset with two worker processes
(benchmarks/other_loaders.py), the same boxes of the same shards, in turns; every pair of views is compared once.
Pictures: JPEGs of 500 x 375 at quality 90, as heavy as photographs, and the same shrunk to a short side of 160.

The floor is what DALI needs to decode and resize those boxes and nothing else: files in memory, on as many threads,
results left where they lie.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali import fn, types

from benchmarks import figure, photographs
from benchmarks.figure import Figure
from benchmarks.other_loaders import MEAN, STD, Loader, torchvision_loader, webdataset_loader
from data_prep.index import Index
from data_prep.prepare import prepare
from student_trainer.loader import Lesson, Source, run_ahead
from views.draw import Plan, ViewLaw
from views.mix import mix
from views.render import Renderer, Rendering
from views.view import Rows

_THREADS = _WORKERS = 2
_AHEAD = 3  # batches, as the student's
_GOAL = 2.0
_MEAN_DIFFERENCE = 1.0  # grey levels: we truncate, torchvision rounds


def measure(quick: bool) -> Iterator[Figure]:
    """Both kinds of pictures at both sizes, then the batch's last step by itself."""
    num, batch_size, passes, rounds = (16, 4, 1, 1) if quick else (256, 64, 2, 3)
    kinds: tuple[tuple[int | None, str], ...] = (None, "JPEGs of 500 x 375"), (160, "JPEGs of 213 x 160")
    with tempfile.TemporaryDirectory() as folder:
        photographs.prepared(Path(folder), num)
        for short_side, name in kinds[1:] if quick else kinds:
            index = prepare(
                "folder", Path(folder) / "pictures", Path(folder) / f"short_{short_side}", short_side=short_side,
                workers=1, pictures_per_shard=num // _WORKERS // 2, progress=False,
            )  # fmt: skip
            for size in (224, 128) if not quick else (32,):
                yield _compared(index, name, size, batch_size, passes, rounds)
    yield _mixing(128, 3 if quick else 15, 224 if not quick else 32)


def ours(index: Index, rows: Rows, size: int, passes: int, batch_size: int) -> Loader:
    """Batches as the training loop gets them, normalised as it normalises them."""
    renderer = Renderer(Rendering(size=size), batch_size, None, _THREADS)
    source = Source(index, renderer, ())
    parts = [rows.take(start, start + batch_size) for start in range(0, len(rows), batch_size)]

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        lessons = (Lesson(step, part, part) for step, part in enumerate(parts * passes))
        for batch in run_ahead(source, lessons, _AHEAD):
            part = batch.rows
            partner, lam = torch.from_numpy(part.partner).long(), torch.from_numpy(part.lam)
            yield torch.from_numpy(part.sample), mix(batch.pixels, partner, lam, MEAN, STD)

    return batches


def floor(index: Index, rows: Rows, size: int, batch_size: int) -> float:
    """Images a second of a bare graph that decodes and resizes the same boxes, files in memory."""
    graph = dali.Pipeline(batch_size=batch_size, num_threads=_THREADS, device_id=None, prefetch_queue_depth=1)
    with graph:
        file, start, shape = (
            fn.external_source(name=name, dtype=dtype, ndim=1)
            for name, dtype in (("file", types.UINT8), ("start", types.INT32), ("shape", types.INT32))
        )
        cut = fn.decoders.image_slice(
            file, start, shape, axis_names="HW", normalized_anchor=False, normalized_shape=False, output_type=types.RGB
        )
        graph.set_outputs(fn.resize(cut, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=False))
    graph.build()
    files = index.read(rows.sample)

    def once() -> None:
        for first in range(0, len(rows), batch_size):
            part = slice(first, first + batch_size)
            graph.feed_input("file", files[part])
            graph.feed_input("start", np.ascontiguousarray(rows.box[part, :2]))
            graph.feed_input("shape", np.ascontiguousarray(rows.box[part, 2:]))
            graph.run()

    return max(len(rows) / _seconds(once) for _ in range(3))


def largest_mean_difference(ours: Loader, theirs: Loader) -> float:
    """Of all views of one pass: the largest mean |difference| of a view from the other's, in grey levels."""
    ours_of, theirs_of = (
        {int(sample): image for samples, images in make() for sample, image in zip(samples, images, strict=True)}
        for make in (ours, theirs)
    )
    if ours_of.keys() != theirs_of.keys():
        raise RuntimeError(f"the two loaders show other pictures: {len(theirs_of)} and {len(ours_of)} of them")
    levels = torch.tensor(STD).reshape(3, 1, 1) * 255
    return max(float(((image - theirs_of[sample]) * levels).abs().mean()) for sample, image in ours_of.items())


def _compared(index: Index, name: str, size: int, batch_size: int, passes: int, rounds: int) -> Figure:
    rows = _views(index)
    loaders: dict[str, Loader] = {
        "ours": ours(index, rows, size, passes, batch_size),
        "torchvision v2": torchvision_loader(index, rows, size, passes, batch_size, _WORKERS),
        "webdataset + torchvision": webdataset_loader(index, rows, size, passes, batch_size, _WORKERS),
    }
    for other in ("torchvision v2", "webdataset + torchvision"):  # also starts the workers
        difference = largest_mean_difference(loaders["ours"], loaders[other])
        if difference > _MEAN_DIFFERENCE:
            raise RuntimeError(f"{other} shows other views than ours: {difference:.2f} grey levels apart in the mean")
    rates: dict[str, list[float]] = {loader: [] for loader in loaders}
    bare = []
    for _ in range(rounds):
        for loader, make in loaders.items():
            rates[loader].append(_rate(make))
        bare.append(floor(index, rows, size, batch_size))
    medians = {loader: statistics.median(measured) for loader, measured in rates.items()}
    better = max((other for other in medians if other != "ours"), key=medians.__getitem__)
    kilobytes = float(index.size[rows.sample].mean()) / 1000
    return Figure(
        row="6", name=f"loader, shards to normalised tensors, {size} px, {name}", value=medians["ours"],
        unit="images/s", beside=f"{better}, {_WORKERS} workers", alternative=medians[better],
        floor=statistics.median(bare), goal=(">=", _GOAL),
        judged=statistics.median(a / b for a, b in zip(rates["ours"], rates[better], strict=True)),
        note=f"{kilobytes:.0f} kB a file; {', '.join(f'{one} {rate:.0f}' for one, rate in medians.items())} images/s, "
        f"medians of {rounds} rounds; floor: DALI's decoding and resizing of the same boxes alone, {_THREADS} threads. "
        "If the goal is missed: DALI resizes on a CPU with SSE2 and gathers three channels along rows, about a third "
        "of our time, where torchvision has AVX2 on integers; other arithmetic would change the views' bits. Done: "
        "truncation outside of DALI, mixing in the cache; tried in vain: DALI's memory pool, smaller runs",
    )  # fmt: skip


def _mixing(num_rows: int, repeats: int, size: int) -> Figure:
    """`mix`, beside the expression that it computes, on a batch as a whole."""
    pixels = torch.randint(0, 256, (num_rows, size, size, 3), dtype=torch.uint8)
    partner, lam = torch.arange(num_rows) - 1, torch.full((num_rows,), 0.7)
    partner[0] = num_rows - 1

    def plain() -> torch.Tensor:
        scaled, weight = pixels.float() / 255, lam.reshape(-1, 1, 1, 1)
        mixed = weight * scaled + (1 - weight) * scaled[partner]
        return ((mixed - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)

    def in_the_cache() -> torch.Tensor:
        return mix(pixels, partner, lam, MEAN, STD)

    if not torch.equal(plain(), in_the_cache()):
        raise RuntimeError("mix does not give the bits of the expression that it stands for")
    pairs = [(_seconds(in_the_cache), _seconds(plain)) for _ in range(repeats)]
    a, b = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
    return Figure(
        row="6", name=f"uint8 views to mixed, normalised rows, {num_rows} at {size} px", value=a, unit="ms",
        beside="the same expression on the whole batch", alternative=b, note=f"{torch.get_num_threads()} threads",
    )  # fmt: skip


def _views(index: Index) -> Rows:
    """One inception crop of each picture."""
    law = ViewLaw(mixup=False)
    plan = Plan(
        seed=0, batch_size=len(index), law=law, samples=range(len(index)), height=index.height, width=index.width
    )
    return plan.rows(0)


def _rate(loader: Loader) -> float:
    start = time.perf_counter()
    num = sum(len(images) for _, images in loader())
    return num / (time.perf_counter() - start)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    figure.present(measure, __doc__)
