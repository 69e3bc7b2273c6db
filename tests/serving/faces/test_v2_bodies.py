"""Bodies of the protocol V2: compressed, in two parts, and what takes too long to read."""

from __future__ import annotations

import gzip
import json
import math
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.faces.v2 import (
    JSON_VALUES,
    InferBody,
    TooLarge,
    decompress,
    json_bytes,
    parse_request,
    render_response,
    split_body,
)
from codedinvnet.serving.served import Classifier
from tests.serving.faces.requests import (
    MODEL,
    PIXELS,
    answered,
    at_most,
    binary,
    body,
    parse,
    tensor,
)


@pytest.mark.parametrize("encoding", [None, "", "identity", "Identity"])
def test_a_plain_body_is_left_alone(encoding: str | None) -> None:
    assert decompress(b"abc", encoding, 3) == b"abc"


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("GZIP", gzip.compress), ("deflate", zlib.compress)],
)
def test_compressed_bodies(encoding: str, compress: Callable[[bytes], bytes]) -> None:
    data = b"0123456789" * 100
    packed = compress(data)
    assert decompress(packed, encoding, 1000) == data
    assert decompress(compress(b""), encoding, 0) == b""
    with pytest.raises(BadRequest, match=r"^body: more than 999 bytes when decompressed$"):
        decompress(packed, encoding, 999)
    with pytest.raises(BadRequest, match=rf"^body: the {encoding.lower()} data is cut short$"):
        decompress(packed[:-1], encoding, 1000)
    with pytest.raises(BadRequest, match=rf"^body: the {encoding.lower()} data is cut short$"):
        decompress(b"", encoding, 1000)
    with pytest.raises(BadRequest, match=rf"^body: 3 bytes follow the {encoding.lower()} data$"):
        decompress(packed + b"abc", encoding, 1000)


def test_a_small_bomb_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    with at_most(1_000_000), pytest.raises(BadRequest, match="more than 1000 bytes"):
        decompress(bomb, "gzip", 1000)


@pytest.mark.parametrize("damaged", [b"hello", gzip.compress(b"hello", mtime=0)[:-8] + bytes(8)])
def test_damaged_gzip(damaged: bytes) -> None:
    with pytest.raises(BadRequest, match=r"^body: not valid gzip: "):
        decompress(damaged, "gzip", 1000)


def test_an_unknown_encoding() -> None:
    with pytest.raises(BadRequest, match=r"^Content-Encoding: 'br' is not supported"):
        decompress(b"abc", "br", 1000)


def test_long_strings_do_not_fill_the_memory() -> None:
    """As a numpy array of strings, these would take 2 GB."""
    model = Classifier("mnist", (1, 50, 100), ("cat",))
    data = ["x" * 100_000] + [""] * 4999
    made = body(tensor(shape=[1, 1, 50, 100], data=data))
    with at_most(50_000_000), pytest.raises(BadRequest, match="UINT8 values must be whole"):
        parse_request(made, None, model, 1)


def test_more_values_than_the_shape_are_refused_before_they_are_copied() -> None:
    with pytest.raises(BadRequest, match=r"has 7 elements, more than shape \[1, 1, 2, 3\] has"):
        parse(body(tensor(data=[0] * 7)))


def test_deep_nesting() -> None:
    data: list[Any] = [1]
    for _ in range(100):
        data = [data]
    with pytest.raises(BadRequest, match=r"^inputs\.0\.data: "):
        parse(body(tensor(data=data)))


@pytest.mark.parametrize("size", [5, 7, "6", None, -6, [6], 6.5])
def test_a_binary_size_that_disagrees_with_the_shape(size: Any) -> None:
    pixels = np.zeros((1, 1, 2, 3), np.uint8)
    data, header = binary(pixels, datatype="UINT8", parameters={"binary_data_size": size})
    with pytest.raises(BadRequest, match="binary_data_size"):
        parse(data, header)


