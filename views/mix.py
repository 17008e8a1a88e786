"""From uint8 views to the network's input: scaling, mixup and normalisation, in one function for both sides.

Mixing is done in float32 on the 0..1 scale, before mean and std: the mixed picture is then the same number on
both sides whatever each network's normalisation, and nothing is rounded to uint8 again.

On the CPU the cost is memory traffic, so a few rows at a time go through all operations while they are in the cache,
and are changed in place. Rejected: one multiplication and one addition with folded constants, which is quicker still
and gives other bits than the reference's order of operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ROWS_IN_CACHE = 4  # of 224 x 224 pixels: 2.4 MB with the partners


def mix(
    pixels: torch.Tensor,
    partner: torch.Tensor,
    lam: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """Rows of a batch as a network sees them.

    Args:
        pixels: uint8 [V, S, S, 3], rendered views.
        partner: int64 [R], position of each row's mixup partner among the views.
        lam: float32 [R], weight of the row's own view.
        mean: per channel, on the 0..1 scale.
        std: per channel, on the 0..1 scale.

    Returns:
        float32 [R, 3, S, S] in channels_last memory, on the device of pixels.
    """
    device, num_rows = pixels.device, len(lam)
    views = pixels.flatten(2)  # [V, S, S * 3]: long rows of numbers, where [.., 3] would be short loops of three
    partner, weight = partner.to(device), lam.to(device).reshape(-1, 1, 1)
    shift, scale = (
        torch.tensor(constant, dtype=torch.float32, device=device).repeat(pixels.shape[2]) for constant in (mean, std)
    )
    mixed = torch.empty((num_rows, *views.shape[1:]), dtype=torch.float32, device=device)
    step = _ROWS_IN_CACHE if device.type == "cpu" else max(1, num_rows)
    for start in range(0, num_rows, step):
        part = slice(start, start + step)
        own, own_weight = mixed[part], weight[part]
        own.copy_(views[start : start + len(own)]).div_(255)
        other = views[partner[part]].to(torch.float32).div_(255)
        own.mul_(own_weight).add_(other.mul_(1 - own_weight)).sub_(shift).div_(scale)
    return mixed.reshape(num_rows, *pixels.shape[1:]).permute(0, 3, 1, 2)
