"""The Open Inference Protocol V2 over HTTP: requests to images, answers to responses.

With JSON tensors and the binary tensor extension, where the JSON part's length stands in a header
and the tensors' bytes follow it in the order of the inputs.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from codedinvnet.serving.frontend import Answered

INPUT, VERSION = "images", "1"
HEADER_LENGTH = "Inference-Header-Content-Length"
OUTPUTS = {"probabilities": "FP32", "label": "INT64", "outcome": "BYTES"}
DTYPES: dict[str, Any] = {"UINT8": np.dtype(np.uint8), "FP32": np.dtype("<f4")}
MICROSECONDS = 1e-6
LONGEST_SHOWN = 100
"""Characters of a client's value in a message."""
DEEPEST = 32
"""Levels of lists and objects in what an answer repeats."""
LONGEST = 1e12
"""Microseconds; a longer timeout is none."""
MOST_PARAMETERS = 64 * 1024
"""Characters of a request's parameters, which its answer repeats."""
JSON_VALUES = 1 << 18
"""Values that a request's JSON may have, or one image's: reading them holds the interpreter."""
VALUE_LENGTH = 24
"""Bytes of JSON for each of them, at most."""
OTHER_JSON = 1 << 14
"""Values, lists, objects and keys of a request beside its images."""


class BadRequest(Exception):
    """The request cannot be understood; the message names the field."""


class TooLarge(BadRequest):
    """Its body has more bytes than the server takes."""


Parameters = Annotated[
    dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)
]
"""null is as good as none."""


class _Part(BaseModel):
    """A part of a request; keys that we do not know are left to newer clients."""

    model_config = ConfigDict(extra="ignore", strict=True)


class InputTensor(_Part):
    """An input, its data here or behind the JSON part."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters = {}
    data: list[Any] | None = None


class RequestedOutput(_Part):
    """An output that the client wants."""

    name: str
    parameters: Parameters = {}


class InferBody(_Part):
    """The JSON part of an inference request."""

    id: str | None = None
    parameters: Parameters = {}
    inputs: list[InputTensor]
    outputs: list[RequestedOutput] | None = None


@dataclass(frozen=True)
class ModelDescription:
    """What the protocol needs to know of the model."""

    name: str
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    max_batch: int

    @property
    def json_values(self) -> int:
        """Values that the JSON part of a request may have."""
        return max(JSON_VALUES, math.prod(self.image_shape)) + OTHER_JSON

    @property
    def json_bytes(self) -> int:
        """Bytes that it may have."""
        return self.json_values * VALUE_LENGTH

    @property
    def json_lists(self) -> int:
        """Lists, objects and keys that it may have: rows of images, and others."""
        _, height, width = self.image_shape
        rows = self.json_values // width
        return 2 * rows + rows // height + OTHER_JSON


@dataclass(frozen=True)
class InferRequest:
    """A checked request."""

    images: np.ndarray
    """(B, C, H, W), uint8 or float32 in 0..1."""
    identity: str | None
    parameters: dict[str, Any]
    accept_decoded: bool
    timeout: float | None
    """Seconds."""
    outputs: tuple[tuple[str, bool], ...]
    """Name, and whether it is sent in binary."""


def decompress(body: bytes, encoding: str | None, limit: int) -> bytes:
    """Undo a request's Content-Encoding.

    Raises:
        BadRequest: if it is unknown, or the body is damaged.
        TooLarge: if it has more than `limit` bytes.
    """
    coding = (encoding or "identity").lower()
    if coding == "identity":
        return body
    if coding not in ("gzip", "deflate"):
        raise BadRequest(f"Content-Encoding: {encoding!r} is not supported (gzip, deflate)")
    decoder = zlib.decompressobj(wbits=47)  # gzip or zlib, by its header
    try:
        data = decoder.decompress(body, limit + 1)
    except zlib.error as error:
        raise BadRequest(f"body: not valid {coding}: {error}") from error
    if len(data) > limit:
        raise TooLarge(f"body: more than {limit} bytes when decompressed")
    if not decoder.eof:
        raise BadRequest(f"body: the {coding} data is cut short")
    if decoder.unused_data:
        raise BadRequest(f"body: {len(decoder.unused_data)} bytes follow the {coding} data")
    return data


def parse_request(body: bytes, header_length: str | None, model: ModelDescription) -> InferRequest:
    """Read an inference request.

    Args:
        body: decompressed.
        header_length: of the JSON part, if the header is there.
        model: what is served.

    Raises:
        BadRequest: if anything is wrong with it.
    """
    head, tail = split_body(body, header_length)
    parsed = parse_json(head, model)
    images = read_images(parsed.inputs[0], tail, model)
    accept = parsed.parameters.get("accept_decoded", True)
    if not isinstance(accept, bool):
        raise BadRequest(f"parameters.accept_decoded: must be true or false, got {short(accept)}")
    timeout = parsed.parameters.get("timeout")
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0
    ):
        raise BadRequest(f"parameters.timeout: must be microseconds above 0, got {short(timeout)}")
    check_depth(parsed.parameters)
    try:
        repeated = json.dumps(parsed.parameters, allow_nan=False)  # the answer repeats them
    except ValueError as error:
        raise BadRequest(f"parameters: {error}") from error
    if len(repeated) > MOST_PARAMETERS:
        raise BadRequest(f"parameters: more than {MOST_PARAMETERS} characters")
    return InferRequest(
        images=images,
        identity=parsed.id,
        parameters=parsed.parameters,
        accept_decoded=accept,
        timeout=None if timeout is None else min(timeout, LONGEST) * MICROSECONDS,
        outputs=wanted_outputs(parsed),
    )


def check_depth(parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that are nested so deeply that writing them again could fail.

    Raises:
        BadRequest: naming how deep they may be.
    """
    level: list[Any] = [parameters]
    for _ in range(DEEPEST):
        nested = [value for value in level if isinstance(value, dict | list)]
        level = [x for v in nested for x in (v.values() if isinstance(v, dict) else v)]
    if any(isinstance(value, dict | list) for value in level):
        raise BadRequest(f"parameters: nested more than {DEEPEST} deep")


