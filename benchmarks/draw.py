"""Planning and drawing batches, and what a row costs on the wire: `python -m benchmarks.draw`.

Beside it, the alternative that was rejected: one numpy generator per sample.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from views.draw import Plan, ViewLaw
from views.wire import ask_by_reference

NUM_SAMPLES = 1_281_167  # ImageNet


def milliseconds(run: Callable[[int], object], repeats: int) -> float:
    """Median time of one call, of this process's CPU."""
    times = []
    for step in range(repeats):
        start = time.process_time()
        run(step)
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


def generators(batch_size: int, step: int) -> None:
    """Make one generator per sample and draw four numbers, and nothing else."""
    for sample in range(batch_size):
        np.random.default_rng((0, 1, step, sample)).random(4)


def main() -> None:
    """Print one JSON line per batch size."""
    height, width = np.full(NUM_SAMPLES, 375, np.int32), np.full(NUM_SAMPLES, 500, np.int32)
    for batch_size in (64, 512, 4096):
        plan = Plan(
            seed=0, batch_size=batch_size, law=ViewLaw(), samples=range(NUM_SAMPLES), height=height, width=width
        )
        request = ask_by_reference(plan.rows(5), "f" * 64)
        request.fingerprint, request.request_id = "f" * 64, "a" * 32
        line = {
            "batch_size": batch_size,
            "draw_ms": round(milliseconds(plan.rows, 100), 3),
            "numpy_generators_ms": round(milliseconds(partial(generators, batch_size), 5), 3),
            "request_bytes_per_row": round(request.ByteSize() / batch_size, 1),
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
