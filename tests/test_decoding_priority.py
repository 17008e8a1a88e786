"""On the CPU pictures are decoded behind the network, and nothing else is."""

import contextlib
import os
import threading
from pathlib import Path

import torch

from teacher_server.pictures import make_renderers


def threads() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def priority(thread: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)


def priorities(of: set[int]) -> list[int]:
    """Of those that live still: a server of another test may be ending in this process."""
    found = []
    for thread in of:
        with contextlib.suppress(ProcessLookupError):
            found.append(priority(thread))
    return found


def test_decoders_on_the_cpu_give_way_and_who_makes_them_does_not():
    before, own = threads(), priority(threading.get_native_id())
    renderers, _ = make_renderers(16, "linear", False, device=torch.device("cpu"), num_threads=2, num=2)
    decoders = priorities(threads() - before)
    assert len(renderers) == 2
    assert len(decoders) >= 2
    assert set(decoders) == {min(own + 10, 19)}
    assert priority(threading.get_native_id()) == own
