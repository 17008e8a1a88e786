"""Pictures for tests: smooth (so that JPEG costs little) and awkward in every way the wild has shown us."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image


def smooth(seed: int, height: int = 60, width: int = 80) -> NDArray[np.uint8]:
    """[height, width, 3] uint8: colour blobs, different for each seed and each direction."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The image as a file's contents; JPEG at quality 95 unless told otherwise."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} | options if kind == "JPEG" else options))
    return buffer.getvalue()


def jpeg(seed: int, height: int = 60, width: int = 80, **options: object) -> bytes:
    """A plain RGB JPEG."""
    return encode(Image.fromarray(smooth(seed, height, width)), **options)


def rotated(orientation: int, seed: int = 0) -> bytes:
    """A JPEG whose EXIF says that it lies on its side, or on its head, or is mirrored."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(Image.fromarray(smooth(seed)), exif=exif)


def plain_pictures() -> dict[str, bytes]:
    """File name -> contents of JPEGs that are what they seem and are kept byte for byte."""
    image = Image.fromarray(smooth(1))
    return {
        "baseline.jpg": encode(image),
        "fine_chroma.jpg": encode(image, subsampling=0),
        "grey.jpg": encode(image.convert("L")),
        "progressive.jpg": encode(image, progressive=True),
        "rgb_inside.jpg": encode(image, keep_rgb=True),
        "trailing_junk.jpg": encode(image) + b"junk" * 10,
        "two_in_one.jpg": encode(image, "MPO", save_all=True, append_images=[image.rotate(90)]),
        "upright_exif.jpg": rotated(1),
    }


def awkward_pictures() -> dict[str, bytes]:
    """File name -> contents of pictures whose plain bytes would mislead some decoder."""
    image = Image.fromarray(smooth(2))
    alpha = Image.fromarray(smooth(3)[..., 0])
    transparent = image.copy()
    transparent.putalpha(alpha)
    grey16 = Image.fromarray(smooth(4)[..., 0].astype(np.uint16) * 257)
    return {
        **{f"rotated_{orientation}.jpg": rotated(orientation) for orientation in range(2, 9)},
        "cmyk.jpg": encode(image.convert("CMYK")),
        "png_named.jpg": encode(image, "PNG"),
        "palette.png": encode(image.quantize(16), "PNG"),
        "bilevel.png": encode(image.convert("1"), "PNG"),
        "transparent.png": encode(transparent, "PNG"),
        "grey_16_bit.png": encode(grey16, "PNG"),
        "animation.gif": encode(image, "GIF", save_all=True, append_images=[image.rotate(180)]),
        "lossless.webp": encode(image, "WEBP", lossless=True),
        "bitmap.bmp": encode(image, "BMP"),
        "tiff_named.jpeg": encode(image, "TIFF"),
    }


def broken_pictures() -> dict[str, bytes]:
    """File name -> contents that no decoder gets to the end of."""
    whole = jpeg(5)
    return {
        "cut_in_half.jpg": whole[: len(whole) // 2],
        "cut_progressive.jpg": jpeg(5, progressive=True)[:-300],
        "empty.jpg": b"",
        "html.jpg": b"<html>404 Not Found</html>",
        "header_only.png": encode(Image.fromarray(smooth(5)), "PNG")[:60],
    }


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files below a folder, which is returned."""
    for name, contents in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents)
    return folder
