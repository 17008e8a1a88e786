"""Which GPU is mine: `claim` takes a free one of the visible GPUs under a lock, before torch is imported.

For replicas that all see the same GPUs, as containers of one compose service do: a reservation of "one GPU" would give
each of them the first. A claim is a lock (flock) on FOLDER/UUID.lock, held by an open descriptor: however a process
ends, kill -9 included, the kernel frees it, and no clean-up and no stale file can be in the way. One worker process
a GPU below one parent was the alternative: then `--scale` would no longer be the number of teachers, and one broken
GPU would be the parent's trouble and not its own replica's.

GPUs go by their UUIDs, since containers with other pools number them otherwise. Not here: which GPUs a container sees
(compose, NVIDIA_VISIBLE_DEVICES), and Kubernetes, whose device plugin gives each pod a GPU of its own.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path


class NoFreeGpuError(RuntimeError):
    """Every visible GPU is held by another process; says who holds which."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One GPU, ours while the descriptor is open; the process keeps it open for its life."""

    gpu: str
    descriptor: int


def claim(folder: Path) -> Claim:
    """Take the first free GPU and make it the only one that CUDA will see in this process.

    Raises:
        NoFreeGpuError: none is free.
        ValueError: no GPU is visible, CUDA_VISIBLE_DEVICES names one that is not there, or the folder is not writable.
    """
    held = []
    for gpu in visible_gpus():
        path = folder / f"{gpu.replace('/', '_')}.lock"  # old drivers write MIG-GPU-uuid/1/0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _try_lock(path)
        except OSError as error:
            raise ValueError(f"--claim-gpu needs a folder that this user can write: {error}") from error
        if descriptor is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            return Claim(gpu=gpu, descriptor=descriptor)
        held.append(f"{gpu} by {path.read_text().strip() or 'a process that has not yet said its name'}")
    raise NoFreeGpuError(
        f"no GPU is free: {'; '.join(held)} (locks in {folder}); run fewer teachers or give them more GPUs "
        "(TEACHER_GPUS in compose)"
    )


def visible_gpus() -> tuple[str, ...]:
    """UUIDs of the GPUs this process may use: nvidia-smi's, narrowed by CUDA_VISIBLE_DEVICES if that is set.

    A GPU that is cut into MIG instances is these. Numbers in CUDA_VISIBLE_DEVICES count as nvidia-smi counts.
    """
    listed = _parse(_nvidia_smi())
    every = [uuid for uuids in listed for uuid in uuids]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None:
        every = [uuid for entry in wanted.split(",") for uuid in _chosen(entry.strip(), listed)]
    if not every:
        raise ValueError(
            "--claim-gpu: this process sees no GPU"
            + (f", since CUDA_VISIBLE_DEVICES is {wanted!r}" if wanted is not None else "")
            + "; give it some (--gpus or NVIDIA_VISIBLE_DEVICES for a container), or leave --claim-gpu out"
        )
    return tuple(dict.fromkeys(every))


def _try_lock(path: Path) -> int | None:
    """The descriptor of the locked file, or None if someone else has the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # not inherited by programs that we start (PEP 446)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _nvidia_smi() -> str:
    """`nvidia-smi -L`. CUDA is not asked: it reads CUDA_VISIBLE_DEVICES once and for all, and that before we set it."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except FileNotFoundError as error:
        raise ValueError(
            "--claim-gpu: there is no nvidia-smi here to list GPUs; a container gets it from the NVIDIA runtime "
            "(NVIDIA_DRIVER_CAPABILITIES must name utility); without GPUs leave --claim-gpu out"
        ) from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (error.stdout or "") + (error.stderr or "") if isinstance(error, subprocess.CalledProcessError) else ""
        raise ValueError(f"--claim-gpu: nvidia-smi -L failed ({error}): {said.strip()}") from error
    return listing.stdout


def _parse(listing: str) -> list[list[str]]:
    """Of each GPU, in nvidia-smi's order, its UUID, or those of its MIG instances."""
    gpus: list[list[str]] = []
    instances: list[list[str]] = []
    for kind, uuid in re.findall(r"^\s*(GPU|MIG) .*\(UUID: ([^)]+)\)\s*$", listing, re.MULTILINE):
        if kind == "GPU":
            gpus.append([uuid])
            instances.append([])
        elif instances:
            instances[-1].append(uuid)
    return [parts or whole for whole, parts in zip(gpus, instances, strict=True)]


def _chosen(entry: str, listed: list[list[str]]) -> list[str]:
    """What one entry of CUDA_VISIBLE_DEVICES names: a number, or a UUID or its beginning. -1 and nothing: none."""
    if entry in ("", "-1"):
        return []
    if entry.isdecimal():
        named = listed[int(entry)] if int(entry) < len(listed) else []
    else:
        named = [uuid for uuids in listed for uuid in uuids if uuid.startswith(entry)]
    if not named:
        raise ValueError(
            f"--claim-gpu: CUDA_VISIBLE_DEVICES names {entry!r}, but nvidia-smi lists "
            + (", ".join(uuid for uuids in listed for uuid in uuids) or "no GPU")
        )
    return named
