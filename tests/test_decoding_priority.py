"""On the CPU pictures are decoded behind the network, and nothing else is."""

import os
import threading
from pathlib import Path

import torch

from teacher_server.pictures import make_renderers


def threads() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def priority(thread: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)


def test_decoders_on_the_cpu_give_way_and_who_makes_them_does_not():
    before, own = threads(), priority(threading.get_native_id())
    renderers, _ = make_renderers(16, "linear", False, device=torch.device("cpu"), num_threads=2, num=2)
    decoders = threads() - before
    assert len(renderers) == 2
    assert len(decoders) >= 2
    assert {priority(thread) for thread in decoders} == {min(own + 10, 19)}
    assert priority(threading.get_native_id()) == own