def test_binary_data_that_disagrees_with_its_size() -> None:
    data, header = binary(np.zeros((1, 1, 2, 3), np.uint8), datatype="UINT8")
    for wrong in (data[:-1], data + b"\0"):
        with pytest.raises(BadRequest, match=r"^body: \d bytes (follow|are left for) "):
            parse(wrong, header)


def test_bytes_that_nobody_asked_for() -> None:
    head = body()
    with pytest.raises(BadRequest, match=r"^body: 4 bytes follow the JSON part, but no input has"):
        parse(head + b"abcd", str(len(head)))
    with pytest.raises(BadRequest, match=r"^body: not valid JSON"):
        parse(head + b"abcd")


@pytest.mark.parametrize("header", ["-1", "", "x", "1.0", " 3", "²", "9" * 30, "9" * 5000])
def test_bad_header_lengths(header: str) -> None:
    with pytest.raises(BadRequest, match=r"^Inference-Header-Content-Length: must be a number"):
        split_body(b"abc", header)


def test_split_body() -> None:
    for header, parts in ((None, [b"abc", b""]), ("2", [b"ab", b"c"]), ("3", [b"abc", b""])):
        assert list(map(bytes, split_body(b"abc", header))) == parts
    with pytest.raises(BadRequest, match="4 is more than the body's 3 bytes"):
        split_body(b"abc", "4")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "body: not valid JSON"),
        (b"{", "body: not valid JSON"),
        (b"\xff\xfe\xfd", "body: not valid JSON"),
        (b"[" * 10_000, "body: not valid JSON"),
        (b"9" * 5000, "body: not valid JSON"),
        (b'{"inputs": [NaN]}', "body: not valid JSON"),
        (b'{"id": "\\ud800"}', "body: not valid JSON"),
        (b"[]", "body: must be a JSON object"),
        (b"{}", "inputs: Field required"),
        (b'{"inputs": {}}', "inputs: "),
        (b'{"inputs": [3]}', "inputs.0: "),
        (b'{"inputs": []}', "inputs: the model takes 1 ('images'), got 0"),
        (body(inputs=[tensor(), tensor()]), "inputs: the model takes 1 ('images'), got 2"),
        (body(id=3), "id: "),
        (body(parameters=3), "parameters: "),
        (body(outputs=3), "outputs: "),
        (body(outputs=[{}]), "outputs.0.name: Field required"),
    ],
)
def test_bad_json(data: bytes, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(data)
    assert str(caught.value).startswith(message)


LONG_SHAPE = "inputs.0.shape: at most 4 numbers, got "


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            json.dumps({"inputs": [0] * 1000}).encode(),
            "inputs: the model takes 1 ('images'), got 1000",
        ),
        (body(outputs=[0] * 1000), "outputs: the model has 3, got 1000"),
        (body(tensor(shape=[1, 1, 1, 2, 3])), LONG_SHAPE + "[1, 1, 1, 2, 3]"),
        (body(tensor(shape=["x"] * 1000)), LONG_SHAPE + "['x', 'x'"),
    ],
    ids=["inputs", "outputs", "shape", "long shape"],
)
def test_long_lists_are_refused_before_each_element_is_an_error(
    data: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InferBody, "model_validate", None)
    with pytest.raises(BadRequest) as caught:
        parse(data)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 300


