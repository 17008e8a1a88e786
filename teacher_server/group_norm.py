"""GroupNorm and ReLU in one pass on the GPU, with the addition before it: what a BiT spends most of its time in.

Half precision in and out in channels_last, statistics and arithmetic in float32; what is added is rounded to half
before it is looked at, as it would be if it were stored. Each program owns some whole groups of one picture: no atomic
operation, one order of summation, so that a row's bits depend on nothing but the row.

Bytes: around its GroupNorm torch 2.14 reorders channels_last to NCHW and back, and an addition before it and a ReLU
after it read and write everything again. Here memory is read once (the second time it comes from the L2 cache, where
a program's share of a picture fits) and written once.

The sums are of differences to the channel's first pixel, or a mean that is large beside the deviation would drown it.
Rejected: Welford's running form. It divides for each element, and the threads must be merged all the same.
Rejected: torch.library.triton_op. It lets a compiler see the kernel, which has nothing to add to it, and refuses the
interpreter that the tests run it in (TRITON_INTERPRET=1).

Legend: N pictures, C channels, H W pixels.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
from triton import language as tl

_LANES = 64  # channels of a program: 128 bytes, a line of the cache
_ELEMENTS = 8192  # of a tile, 32 for each thread
WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm_relu(  # type: ignore[no-untyped-def]
    x_ptr, branch_ptr, sum_ptr, out_ptr, weight_ptr, bias_ptr, pixels, eps,
    ADDS: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of GROUP channels of one picture; PADDED is GROUP, made a power of two."""
    programs: tl.constexpr = CHANNELS // (GROUP * GROUPS)
    picture = (tl.program_id(0) // programs).to(tl.int64)
    first_group = (tl.program_id(0) % programs) * GROUPS
    lane = tl.arange(0, GROUPS * PADDED)
    if PADDED == GROUP:  # the compiler sees that all is contiguous: wide loads
        channel = first_group * GROUP + lane
        real = lane < GROUPS * PADDED
    else:
        channel = (first_group + lane // PADDED) * GROUP + lane % PADDED
        real = lane % PADDED < GROUP
    start = picture * pixels * CHANNELS

    shift = tl.load(x_ptr + start + channel, mask=real, other=0.0).to(tl.float32)
    if ADDS:
        shift += tl.load(branch_ptr + start + channel, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros([TILE, GROUPS * PADDED], tl.float32)
    squares = tl.zeros([TILE, GROUPS * PADDED], tl.float32)
    for first in range(0, pixels, TILE):
        pixel = first + tl.arange(0, TILE)
        at = start + pixel[:, None] * CHANNELS + channel[None, :]
        inside = (pixel < pixels)[:, None] & real[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0, eviction_policy="evict_last")
        if ADDS:
            branch = tl.load(branch_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first")
            x = (x.to(tl.float32) + branch.to(tl.float32)).to(x_ptr.dtype.element_ty)
            tl.store(sum_ptr + at, x, mask=inside, eviction_policy="evict_last")
        centred = tl.where(inside, x.to(tl.float32) - shift[None, :], 0.0)
        total += centred
        squares += centred * centred

    # Of each channel, then of its group: deviations within the channels, and of the channels' means from the group's.
    moved = tl.sum(total, axis=0) / pixels
    within = tl.sum(squares, axis=0) - moved * moved * pixels
    of_channel = shift + moved  # 0 where there is no channel
    mean = _of_groups(of_channel, GROUPS, PADDED) / GROUP
    apart = tl.where(real, of_channel - mean, 0.0)
    variance = _of_groups(within + apart * apart * pixels, GROUPS, PADDED) / (pixels * GROUP)
    weight = tl.load(weight_ptr + channel, mask=real, other=0.0) * tl.rsqrt(variance + eps)
    bias = tl.load(bias_ptr + channel, mask=real, other=0.0)

    if ADDS:
        tl.debug_barrier()  # a thread may read what another has stored
    source_ptr = sum_ptr if ADDS else x_ptr
    for first in range(0, pixels, TILE):
        pixel = first + tl.arange(0, TILE)
        at = start + pixel[:, None] * CHANNELS + channel[None, :]
        inside = (pixel < pixels)[:, None] & real[None, :]
        x = tl.load(source_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normed = (x - mean[None, :]) * weight[None, :] + bias[None, :]
        normed = tl.where(normed < 0.0, 0.0, normed)  # a maximum would turn NaN into 0, and hide it from the gate
        tl.store(out_ptr + at, normed.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _of_groups(of_channel, GROUPS: tl.constexpr, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each channel's sum over the channels of its group."""
    by_group = tl.sum(tl.reshape(of_channel, [GROUPS, PADDED]), axis=1)
    return tl.reshape(tl.broadcast_to(by_group[:, None], [GROUPS, PADDED]), [GROUPS * PADDED])


@torch.library.custom_op("funmatch::group_norm_relu", mutates_args=())
def group_norm_relu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float
) -> torch.Tensor:
    """relu(group_norm(x)): half [N, C, H, W] in channels_last; weight and bias float32 [C]."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    _launch(x, None, x, out, weight, bias, num_groups, eps)
    return out


@torch.library.custom_op("funmatch::add_group_norm_relu", mutates_args=())
def add_group_norm_relu(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + branch, and relu(group_norm(x + branch)): as group_norm_relu; x is left as it is."""
    x = x.contiguous(memory_format=torch.channels_last)
    branch = branch.contiguous(memory_format=torch.channels_last)
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(x, branch, total, out, weight, bias, num_groups, eps)
    return total, out


@group_norm_relu.register_fake
def _(x: torch.Tensor, _weight: torch.Tensor, _bias: torch.Tensor, _num_groups: int, _eps: float) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@add_group_norm_relu.register_fake
def _(
    x: torch.Tensor, _branch: torch.Tensor, _weight: torch.Tensor, _bias: torch.Tensor, _num_groups: int, _eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        torch.empty_like(x, memory_format=torch.channels_last),
    )


def _launch(
    x: torch.Tensor, branch: torch.Tensor | None, total: torch.Tensor, out: torch.Tensor,
    weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float,
) -> None:  # fmt: skip
    num_pictures, channels, height, width = x.shape
    pixels = height * width
    split = sizes(channels, num_groups, pixels, adds=branch is not None)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _add_norm_relu[(num_pictures * num_groups // split["GROUPS"],)](
            x, x if branch is None else branch, total, out, weight, bias, pixels, eps, **split, num_warps=WARPS
        )  # fmt: skip


def sizes(channels: int, num_groups: int, pixels: int, *, adds: bool) -> dict[str, int | bool]:
    """How the work is divided: the kernel's constants."""
    group = channels // num_groups
    padded = triton.next_power_of_2(group)
    groups = 1
    while num_groups % (2 * groups) == 0 and 2 * groups * padded <= _LANES:
        groups *= 2
    tile = min(triton.next_power_of_2(pixels), max(1, _ELEMENTS // (groups * padded)))
    return {"ADDS": adds, "CHANNELS": channels, "GROUP": group, "PADDED": padded, "GROUPS": groups, "TILE": tile}
