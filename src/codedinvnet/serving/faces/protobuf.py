"""Fields of serialized protobuf messages, found without parsing what is in them."""

from __future__ import annotations

from collections.abc import Iterator


def fields(message: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each field of a message, and where its content begins and ends.

    Raises:
        ValueError: if that is no message, or one with a field that says no length.
    """
    place = 0
    while place < len(message):
        tag, place = varint(message, place)
        if tag & 7 != 2:
            raise ValueError("it is no such message: a field has no length")
        size, place = varint(message, place)
        if place + size > len(message):
            raise ValueError("it is cut short")
        yield tag >> 3, place, place + size
        place += size


def varint(message: bytes, place: int) -> tuple[int, int]:
    """Return the number at a place of a message, and the place behind it.

    Raises:
        ValueError: if there is none.
    """
    value = shift = 0
    while shift < 64:
        if place >= len(message):
            raise ValueError("it is cut short")
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise ValueError("a number has more than 64 bits")
