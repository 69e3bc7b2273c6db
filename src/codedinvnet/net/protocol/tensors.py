"""Tensors as numpy arrays, as JSON values and as bytes.

Bytes are little-endian, in row-major order. Each element of BYTES has its length in front of it, in
four bytes.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

DATATYPES: Mapping[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(object),
}
"""Datatypes of the protocol, and numpy's; elements of BYTES are `bytes`."""
DATATYPE_OF: Mapping[np.dtype[np.generic], str] = {own: name for name, own in DATATYPES.items()}
LENGTH = struct.Struct("<I")
"""The number of bytes of an element of BYTES."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a model takes or returns.

    Attributes:
        name: the model's own name of it.
        datatype: one of DATATYPES.
        shape: the shape of one query, without the batch axis, which comes first.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


class BadTensor(ValueError):
    """The values do not make such a tensor; the message says why."""


def datatype_of(array: np.ndarray) -> str:
    """Return the protocol's name of an array's type.

    Raises:
        BadTensor: if it has none.
    """
    name = DATATYPE_OF.get(array.dtype)
    if name is None:
        raise BadTensor(f"the protocol has no datatype for numpy's {array.dtype}")
    return name


def size_of(array: np.ndarray) -> int:
    """Return how many bytes an array's values take."""
    return sum(map(len, array.ravel())) if array.dtype == object else array.nbytes


def from_json(values: Sequence[Any], datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Convert JSON values, flat or nested, to an array.

    Raises:
        BadTensor: if their number does not fit the shape, or they are not of the datatype.
    """
    count = math.prod(shape)
    if len(values) > count:
        raise BadTensor(f"has {len(values)} elements, more than shape {list(shape)} has")
    flat, found = values, [len(values)]
    while flat and type(flat[0]) is list:
        lengths = {len(row) if type(row) is list else -1 for row in flat}
        if len(lengths) > 1:
            raise BadTensor("its rows differ in length")
        found.append(lengths.pop())
        if math.prod(found) > count:
            raise BadTensor(f"has shape {found}, not {list(shape)}")
        flat = list(chain.from_iterable(flat))
    kinds = set(map(type, flat))
    if list in kinds:
        raise BadTensor("its rows differ in length")
    if len(flat) != count or (len(found) > 1 and tuple(found) != shape):
        raise BadTensor(f"has shape {found}, not {list(shape)}")
    return _converted(flat, kinds, datatype).reshape(shape)


def _converted(flat: Sequence[Any], kinds: set[type], datatype: str) -> np.ndarray:
    dtype = DATATYPES[datatype]
    if datatype == "BYTES":
        if not kinds <= {str}:
            raise BadTensor("BYTES values must be strings")
        try:
            return _objects([text.encode() for text in flat])
        except UnicodeEncodeError as error:
            raise BadTensor(f"BYTES values must be Unicode: {error.reason}") from error
    if datatype == "BOOL":
        if not kinds <= {bool}:
            raise BadTensor("BOOL values must be true or false")
        return np.array(flat, dtype)
    if np.issubdtype(dtype, np.integer):
        low, high = int(np.iinfo(str(dtype)).min), int(np.iinfo(str(dtype)).max)
        if not kinds <= {int} or (flat and not low <= min(flat) <= max(flat) <= high):
            raise BadTensor(f"{datatype} values must be whole numbers in {low}..{high}")
        return np.array(flat, dtype)
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, np.float64).astype(dtype) if kinds <= {int, float} else None
    except OverflowError:
        array = None
    if array is None or not np.isfinite(array).all():
        raise BadTensor(f"{datatype} values must be numbers up to {np.finfo(str(dtype)).max:.6g}")
    return array


def to_json(array: np.ndarray) -> list[Any]:
    """Convert an array's elements to JSON values, flat.

    Raises:
        BadTensor: if JSON has no such values.
    """
    if array.dtype == object:
        try:
            return [element.decode() for element in array.ravel()]
        except UnicodeDecodeError as error:
            raise BadTensor("it has bytes that are no text, which JSON cannot carry") from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadTensor("it has values that are not finite, which JSON cannot carry")
    found: list[Any] = array.ravel().tolist()
    return found


def from_bytes(
    data: bytes | bytearray | memoryview, datatype: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Convert bytes to an array, which is a view of them where it can be.

    Raises:
        BadTensor: if their number does not fit shape and datatype, or they are not of the datatype.
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
    return (found if sys.byteorder == "little" else found.astype(dtype)).reshape(shape)


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
        number = f"more than {count}" if len(elements) > count else str(len(elements))
        raise BadTensor(f"has {number} elements of BYTES; its shape makes {count}")
    return _objects(elements)


def to_bytes(array: np.ndarray) -> bytes:
    """Convert an array's elements to the protocol's bytes."""
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
