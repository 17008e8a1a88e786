"""From uint8 views to the network's input: scaling, mixup and normalisation, in one function for both sides.

Mixing is done in float32 on the 0..1 scale, before mean and std: the mixed picture is then the same number on
both sides whatever each network's normalisation, and nothing is rounded to uint8 again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
    scaled = pixels.to(torch.float32) / 255
    weight = lam.to(pixels.device).reshape(-1, 1, 1, 1)
    own = scaled[: len(lam)]
    mixed = weight * own + (1 - weight) * scaled[partner.to(pixels.device)]
    shift = torch.tensor(mean, dtype=torch.float32, device=pixels.device)
    scale = torch.tensor(std, dtype=torch.float32, device=pixels.device)
    return ((mixed - shift) / scale).permute(0, 3, 1, 2)
