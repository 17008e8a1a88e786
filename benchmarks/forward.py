"""A teacher's network alone, on rows that are ready: `python -m benchmarks.forward MODEL THREADS` for benchmarks.

The server's own Teacher, batch shape, precision and threads, in a process of its own as the server is. Each line on
standard input is a number of seconds; the answer is a line with the rows that were answered a second meanwhile.
"""

from __future__ import annotations

import sys
import time

import torch

import models
from teacher_server.model import Teacher, be_reproducible, choose_batch_rows, choose_precision


def main() -> None:
    """Answer until standard input ends."""
    name, threads = sys.argv[1], int(sys.argv[2])
    be_reproducible(threads)
    device = torch.device("cpu")
    module, card = models.load(name)
    batch_rows = choose_batch_rows(None, device)
    teacher = Teacher(module, card, device=device, precision=choose_precision("auto", device), batch_rows=batch_rows)
    rows_NCHW = torch.randn(batch_rows, 3, card.size, card.size).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        teacher.logits(rows_NCHW)
    print("ready", flush=True)
    for line in sys.stdin:
        began, num = time.perf_counter(), 0
        while (now := time.perf_counter()) - began < float(line) or not num:
            teacher.logits(rows_NCHW)
            num += batch_rows
        print(num / (now - began), flush=True)


if __name__ == "__main__":
    main()
