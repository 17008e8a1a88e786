"""What a step's collectives cost between processes of one machine, over gloo: a part of row 12 (benchmarks/growth.py).

`python -m benchmarks.ranks ROUNDS NUM_GRADIENTS` is one rank, with torchrun's variables in its environment; rank 0
prints. Rejected: multiprocessing. It imports the parent's main module in every rank, with all its servers and decoders.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from student_trainer.world import join

NUM_GRADIENTS = 25_557_032
"""Parameters of a ResNet-50."""
_NUMBERS = 9  # of a step that ranks share: loss, entropies, the stop flag (student_trainer/train.py)
_ROOT = Path(__file__).resolve().parents[1]


def milliseconds(size: int, rounds: int, num_gradients: int = NUM_GRADIENTS) -> tuple[float, float]:
    """Of the collective that the loop adds to a step, and of that of the gradients, with so many ranks; medians."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.ranks", str(rounds), str(num_gradients)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    ranks = [
        subprocess.Popen(
            command, cwd=_ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(size)
    ]  # fmt: skip
    said = [rank.communicate()[0] for rank in ranks]
    if codes := [rank.returncode for rank in ranks if rank.returncode]:
        raise RuntimeError(f"{len(codes)} of {size} ranks ended with exit code {codes[0]}")
    own, gradients = json.loads(said[0])
    return own, gradients


def main(rounds: int, num_gradients: int) -> None:
    """One rank."""
    with join("cpu", timeout_s=120) as world:
        numbers, gradients = torch.randn(_NUMBERS), torch.randn(num_gradients)
        own = _median_ms(lambda: world.all_mean(numbers), rounds)
        theirs = _median_ms(lambda: world.all_sum(gradients), max(2, rounds // 60))
        world.say(json.dumps([own, theirs]))


def _median_ms(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])  # the first one connects


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
