"""The wire format of protocol buffers, as far as a SentencePiece model needs it.

    data = field(1, b"text") + field(3, 2)
    list(read_fields(data))                 # [(1, b"text"), (3, 2)]

A message is a sequence of fields: number and kind, then the value. Text and messages in messages
are bytes after their length.
"""

from collections.abc import Iterator
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # kinds of values
SIZES = {FIXED64: 8, FIXED32: 4}


def field(number: int, value: int | bytes) -> bytes:
    """A field: an int as a varint, bytes after their length."""
    if isinstance(value, int):
        return varint(number << 3 | VARINT) + varint(value)
    return varint(number << 3 | BYTES) + varint(len(value)) + value


def varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first; the eighth bit means that more bytes follow."""
    data = b""
    while value > 127:
        data, value = data + bytes([value & 127 | 128]), value >> 7
    return data + bytes([value])


def read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of every field of a message; numbers of fixed size as bytes."""
    place = 0
    while place < len(data):
        key, place = read_varint(data, place)
        value, place = read_varint(data, place) if key & 7 in (VARINT, BYTES) else (0, place)
        if key & 7 == VARINT:
            yield key >> 3, value
            continue
        size = SIZES.get(key & 7, value)
        yield key >> 3, data[place : place + size]
        place += size


def read_varint(data: bytes, place: int) -> tuple[int, int]:
    """(the number that begins at `place`, the place after it)."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
