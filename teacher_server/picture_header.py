"""What a picture file says of its own size, from its header alone: a bomb is refused before a decoder opens it.

A lossless WebP of 5 kB may unfold to 500 MB, and so may a PNG; a JPEG of 100 kB may hold ten thousand scans, each a
pass over all of its pixels. Decoders believe such a file, and some believe the second header where the first looks
harmless (measured: a PNG whose first header says 20 x 20 pixels and whose second says 12,000 x 12,000 cost DALI
1.1 GB). So this reads every header that a decoder could come across, takes the largest, and refuses what is odd: a
header said twice, animations, blocks that do not follow each other.

Only the three formats that the wire promises are known here: JPEG, PNG, WebP. DALI would decode TIFF, BMP, JPEG 2000
and PNM as well, each with its own way to lie.

Not here: whether the rest decodes (views/render.py), limits (pictures.py).

Rejected: Pillow, lazily. 30 us a picture where this takes 3 to 6, and it reads one header, not all of them. Rejected:
DALI's peek_image_shape, one more run of a graph, and it too believes the first header.
"""

from __future__ import annotations

import struct

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"

_MAX_BLOCKS = 10_000  # segments of a JPEG, chunks of a PNG or WebP; a PNG of 64 Mpx in chunks of 8 kB has fewer
_MAX_SCANS = 100  # of a JPEG; encoders make about ten


class HeaderError(ValueError):
    """The file is none of the three formats, or its header is damaged or odd; the message says which."""


def claimed_size(picture: bytes) -> tuple[int, int]:
    """The largest (height, width) in pixels that a header of this file claims, as stored: before any EXIF rotation.

    Raises:
        HeaderError: it is no JPEG, PNG or WebP, or a header that no encoder writes.
    """
    try:
        if picture.startswith(_JPEG):
            return _jpeg(picture)
        if picture.startswith(_PNG):
            return _png(picture)
        if picture[:4] == b"RIFF" and picture[8:12] == b"WEBP":
            return _webp(picture)
    except (struct.error, IndexError):
        raise HeaderError("the file ends inside its header") from None
    raise HeaderError("it is no JPEG, PNG or WebP file")


def _jpeg(picture: bytes) -> tuple[int, int]:
    """From the frame header (SOF) before the first scan (SOS): ITU-T T.81, annex B."""
    size: tuple[int, int] | None = None
    frame = num_components = 0
    place = 2
    for _ in range(_MAX_BLOCKS):
        start, marker = picture[place], picture[place + 1]
        if start == marker == 0xFF:  # padding
            place += 1
            continue
        if start != 0xFF or marker == 0 or 0xD0 <= marker <= 0xD9:
            raise HeaderError(f"the JPEG's segments do not follow each other (at byte {place})")
        length: int = struct.unpack_from(">H", picture, place + 2)[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if size is not None:
                raise HeaderError("the JPEG says its size twice")
            size = struct.unpack_from(">HH", picture, place + 5)
            frame, num_components = marker, picture[place + 9]
        if marker == 0xDA:
            break
        place += 2 + length
    else:
        raise HeaderError(f"the JPEG has more than {_MAX_BLOCKS} segments before its pixels")
    if size is None or 0 in size:
        raise HeaderError("the JPEG does not say its size")
    # One scan with all components is all that a sequential JPEG of one scan can have.
    in_one_scan = frame in (0xC0, 0xC1) and picture[place + 4] == num_components
    if not in_one_scan and (scans := picture.count(b"\xff\xda", place)) > _MAX_SCANS:
        raise HeaderError(f"the JPEG has {scans} scans, and each is a pass over all pixels; {_MAX_SCANS} are allowed")
    return size


def _png(picture: bytes) -> tuple[int, int]:
    """From IHDR, the first chunk of all; every other chunk is passed, to see that there is no second."""
    if picture[12:16] != b"IHDR":
        raise HeaderError("the PNG does not begin with its size")
    width, height = struct.unpack_from(">II", picture, 16)
    place = 33
    for _ in range(_MAX_BLOCKS):
        length, kind = struct.unpack_from(">I4s", picture, place)
        if kind == b"IHDR":
            raise HeaderError("the PNG says its size twice")
        if kind == b"acTL":
            raise HeaderError("the PNG is an animation; a picture is wanted")
        place += 12 + length
        if kind == b"IEND" or place >= len(picture):  # a file that is cut short is the decoder's to find
            return height, width
    raise HeaderError(f"the PNG has more than {_MAX_BLOCKS} chunks")


def _webp(picture: bytes) -> tuple[int, int]:
    """From the bitstream (VP8 or VP8L), and from the canvas (VP8X) where there is one: RFC 9649."""
    canvas = 0, 0
    place = 12
    for _ in range(_MAX_BLOCKS):
        kind, length = struct.unpack_from("<4sI", picture, place)
        body = place + 8
        if kind == b"VP8X":
            if picture[body] & 2:
                raise HeaderError("the WebP is an animation; a picture is wanted")
            width, height = (1 + int.from_bytes(picture[at : at + 3], "little") for at in (body + 4, body + 7))
            canvas = height, width
        elif kind == b"VP8 ":
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", picture, body + 6))
            return max(canvas, (height, width), key=_area)
        elif kind == b"VP8L":
            bits: int = struct.unpack_from("<I", picture, body + 1)[0]
            return max(canvas, (1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)), key=_area)
        elif kind in (b"ANIM", b"ANMF"):
            raise HeaderError("the WebP is an animation; a picture is wanted")
        place = body + length + length % 2
    raise HeaderError(f"the WebP has more than {_MAX_BLOCKS} chunks before its pixels")


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
