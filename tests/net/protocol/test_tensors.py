"""Tensors as arrays, JSON values and bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from codedinvnet.net.protocol.tensors import (
    DATATYPES,
    BadTensor,
    datatype_of,
    from_bytes,
    from_json,
    to_bytes,
    to_json,
)


@st.composite
def tensors(draw: st.DrawFn, texts: st.SearchStrategy[bytes], fewest: int = 1) -> np.ndarray:
    """Any array of any datatype, with these elements of BYTES, and at least so many an axis."""
    datatype = draw(st.sampled_from(list(DATATYPES)))
    shape = tuple(draw(st.lists(st.integers(fewest, 3), max_size=3)))
    values: st.SearchStrategy[Any] = texts
    if datatype != "BYTES":
        kind = DATATYPES[datatype]
        values = arrays_of.from_dtype(kind, allow_nan=False, allow_infinity=False)
    made = np.empty(math.prod(shape), DATATYPES[datatype])
    for i in range(len(made)):
        made[i] = draw(values)
    return made.reshape(shape)


def equal(one: np.ndarray, other: np.ndarray) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and to_bytes(one) == to_bytes(other)
    )


@settings(max_examples=200, deadline=None)
@given(array=tensors(st.binary(max_size=6)))
def test_arrays_survive_bytes_and_json(array: np.ndarray) -> None:
    datatype = datatype_of(array)
    assert equal(from_bytes(to_bytes(array), datatype, array.shape), array)
    try:
        flat = to_json(array)
    except BadTensor:
        assert datatype == "BYTES"
        return
    assert equal(from_json(flat, datatype, array.shape), array)


def test_nested_lists() -> None:
    found = from_json([[1, 2], [3, 4]], "INT16", (2, 2))
    assert found.dtype == np.int16
    assert found.tolist() == [[1, 2], [3, 4]]
    assert from_json(["", "ä"], "BYTES", (2,)).tolist() == [b"", b"\xc3\xa4"]


NO_BYTES: list[Any] = [256, -1, 5.0, True, None, "5", {}, 2**63, 10**400]
NO_FLOATS: list[Any] = [1e39, 10**400, math.inf, False, None, "1"]
BAD_JSON: list[tuple[list[Any], str, str]] = [
    ([1, 2, 3], "FP32", "has shape [3], not [2, 2]"),
    ([], "FP32", "has shape [0], not [2, 2]"),
    ([1] * 5, "FP32", "has 5 elements, more than shape [2, 2] has"),
    ([[1, 2, 3, 4]], "FP32", "has shape [1, 4], not [2, 2]"),
    ([[1, 2], [3]], "FP32", "its rows differ in length"),
    ([1, [2, 3], 4], "FP32", "its rows differ in length"),
    *[
        ([0, 0, 0, bad], "UINT8", "UINT8 values must be whole numbers in 0..255")
        for bad in NO_BYTES
    ],
    ([0, 0, 0, 2**63], "INT64", f"INT64 values must be whole numbers in {-(2**63)}..{2**63 - 1}"),
    *[
        ([0, 0, 0, bad], "FP32", "FP32 values must be numbers up to 3.40282e+38")
        for bad in NO_FLOATS
    ],
    ([0, 0, 0, 65536], "FP16", "FP16 values must be numbers up to 65504"),
    ([True, False, True, 1], "BOOL", "BOOL values must be true or false"),
    (["a", "b", "c", 1], "BYTES", "BYTES values must be strings"),
    (["a", "b", "c", "\ud800"], "BYTES", "BYTES values must be Unicode: surrogates not allowed"),
]


@pytest.mark.parametrize(("values", "datatype", "message"), BAD_JSON)
def test_json_that_is_no_such_tensor(values: list[Any], datatype: str, message: str) -> None:
    with pytest.raises(BadTensor) as caught:
        from_json(values, datatype, (2, 2))
    assert str(caught.value) == message


BAD_BYTES: list[tuple[bytes, str, str]] = [
    (bytes(7), "FP32", "has 7 bytes; shape and datatype make 8"),
    (bytes(9), "FP32", "has 9 bytes; shape and datatype make 8"),
    (b"\0\2", "BOOL", "BOOL values must be bytes of 0 or 1"),
    (b"", "BYTES", "has 0 elements of BYTES; its shape makes 2"),
    (b"\1\0\0\0a", "BYTES", "has 1 elements of BYTES; its shape makes 2"),
    (bytes(12), "BYTES", "has more than 2 elements of BYTES; its shape makes 2"),
    (bytes(4000), "BYTES", "has more than 2 elements of BYTES; its shape makes 2"),
    (b"\0\0\0\0\0\0", "BYTES", "element 1 of BYTES reaches beyond the data"),
    (b"\2\0\0\0a", "BYTES", "element 0 of BYTES reaches beyond the data"),
    (b"\xff\xff\xff\xffa", "BYTES", "element 0 of BYTES reaches beyond the data"),
]


@pytest.mark.parametrize(("data", "datatype", "message"), BAD_BYTES)
def test_bytes_that_are_no_such_tensor(data: bytes, datatype: str, message: str) -> None:
    with pytest.raises(BadTensor) as caught:
        from_bytes(data, datatype, (2,))
    assert str(caught.value) == message


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=20), datatype=st.sampled_from(list(DATATYPES)))
def test_random_bytes(data: bytes, datatype: str) -> None:
    try:
        found = from_bytes(data, datatype, (2,))
    except BadTensor:
        return
    assert to_bytes(found) == data


def test_what_json_cannot_carry() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(BadTensor, match="not finite, which JSON cannot carry"):
            to_json(np.array([0.0, bad], np.float32))
    with pytest.raises(BadTensor, match="no text, which JSON cannot carry"):
        to_json(from_bytes(b"\1\0\0\0\xff", "BYTES", (1,)))
    with pytest.raises(BadTensor, match="no datatype for numpy's complex64"):
        datatype_of(np.zeros(1, np.complex64))
