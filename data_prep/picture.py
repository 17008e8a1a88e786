"""One encoded picture -> the JPEG that goes into a shard: what a viewer would see, upright, RGB or grey.

A plain upright RGB or grey JPEG is kept byte for byte. Anything else (CMYK, EXIF-rotated, PNG behind the
name .jpg, palette, transparency, 16 bits, ...) is encoded anew: RGB, quality 95, no chroma subsampling, no
EXIF, so that no later decoder has to agree with ours on what the picture is.

Decoding is strict: a picture that does not decode to its last line is `Undecodable`. One truncated JPEG in
a batch stops the loader's whole DALI pipeline, so it must be found here.

Not here: colour management. Embedded profiles are ignored, as they are by every training pipeline we know.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

JPEG_QUALITY = 95
# Nothing beyond these is tried: Pillow's other plugins include one that starts a PostScript interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_UPRIGHT = 1


class Undecodable(ValueError):  # noqa: N818  (reads as what it says: `except Undecodable`)
    """The bytes are not a picture that decodes to its end; the message says what the decoder said."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded picture and the size it has when looked at."""

    encoded: bytes
    height: int
    width: int


def as_viewed(encoded: bytes, short_side: int | None = None) -> Picture:
    """The picture as upright RGB or grey JPEG; byte for byte the same where it is one already.

    Args:
        encoded: contents of a picture file, of any of FORMATS whatever its name says.
        short_side: shrink to this short side, in pixels, pictures that are larger; none is ever enlarged.

    Raises:
        Undecodable: it is none of FORMATS, broken, truncated, or too large to be honest.
    """
    with _decoding(), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        orientation = _orientation(image)
        target = _target_size(image.size, short_side)
        plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and orientation == _UPRIGHT
        if plain and target == image.size:
            image.load()
            return Picture(encoded, image.height, image.width)
        if target != image.size:
            # Lets libjpeg decode a large JPEG at a half, quarter or eighth, still twice the target or more.
            image.draft(None, (2 * target[0], 2 * target[1]))
        viewed = _rgb(image)
        if target != viewed.size:
            viewed = viewed.resize(target, Image.Resampling.LANCZOS, reducing_gap=3.0)
        return _encode(_upright(viewed, orientation))


def size_as_viewed(encoded: bytes) -> tuple[int, int]:
    """Decode to the end and return (height, width) of the upright picture.

    Raises:
        Undecodable: as for `as_viewed`.
    """
    with _decoding(), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        orientation = _orientation(image)
        image.load()
        width, height = image.size
    return (width, height) if orientation in _TURNS_ON_ITS_SIDE else (height, width)


def show(encoded: bytes) -> Image.Image:
    """The picture as an upright RGB image, for people to look at."""
    with _decoding(), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        return _upright(_rgb(image), _orientation(image))


class _decoding:  # noqa: N801  (a context manager that reads as a verb)
    """Whatever a decoder says about broken bytes becomes Undecodable; its warnings are not for our user."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        # Pillow warns of large pictures (up to twice its limit) and of EXIF or palettes it had to guess.
        warnings.simplefilter("ignore")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._warnings.__exit__(None, None, None)
        if isinstance(error, MemoryError) or not isinstance(error, Exception):
            return
        if isinstance(error, UnidentifiedImageError):
            raise Undecodable(f"it is not a picture of any of {', '.join(FORMATS)}") from None
        # Not only OSError: broken headers surface as SyntaxError, struct.error, ZeroDivisionError, ...
        raise Undecodable(" ".join(str(error).split()) or type(error).__name__) from error


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNS_ON_ITS_SIDE = (5, 6, 7, 8)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 is upright. 0: there is one, but it cannot be read, so viewers show it as it is."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT))
    except Exception:  # broken EXIF makes Pillow raise all kinds; 0 has the picture re-encoded without it
        return 0


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _target_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """(width, height) with the short side at most `short_side`, same aspect."""
    if short_side is None or min(size) <= short_side:
        return size
    width, height = (max(1, round(side * short_side / min(size))) for side in size)
    return width, height


def _rgb(image: Image.Image) -> Image.Image:
    """The first frame as opaque RGB: 16-bit grey scaled to 8, transparency laid over white paper."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed white")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _encode(image: Image.Image) -> Picture:
    buffer = io.BytesIO()
    image.info = {}  # Pillow would carry comments and profiles over
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return Picture(buffer.getvalue(), image.height, image.width)
