"""Tensors as numpy arrays, as JSON values, as the protocol's bytes, and as a worker's messages.

The datatypes are those of the Open Inference Protocol V2. Bytes are little-endian, in row-major
order. Each element of BYTES has its length before it, in four bytes.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from codedinvnet.models.base import DATATYPE_OF, DATATYPES

LENGTH = struct.Struct("<I")
"""The number of bytes of what follows."""
ALIGNMENT = 64
"""Each array of a message begins at a multiple of so many bytes."""


class BadTensor(Exception):
    """The values are not those of such a tensor; the message says why."""


def datatype_of(array: np.ndarray) -> str:
    """Return the protocol's name of an array's type.

    Raises:
        BadTensor: if it has none.
    """
    name = DATATYPE_OF.get(array.dtype)
    if name is None:
        raise BadTensor(f"the protocol has no datatype for numpy's {array.dtype}")
    return name


# JSON


def from_json(values: Sequence[Any], datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return JSON values, flat or nested, as an array.

    Raises:
        BadTensor: if they are not as many as the shape has, or not of the datatype.
    """
    count = math.prod(shape)
    if len(values) > count:
        raise BadTensor(f"has {len(values)} elements, more than shape {list(shape)} has")
    found = np.asarray(values, object)  # of strings, numpy would make each the longest's size
    kinds = set(map(type, found.ravel()))
    if list in kinds:
        raise BadTensor("its rows differ in length")
    if found.size != count or (found.ndim > 1 and found.shape != shape):
        raise BadTensor(f"has shape {list(found.shape)}, not {list(shape)}")
    return _converted(found, kinds, datatype).reshape(shape)


def _converted(found: np.ndarray, kinds: set[type], datatype: str) -> np.ndarray:
    dtype = DATATYPES[datatype]
    if datatype == "BYTES":
        if not kinds <= {str}:
            raise BadTensor("BYTES values must be strings")
        try:
            encoded = [text.encode() for text in found.ravel()]
        except UnicodeEncodeError as error:
            raise BadTensor(f"BYTES values must be Unicode: {error.reason}") from error
        return _objects(encoded)
    if datatype == "BOOL":
        if not kinds <= {bool}:
            raise BadTensor("BOOL values must be true or false")
    elif np.issubdtype(dtype, np.integer):
        bounds = np.iinfo(str(dtype))
        sound = kinds <= {int} and (
            not found.size or (found.min() >= bounds.min and found.max() <= bounds.max)
        )
        if not sound:
            raise BadTensor(
                f"{datatype} values must be whole numbers in {bounds.min}..{bounds.max}"
            )
    else:
        return _floats(found, kinds, datatype)
    return found.astype(dtype)


def _floats(found: np.ndarray, kinds: set[type], datatype: str) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):
            array = found.astype(DATATYPES[datatype]) if kinds <= {int, float} else None
    except OverflowError:
        array = None
    if array is None or not np.isfinite(array).all():
        largest = np.finfo(str(DATATYPES[datatype])).max
        raise BadTensor(f"{datatype} values must be numbers up to {largest:.6g}")
    return array


def to_json(array: np.ndarray) -> list[Any]:
    """Return an array's elements as JSON has them, flat.

    Raises:
        BadTensor: if JSON has no such values.
    """
    if array.dtype == object:
        try:
            return [element.decode() for element in array.ravel()]
        except UnicodeDecodeError as error:
            raise BadTensor("it has bytes that are no text, which JSON cannot carry") from error
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise BadTensor("it has values that are not finite, which JSON cannot carry")
    found: list[Any] = array.ravel().tolist()
    return found


# Bytes


def from_bytes(
    data: bytes | bytearray | memoryview, datatype: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Return the array that these bytes are.

    Raises:
        BadTensor: if they are not as many as shape and datatype need, or not of the datatype.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _unpacked(bytes(data), count).reshape(shape)
    dtype = DATATYPES[datatype]
    if len(data) != count * dtype.itemsize:
        raise BadTensor(f"has {len(data)} bytes; shape and datatype make {count * dtype.itemsize}")
    if datatype == "BOOL" and count and max(data) > 1:
        raise BadTensor("BOOL values must be bytes of 0 or 1")
    found = np.frombuffer(data, dtype.newbyteorder("<"))
    return found.astype(dtype).reshape(shape)


def _unpacked(data: bytes, count: int) -> np.ndarray:
    elements: list[bytes] = []
    place = 0
    while place < len(data) and len(elements) <= count:
        end = place + LENGTH.size
        if end <= len(data):
            end += LENGTH.unpack_from(data, place)[0]
        if end > len(data) or end < place + LENGTH.size:
            raise BadTensor(f"element {len(elements)} of BYTES reaches beyond the data")
        elements.append(data[place + LENGTH.size : end])
        place = end
    if len(elements) != count:
        told = f"more than {count}" if len(elements) > count else str(len(elements))
        raise BadTensor(f"has {told} elements of BYTES; its shape makes {count}")
    return _objects(elements)


def to_bytes(array: np.ndarray) -> bytes:
    """Return an array's elements as the protocol's bytes."""
    if array.dtype == object:
        return b"".join(LENGTH.pack(len(element)) + element for element in array.ravel())
    if sys.byteorder == "big":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes()


def _objects(elements: Sequence[bytes]) -> np.ndarray:
    """Return elements as an array of one axis; numpy itself would pad them to one length."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


# Messages between the front end and a worker


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return named arrays as a message: what they are, as JSON, and their bytes."""
    described, pieces = [], []
    for name, array in arrays.items():
        data = to_bytes(array)
        described.append((name, datatype_of(array), array.shape, len(data)))
        pieces += [data, bytes(-len(data) % ALIGNMENT)]
    return b"".join([_head(tuple(described)), *pieces])


def unpack(message: bytearray) -> dict[str, np.ndarray]:
    """Return the arrays of a message; they are views of it where they can be."""
    view = memoryview(message)
    start = LENGTH.size + LENGTH.unpack_from(view)[0]
    arrays = {}
    for name, datatype, shape, size in _described(bytes(view[LENGTH.size : start])):
        data = view[start : start + size]
        start += size + -size % ALIGNMENT
        if datatype == "BYTES" or sys.byteorder == "big":
            arrays[name] = from_bytes(data, datatype, shape)
        else:
            arrays[name] = np.frombuffer(data, DATATYPES[datatype]).reshape(shape)
    return arrays


_Described: TypeAlias = "tuple[tuple[str, str, tuple[int, ...], int], ...]"
"""The name, datatype and shape of each array, and how many bytes it has."""


@lru_cache(256)  # of one model there are few
def _head(described: _Described) -> bytes:
    head = json.dumps(described, separators=(",", ":")).encode()
    head += b" " * (-(len(head) + LENGTH.size) % ALIGNMENT)
    return LENGTH.pack(len(head)) + head


@lru_cache(256)
def _described(head: bytes) -> _Described:
    return tuple((name, kind, tuple(shape), size) for name, kind, shape, size in json.loads(head))
