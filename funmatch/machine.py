"""Checks of this machine: Python, packages, CUDA, DALI, GPUs, ports, shared memory, disk.

Nothing heavy is imported before it is looked at: a torch that does not import is a finding, too.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from funmatch.finding import Finding, broken, look, ok

_WATCHED = ("torch", "nvidia-dali-cuda130", "grpcio", "protobuf", "timm", "numpy")
_PYTHON = (3, 11)
_ROOM_BYTES, _LITTLE_ROOM_BYTES = 200 * 2**20, 2 * 2**30  # a ResNet-50's checkpoint has 300 MB, and a run keeps two
_SHM_BYTES, _LITTLE_SHM_BYTES = 32 * 2**20, 2**30  # Docker gives 64 MiB; NCCL's share of ours is 1 GiB in compose
_GPU_BYTES = 4 * 2**30  # less than a ResNet-50 at batch 64 needs

Device = Literal["auto", "cpu", "cuda"]


def check_python() -> Iterator[Finding]:
    """The interpreter, and the system as support wants to know it."""
    if sys.version_info < _PYTHON:
        yield broken("python", f"this is Python {platform.python_version()}", "make the environment with 3.11 or newer")
    else:
        yield ok("python", f"{platform.python_version()} on {platform.platform(terse=True)}")


def check_packages() -> Iterator[Finding]:
    """What is installed against what this version of funmatch asks for."""
    wanted = _wanted()
    for package in _WATCHED:
        minimum = wanted.get(package, "0")
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield broken(package, "it is not installed", f"pip install '{package}>={minimum}'")
            continue
        if _numbers(version) < _numbers(minimum):
            cure = f"pip install '{package}>={minimum}', or all of requirements.lock"
            yield broken(package, f"version {version} is older than {minimum}", cure)
        else:
            yield ok(package, version)


def check_cuda(device: Device) -> Iterator[Finding]:
    """Whether torch sees CUDA, and whether a device of it computes."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield broken("cuda", f"torch does not import: {error}", "install torch again, from requirements.lock")
        return
    with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        seen = torch.cuda.is_available()
    if not seen:
        why = _why_no_cuda(torch.version.cuda, [str(one.message) for one in caught])
        if device == "cuda":
            yield broken("cuda", f"--device cuda was asked for, and torch sees no CUDA device: {why[0]}", why[1])
        elif device == "auto":
            yield look("cuda", f"torch sees no CUDA device, all runs on the CPU: {why[0]}", why[1])
        else:
            yield ok("cuda", "not asked for")
        return
    for number in range(torch.cuda.device_count()):
        name = f"cuda:{number}"
        try:
            ones = torch.ones(64, 64, device=name)
            right = float((ones @ ones).sum()) == 64.0**3
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            yield broken(name, f"it does not compute: {said}", "see the next lines for who holds it; else reboot it")
            continue
        if right:
            yield ok(name, f"{torch.cuda.get_device_name(number)} computes; torch is for CUDA {torch.version.cuda}")
        else:
            yield broken(name, "it computes wrongly", "take this GPU out of use (CUDA_VISIBLE_DEVICES)")


def check_gpus() -> Iterator[Finding]:
    """The driver's own view: free memory, and who holds it. Silent where there is no driver."""
    gpus = _nvidia_smi("--query-gpu=uuid,index,name,driver_version,memory.total,memory.free")
    if gpus is None:
        return
    holders = _nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name,used_memory") or []
    for uuid, index, name, driver, total, free in (line for line in gpus if len(line) == 6):
        held = [f"pid {line[1]} {line[2]} ({line[3]} MiB)" for line in holders if line[0] == uuid]
        says = f"{name}, driver {driver}, {free} of {total} MiB free"
        if free.isdecimal() and int(free) * 2**20 < _GPU_BYTES:
            who = ", ".join(held) or "processes that nvidia-smi does not show here (of another container?)"
            yield broken(f"gpu {index}", f"{says}; held by {who}", "end them, or choose others (CUDA_VISIBLE_DEVICES)")
        elif held:
            yield look(f"gpu {index}", f"{says}; used by {', '.join(held)}", "see that there is room for both")
        else:
            yield ok(f"gpu {index}", says)