def test_a_large_image_is_read_as_json() -> None:
    """Its lists, of one image as of many small ones, are within the bounds."""
    for shape in ((3, 600, 600), (5, 3, 4)):
        model = Classifier("m", shape, ("a",))
        count = max(1, JSON_VALUES // math.prod(shape))
        pixels = np.zeros((count, *shape), int).tolist()
        made = body(tensor(shape=[count, *shape], data=pixels, datatype="FP32"), id="x,[:" * 1000)
        found = parse_request(made, None, model, count)
        assert found.inputs["images"].shape == (count, *shape)


@pytest.mark.parametrize(
    "unit",
    [
        b"[],",
        b"[[[]]],",
        b"{},",
        b'{"a":{}},',
        b"0,",
        b'"a":0,',
        b'"' + b"x" * 50 + b'",',
        b"," * 9,
    ],
)
def test_json_that_takes_long_to_read_is_not_read(unit: bytes) -> None:
    """25 MB come of 49 KB of gzip; read, they stop the event loop for seconds."""
    bomb = b'{"inputs": [' + unit * (25_000_000 // len(unit)) + b"0]}"
    began = time.process_time()
    with at_most(1_000_000), pytest.raises(TooLarge, match=r"^body: more than"):
        parse(bomb)
    smaller = bomb[: json_bytes(MODEL) - 10] + b"0]}"
    with at_most(60_000_000), pytest.raises(BadRequest):
        parse(smaller)
    assert time.process_time() - began < 1


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda part: (
        st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=3), part, max_size=3)
    ),
    max_leaves=8,
)


def or_anything(*good: Any) -> st.SearchStrategy[Any]:
    """Draw something good most of the time."""
    return st.integers(0, 9).flatmap(lambda n: JSON if n == 9 else st.sampled_from(good))


TENSORS = st.fixed_dictionaries(
    {
        "name": or_anything("images"),
        "shape": or_anything([1, 1, 2, 3], [2, 1, 2, 3]),
        "datatype": or_anything("UINT8", "FP32"),
        "data": or_anything(PIXELS, [0, 0, 1, 1, 0, 1], [0, 1, None, 2, [], "a"]),
    },
    optional={
        "parameters": or_anything({}, {"binary_data_size": 6}),
    },
)


BODIES = st.fixed_dictionaries(
    {"inputs": st.lists(TENSORS, min_size=1, max_size=1)},
    optional={
        "id": or_anything("q"),
        "parameters": st.fixed_dictionaries(
            {},
            optional={
                "accept_decoded": or_anything(True, False),
                "timeout": or_anything(5),
                "binary_data_output": or_anything(True, False),
            },
        ),
        "outputs": or_anything([{"name": "label"}])
        | st.lists(st.fixed_dictionaries({"name": or_anything("label"), "parameters": JSON})),
    },
)


def is_answered(data: bytes, header: str | None) -> bool:
    """Tell whether a request is answered; nothing but `BadRequest` may be raised."""
    try:
        request = parse(data, header)
    except BadRequest:
        return False
    images = request.inputs["images"]
    assert images.shape[1:] == MODEL.image_shape
    assert images.dtype in (np.uint8, np.float32)
    rendered, head = render_response(request, answered(len(images)), MODEL)

    def no_constant(name: str) -> float:
        raise AssertionError(name)

    json.loads(rendered[:head], parse_constant=no_constant)
    return True


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), header=st.none() | st.text(max_size=4) | st.just("2"))
def test_random_bytes_are_refused(data: bytes, header: str | None) -> None:
    with pytest.raises(BadRequest):
        parse(data, header)


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=60),
    encoding=st.none() | st.sampled_from(["gzip", "deflate", "br", ""]) | st.text(max_size=4),
    packed=st.booleans(),
    cut=st.integers(0, 5),
)
def test_random_compressed_bytes(data: bytes, encoding: str | None, packed: bool, cut: int) -> None:
    sent = gzip.compress(data) if packed else data
    try:
        found = decompress(sent[: len(sent) - cut], encoding, 40)
    except BadRequest:
        return
    assert found in (data, sent[: len(sent) - cut])


def test_almost_right_requests() -> None:
    answers = []

    @settings(max_examples=300, deadline=None)
    @given(made=BODIES, tail=st.just(b"") | st.binary(max_size=7), whole=st.booleans())
    def tried(made: dict[str, Any], tail: bytes, whole: bool) -> None:
        head = json.dumps(made).encode()
        sent = (head, None) if whole else (head + tail, str(len(head)))
        answers.append(is_answered(*sent))

    tried()
    assert len(answers) > sum(answers) > 3  # most draws have one mistake or several
