"""The slow, obvious renderer: Pillow decodes, numpy interpolates in float64. What views/render.py must equal."""

import io

import numpy as np
from PIL import Image, ImageOps


def decode(picture: np.ndarray) -> np.ndarray:
    """RGB uint8 [H, W, 3] as a viewer shows the file."""
    with Image.open(io.BytesIO(picture.tobytes())) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def linear_taps(num_in: int, num_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each output pixel the two inputs it lies between and how far; borders repeat."""
    centre = np.clip((np.arange(num_out) + 0.5) * num_in / num_out - 0.5, 0, num_in - 1)
    low = np.floor(centre).astype(int)
    return low, np.minimum(low + 1, num_in - 1), centre - low


def render(picture: np.ndarray, box, size: int, flip: bool) -> np.ndarray:
    """Crop, bilinear without antialias, truncate to uint8, mirror: uint8 [size, size, 3]."""
    y, x, h, w = (int(v) for v in box)
    crop = decode(picture)[y : y + h, x : x + w].astype(np.float64)
    low, high, part = linear_taps(h, size)
    rows = crop[low] * (1 - part)[:, None, None] + crop[high] * part[:, None, None]
    low, high, part = linear_taps(w, size)
    both = rows[:, low] * (1 - part)[None, :, None] + rows[:, high] * part[None, :, None]
    view = np.floor(both + 2.0**-10).astype(np.uint8)  # the margin: see views/render.py
    return view[:, ::-1] if flip else view
