"""Who else is training: this process's rank, its device, and the few collectives the loop needs.

torchrun says everything through the environment (RANK, WORLD_SIZE, LOCAL_RANK); without it this is a world
of one, in which every collective is the identity and no process group exists. Processes talk over gloo on
CPUs and NCCL on GPUs. How the work is divided is not here: rows belong to views/, evaluation to evaluate.py.

Rejected: asking `torch.distributed` for the rank wherever it is needed. A value that is passed in can be a
world of one in a test.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among its peers. As a context manager it leaves the process group at the end."""

    rank: int = 0
    """0 .. size - 1 over all machines; rank 0 alone prints and writes files."""
    size: int = 1
    local_rank: int = 0
    """The rank on this machine, which is also the GPU's number."""
    local_size: int = 1
    """Ranks on this machine."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    connected: bool = False
    """Whether a process group exists, as DDP needs it; also for a world of one that torchrun started."""

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on rank 0 only."""
        if self.is_main:
            print(text, flush=True)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, on every rank, of a tensor on `device`; a new tensor. All ranks must call it."""
        total = tensor.detach().clone()
        if self.connected:
            dist.all_reduce(total)
        return total

    def all_mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks, on every rank, of a floating-point tensor on `device`; a new tensor."""
        return self.all_sum(tensor) / self.size

    def all_max(self, tensor: Tensor) -> Tensor:
        """Largest over ranks, element by element, on every rank; a new tensor."""
        largest = tensor.detach().clone()
        if self.connected:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors on `device` by rank 0's."""
        if self.connected:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value, on every rank; anything that pickles. The other ranks' argument is ignored."""
        box = [value]
        if self.connected:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def any_error(self, error: E | None) -> E | None:
        """What went wrong on a rank and concerns all: the first rank's error that has one, on every rank.

        Its class takes a sentence and nothing else.
        """
        if not self.connected:
            return error
        told: list[tuple[type[E], str] | None] = [None] * self.size
        dist.all_gather_object(told, (type(error), str(error)) if error else None)
        return next((kind(words) for kind, words in filter(None, told)), None)

    def raise_together(self, error: Exception | None) -> None:
        """Raise, on all ranks, what one of them cannot go on without. All ranks must call it."""
        if someones := self.any_error(error):
            raise error or someones

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all_sum(torch.zeros(1, device=self.device))

    def close(self) -> None:
        """Leave the process group. Not a collective: a rank that fails must be able to leave alone."""
        if self.connected and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def join(device: Literal["auto", "cpu", "cuda"] = "auto", timeout_s: float = 1800.0) -> World:
    """Join the processes that torchrun started, or be alone when it did not.

    Args:
        device: "auto" takes a GPU where there is one.
        timeout_s: how long a rank waits for the others in a collective before it gives up. Longer than a
            rank may wait for its teacher, or the patient ranks are killed by the impatient ones.

    Raises:
        ValueError: torchrun's variables are incomplete, or there are more processes than GPUs here.
    """
    launched = [name for name in _LAUNCHED if name in os.environ]
    if "RANK" not in launched:
        return World(device=_device(device, local_rank=0))
    if missing := sorted(set(_LAUNCHED) - set(launched)):
        raise ValueError(f"RANK is set but {', '.join(missing)} is not: start several processes with torchrun")
    rank, size, local_rank = (int(os.environ[name]) for name in _LAUNCHED[:3])
    own = _device(device, local_rank)
    cuda = own.type == "cuda"
    if cuda:
        torch.cuda.set_device(own)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=own if cuda else None,
    )
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=own, connected=True)


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine wants cuda:{local_rank}, but it has "
            f"{torch.cuda.device_count()} GPUs: lower --nproc-per-node or use --device cpu"
        )
    return torch.device("cuda", local_rank)