def short(value: Any) -> str:
    """Return what a client sent, for a message: its beginning, if it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def split_body(body: bytes, header_length: str | None) -> tuple[memoryview, memoryview]:
    """Split a body, without copying it, into its JSON part and the binary data behind it."""
    view = memoryview(body)
    if header_length is None:
        return view, view[:0]
    digits = header_length.isascii() and header_length.isdigit()
    if not digits or len(header_length) > 18:
        raise BadRequest(f"{HEADER_LENGTH}: must be a number, got {short(header_length)}")
    length = int(header_length)
    if length > len(body):
        raise BadRequest(f"{HEADER_LENGTH}: {length} is more than the body's {len(body)} bytes")
    return view[:length], view[length:]


def parse_json(part: memoryview, model: ModelDescription) -> InferBody:
    """Read the JSON part, which has one input."""
    if len(part) > model.json_bytes:
        raise TooLarge(f"body: more than {model.json_bytes} bytes of JSON; send binary tensors")
    head = bytes(part)
    check_counts(head, model)
    try:
        raw = pydantic_core.from_json(head, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise BadRequest(f"body: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BadRequest("body: must be a JSON object")
    check_lengths(raw, model)
    try:
        return InferBody.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadRequest(f"{where}: {first['msg']}") from error


def check_counts(head: bytes, model: ModelDescription) -> None:
    """Refuse JSON that takes long to read, by what can be counted before anything is built.

    Raises:
        TooLarge: naming the bound.
    """
    bounds = (
        (head.count(b","), model.json_values, "values"),
        (sum(map(head.count, (b"[", b"{", b":"))), model.json_lists, "lists, objects and keys"),
    )
    for found, most, name in bounds:
        if found > most:
            raise TooLarge(f"body: more than {most} {name} of JSON; send binary tensors")


def check_lengths(raw: Mapping[str, Any], model: ModelDescription) -> None:
    """Refuse long lists before each of their elements can become an error of its own.

    Raises:
        BadRequest: naming the list.
    """
    inputs, outputs = raw.get("inputs"), raw.get("outputs")
    if isinstance(inputs, list):
        if len(inputs) != 1:
            raise BadRequest(f"inputs: the model takes one input, {INPUT!r}; got {len(inputs)}")
        shape = inputs[0].get("shape") if isinstance(inputs[0], dict) else None
        if isinstance(shape, list) and len(shape) > 4:
            raise wrong_shape(shape, model)
    if isinstance(outputs, list) and len(outputs) > len(OUTPUTS):
        raise BadRequest(f"outputs: the model has {len(OUTPUTS)}, got {len(outputs)}")


def wrong_shape(shape: Sequence[Any], model: ModelDescription) -> BadRequest:
    """Return the error of an input whose shape is not that of images."""
    dims = ", ".join(map(str, model.image_shape))
    shown = short(list(shape[: LONGEST_SHOWN // 2]))  # enough to be cut off, and no more
    return BadRequest(f"inputs.0.shape: must be [B, {dims}] with B >= 1, got {shown}")


def read_images(tensor: InputTensor, tail: memoryview, model: ModelDescription) -> np.ndarray:
    """Return the images of an input (B, C, H, W), checked."""
    if tensor.name != INPUT:
        raise BadRequest(f"inputs.0.name: must be {INPUT!r}, got {short(tensor.name)}")
    if tensor.datatype not in DTYPES:
        raise BadRequest(f"inputs.0.datatype: must be UINT8 or FP32, got {short(tensor.datatype)}")
    shape, wanted = tuple(tensor.shape), model.image_shape
    if len(shape) != 4 or shape[1:] != wanted or shape[0] < 1:
        raise wrong_shape(shape, model)
    if shape[0] > model.max_batch:
        raise BadRequest(f"inputs.0.shape: at most {model.max_batch} images, got {shape[0]}")
    dtype = DTYPES[tensor.datatype]
    size = tensor.parameters.get("binary_data_size")
    if "shared_memory_region" in tensor.parameters:
        raise BadRequest("inputs.0.parameters: shared memory is not supported")
    if size is None:
        if tail:
            raise BadRequest(
                f"body: {len(tail)} bytes follow the JSON part, but no input has "
                "parameters.binary_data_size"
            )
        images = from_json(tensor, dtype, shape)
    else:
        expected = math.prod(shape) * dtype.itemsize
        if size != expected:
            raise BadRequest(
                f"inputs.0.parameters.binary_data_size: {short(size)}, but shape and datatype make "
                f"{expected}"
            )
        if tensor.data is not None:
            raise BadRequest("inputs.0.data: there is binary data already")
        if len(tail) != expected:
            raise BadRequest(
                f"body: {len(tail)} bytes follow the JSON part; binary_data_size says {expected}"
            )
        images = np.frombuffer(tail, dtype).astype(dtype.newbyteorder("=")).reshape(shape)
        if dtype == DTYPES["FP32"] and not bool(((images >= 0) & (images <= 1)).all()):
            raise BadRequest("inputs.0.data: FP32 values must lie in 0..1, without NaN")
    return images


def from_json(tensor: InputTensor, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return an input's JSON data, flat or nested, as an array."""
    if tensor.data is None:
        raise BadRequest("inputs.0.data: missing, and there is no binary data")
    count = math.prod(shape)
    if len(tensor.data) > count:
        raise BadRequest(
            f"inputs.0.data: has {len(tensor.data)} elements, but inputs.0.shape is {list(shape)}"
        )
    values = np.asarray(tensor.data, object)  # of strings, numpy would make each the longest's size
    kinds = set(map(type, values.ravel()))
    if list in kinds:
        raise BadRequest("inputs.0.data: its rows differ in length")
    if values.size != count or (values.ndim > 1 and values.shape != shape):
        raise BadRequest(
            f"inputs.0.data: has shape {list(values.shape)}, but inputs.0.shape is {list(shape)}"
        )
    if dtype == DTYPES["UINT8"]:
        if kinds != {int} or values.min() < 0 or values.max() > 255:
            raise BadRequest("inputs.0.data: UINT8 values must be whole numbers in 0..255")
    elif not kinds <= {int, float} or values.min() < 0 or values.max() > 1:
        raise BadRequest("inputs.0.data: FP32 values must be numbers in 0..1")
    return values.astype(dtype.newbyteorder("=")).reshape(shape)


