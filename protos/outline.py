"""How many things a serialised message holds, counted before it is parsed.

Parsing can cost sixteen times the bytes that were sent: an empty picture takes two on the wire and an entry in a list
in memory (measured: a request of 64 MB that named 32 million empty pictures took 1.0 GB). The number of bytes of a
message is bounded by gRPC; this bounds the number of things in it, for what a walk over them costs, 0.4 us each.

Not here: whether they mean anything (views/wire.py).

Rejected: a smaller bound on the bytes. Honest messages are large because pictures are, and have few parts.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # the wire types of proto3


def check_outline(message: bytes, kind: type[Message], max_things: int) -> None:
    """Walk over a message's fields, and over those of messages within it.

    Args:
        message: as it came.
        kind: what it should be.
        max_things: fields, elements of repeated fields and numbers of packed ones, all together.

    Raises:
        ValueError: there are more, or it is no such message.
    """
    left = max_things
    todo: list[tuple[int, int, Any]] = [(0, len(message), kind.DESCRIPTOR)]
    try:
        while todo:
            place, end, within = todo.pop()
            fields = within.fields_by_number
            while place < end:
                left -= 1
                tag = message[place]
                place += 1
                if tag >= 0x80:
                    tag, place = _varint(message, place - 1)
                wire, known = tag & 7, fields.get(tag >> 3)
                length = 0
                if wire == _VARINT:
                    _, place = _varint(message, place)
                elif wire == _BYTES:
                    length = message[place]
                    place += 1
                    if length >= 0x80:
                        length, place = _varint(message, place - 1)
                elif wire in (_FIXED32, _FIXED64):
                    length = 4 if wire == _FIXED32 else 8
                else:
                    raise ValueError(f"wire type {wire} at byte {place}")
                if place + length > end:
                    raise IndexError
                if wire == _BYTES and known is not None:
                    if known.message_type is not None:
                        todo.append((place, place + length, known.message_type))
                    elif known.type not in (FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_STRING):
                        left -= length  # packed numbers, each of a byte or more
                if left < 0:
                    raise ValueError(f"it has more than {max_things} parts")
                place += length
    except IndexError:
        raise ValueError("it ends too early") from None


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """The number that begins here, and where the next thing begins."""
    number = shift = 0
    while True:
        byte = message[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
        shift += 7
        if shift >= 70:
            raise ValueError("a number has more than ten bytes")
