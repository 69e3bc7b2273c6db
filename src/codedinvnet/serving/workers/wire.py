"""Arrays as messages between the front end and a worker."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from codedinvnet.protocol.tensors import DATATYPES, LENGTH, datatype_of, from_bytes, to_bytes

ALIGNMENT = 64
"""Each array of a message begins at a multiple of so many bytes."""


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