def wanted_outputs(parsed: InferBody) -> tuple[tuple[str, bool], ...]:
    """Return the names of the outputs to send, and which of them in binary."""
    default = parsed.parameters.get("binary_data_output", False)
    if not isinstance(default, bool):
        raise BadRequest("parameters.binary_data_output: must be true or false")
    if not parsed.outputs:
        return tuple((name, default) for name in OUTPUTS)
    wanted: list[tuple[str, bool]] = []
    for i, output in enumerate(parsed.outputs):
        if output.name in (name for name, _ in wanted):
            raise BadRequest(f"outputs.{i}.name: {output.name!r} is asked for twice")
        if output.name not in OUTPUTS:
            names = ", ".join(OUTPUTS)
            raise BadRequest(f"outputs.{i}.name: {short(output.name)} is not one of {names}")
        binary = output.parameters.get("binary_data", default)
        if not isinstance(binary, bool):
            raise BadRequest(f"outputs.{i}.parameters.binary_data: must be true or false")
        if output.parameters.get("classification") or "shared_memory_region" in output.parameters:
            raise BadRequest(
                f"outputs.{i}.parameters: classification and shared memory are not supported"
            )
        wanted.append((output.name, binary))
    return tuple(wanted)


def render_response(
    request: InferRequest, answers: Sequence[Answered], model: ModelDescription
) -> tuple[bytes, int | None]:
    """Return a response's body, and the length of its JSON part if binary data follows."""
    values: dict[str, np.ndarray | list[str]] = {
        "probabilities": np.stack([answer.probabilities for answer in answers]),
        "label": np.array([int(answer.probabilities.argmax()) for answer in answers], np.int64),
        "outcome": [answer.outcome for answer in answers],
    }
    outputs, blobs = [], []
    for name, binary in request.outputs:
        value = values[name]
        shape = list(value.shape) if isinstance(value, np.ndarray) else [len(value)]
        entry: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": shape}
        if binary:
            blob = value.tobytes() if isinstance(value, np.ndarray) else pack_strings(value)
            entry["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            entry["data"] = value.ravel().tolist() if isinstance(value, np.ndarray) else value
        outputs.append(entry)
    reply: dict[str, Any] = {"model_name": model.name, "model_version": VERSION}
    if request.identity is not None:
        reply["id"] = request.identity
    if request.parameters:
        reply["parameters"] = request.parameters
    head = pydantic_core.to_json({**reply, "outputs": outputs}, inf_nan_mode="null")
    return b"".join([head, *blobs]), len(head) if blobs else None


def pack_strings(strings: Sequence[str]) -> bytes:
    """Return BYTES elements in binary: a 4-byte little-endian length before each."""
    parts = [s.encode() for s in strings]
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def server_metadata(version: str) -> dict[str, Any]:
    """Return what GET /v2 says."""
    return {"name": "codedinvnet", "version": version, "extensions": ["binary_tensor_data"]}


def model_metadata(model: ModelDescription) -> dict[str, Any]:
    """Return what GET /v2/models/NAME says."""
    shapes = {"probabilities": [-1, len(model.classes)], "label": [-1], "outcome": [-1]}
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": "codedinvnet_pytorch",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, *model.image_shape]}],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": shapes[name]}
            for name, datatype in OUTPUTS.items()
        ],
    }