def check_dali() -> Iterator[Finding]:
    """Whether DALI imports, and renders a picture as it should."""
    try:
        import numpy as np
        from PIL import Image

        from views.render import Renderer, Rendering

        file = io.BytesIO()
        Image.new("RGB", (24, 16), (200, 100, 50)).save(file, "PNG")
        picture = np.frombuffer(file.getvalue(), np.uint8)
        renderer = Renderer(Rendering(size=8), 1, None, num_threads=1)
        view = renderer.render(
            [picture], np.array([0], np.int32), np.array([[0, 0, 16, 24]], np.int32), np.array([False])
        )
    except (ImportError, OSError, RuntimeError) as error:
        yield broken("dali", f"it does not import or decode: {error}", "install it again, from requirements.lock")
        return
    if bool((view.numpy() == (200, 100, 50)).all()):
        yield ok("dali", "it decodes and resizes on the CPU")
    else:
        yield broken("dali", "it decodes to wrong pixels", "install the version of requirements.lock")


def check_ports(ports: Sequence[int]) -> Iterator[Finding]:
    """Whether a server could listen there."""
    for port in ports:
        name = f"port {port}"
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                probe.listen()
            except PermissionError:
                yield broken(name, "this user may not listen there", "choose one above 1023")
            except (OSError, OverflowError) as error:
                reason = error.strerror if isinstance(error, OSError) else "a port is 0 to 65535"
                cure = f"end who listens (ss -ltnp 'sport = :{port}' says who), or choose another port"
                yield broken(name, f"it cannot be listened at: {reason}", cure)
            else:
                yield ok(name, "free")


def check_shared_memory(folder: Path) -> Iterator[Finding]:
    """Room in /dev/shm, through which NCCL's ranks of a machine speak; Docker gives 64 MiB."""
    cure = "more for the container: docker run --shm-size 1g, shm_size in compose, an emptyDir of medium Memory"
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        yield broken("shared memory", f"{folder} cannot be asked: {error.strerror}", "mount a tmpfs there")
        return
    says = f"{folder} has {_size(usage.free)} free of {_size(usage.total)}"
    if usage.free < _SHM_BYTES:
        yield broken("shared memory", says, cure)
    elif usage.free < _LITTLE_SHM_BYTES:
        yield look("shared memory", f"{says}; several GPUs in one run may want 1 GiB", cure)
    else:
        yield ok("shared memory", says)


def check_disk(folder: Path) -> Iterator[Finding]:
    """Whether this user can write there, and much."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        cure = "choose another folder, or give this user the right to write there"
        yield broken("disk", f"{folder} cannot be written: {error.strerror}", cure)
        return
    says = f"{_size(free)} free for {folder}"
    if free < _ROOM_BYTES:
        yield broken("disk", f"{says}: not enough for a checkpoint", "make room, or choose another disk")
    elif free < _LITTLE_ROOM_BYTES:
        yield look("disk", f"{says}; checkpoints of a ResNet-50 take 1 GB", "make room, or choose another disk")
    else:
        yield ok("disk", says)


def _wanted() -> dict[str, str]:
    """Package to the lowest version that our own metadata asks for."""
    try:
        lines = importlib.metadata.requires("funmatch") or []
    except importlib.metadata.PackageNotFoundError:  # run from a clone that was not installed
        return {}
    found = (re.match(r"([A-Za-z0-9._-]+)[^>;]*>=([0-9.]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in found if match}


def _numbers(version: str) -> tuple[int, ...]:
    """2.11.0+cu130 as (2, 11): zeros at the end say nothing."""
    match = re.match(r"[0-9]+(\.[0-9]+)*", version)
    parts = [int(part) for part in match[0].split(".")] if match else [0]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _why_no_cuda(built_for: str | None, warned: Sequence[str]) -> tuple[str, str]:
    """What is so, and what to do."""
    if built_for is None:
        return "this torch was built for the CPU", "install torch of requirements.lock, which is for CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}", "unset it, or name GPUs in it"
    if warned:
        return warned[0].splitlines()[0], f"a driver for CUDA {built_for}"
    if _nvidia_smi("--query-gpu=uuid") is None:
        return "no NVIDIA driver answers here", "install it; for a container: --gpus all and the NVIDIA runtime"
    return "the driver sees GPUs that torch does not", f"a driver for CUDA {built_for}, and access to /dev/nvidia*"


def _nvidia_smi(query: str) -> list[list[str]] | None:
    """Its answer in rows of values, or None if it does not answer."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [[value.strip() for value in line.split(",")] for line in answer.splitlines() if line.strip()]


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"
