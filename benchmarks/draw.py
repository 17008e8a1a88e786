"""Row 7: planning and drawing the rows of a batch, on one core: `python -m benchmarks.draw`.

Order, boxes, flips, partners and lambda of ImageNet's pictures, at three batch sizes; and of a billion pictures, whose
heights and widths are views of one number. Beside it the alternative that was rejected: one numpy generator a sample,
which draws four numbers and does nothing with them. Times are of this process's CPU, in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from benchmarks import figure
from benchmarks.figure import Figure
from views.draw import Plan, ViewLaw

_IMAGENET = 1_281_167
_JUDGED, _GOAL_MS = 4096, 10.0


def measure(quick: bool) -> Iterator[Figure]:
    """Ours and the generators at each size."""
    repeats = 3 if quick else 40
    for num_pictures, batch_size in ((_IMAGENET, 64), (_IMAGENET, 512), (_IMAGENET, _JUDGED), (10**9, _JUDGED)):
        plan = _plan(num_pictures, batch_size)
        ours, theirs = [], []
        for step in range(repeats):
            ours.append(_milliseconds(partial(plan.rows, step)))
            theirs.append(_milliseconds(partial(_generators, batch_size, step)))
        judged = batch_size == _JUDGED
        yield Figure(
            row="7", name=f"rows of a step planned and drawn, {batch_size} of {num_pictures:,} pictures",
            value=statistics.median(ours), unit="ms", beside="a numpy generator a sample",
            alternative=statistics.median(theirs), goal=("<=", _GOAL_MS) if judged else None,
            judged=statistics.median(ours) if judged else None,
            note=f"CPU time of one core, medians of {repeats} steps; the generators only draw four numbers each",
        )  # fmt: skip


def _plan(num_pictures: int, batch_size: int) -> Plan:
    height, width = (np.broadcast_to(np.int32(side), num_pictures) for side in (375, 500))
    return Plan(
        seed=0, batch_size=batch_size, law=ViewLaw(), samples=range(num_pictures), height=height, width=width
    )  # fmt: skip


def _generators(batch_size: int, step: int) -> None:
    for sample in range(batch_size):
        np.random.default_rng((0, 1, step, sample)).random(4)


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return 1000 * (time.process_time() - start)


if __name__ == "__main__":
    figure.present(measure, __doc__)
