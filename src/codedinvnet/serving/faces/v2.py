"""The Open Inference Protocol V2 over HTTP: bodies to requests, responses to bodies.

With JSON tensors and the binary tensor extension, where the JSON part's length stands in a header
and the tensors' bytes follow it in the order of the inputs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from codedinvnet.models.base import DATATYPES, HEADER_LENGTH, TensorSpec
from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.faces.parameters import check_repeated, unknown
from codedinvnet.serving.served import Served
from codedinvnet.serving.service import Request, Response, output_specs
from codedinvnet.serving.tensors import BadTensor, from_bytes, from_json, to_bytes, to_json

VERSION = "1"
OUTCOME_HEADER = "codedinvnet-outcome"
"""Says how an answer came about, where the face tells it beside the answer."""
MICROSECONDS = 1e-6
LONGEST_SHOWN = 100
"""Characters of a client's value in a message."""
LONGEST = 1e12
"""Microseconds; a longer timeout is none."""
JSON_VALUES = 1 << 18
"""Values that a request's JSON may have, or one query's: reading them holds the interpreter."""
VALUE_LENGTH, TEXT_LENGTH = 24, 4096
"""Bytes of JSON for each of them, at most: of a number, and of a text."""
OTHER_JSON = 1 << 14
"""Values, lists, objects and keys of a request beside its tensors."""


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
    parameters: Parameters = Field(default_factory=dict)
    data: list[Any] | None = None


class RequestedOutput(_Part):
    """An output that the client wants."""

    name: str
    parameters: Parameters = Field(default_factory=dict)


class InferBody(_Part):
    """The JSON part of an inference request."""

    id: str | None = None
    parameters: Parameters = Field(default_factory=dict)
    inputs: list[InputTensor]
    outputs: list[RequestedOutput] | None = None


def json_values(served: Served) -> int:
    """Return how many values the JSON part of a request may have."""
    query = sum(math.prod(spec.shape) for spec in served.signature.inputs)
    return max(JSON_VALUES, query) + OTHER_JSON


def json_bytes(served: Served) -> int:
    """Return how many bytes it may have."""
    texts = any(spec.datatype == "BYTES" for spec in served.signature.inputs)
    return json_values(served) * (TEXT_LENGTH if texts else VALUE_LENGTH)


def json_lists(served: Served) -> int:
    """Return how many lists, objects and keys it may have: rows of tensors, and others."""
    shares = [
        sum(math.prod(spec.shape[:axis]) for axis in range(len(spec.shape)))
        / max(1, math.prod(spec.shape))
        for spec in served.signature.inputs
    ]
    return int(json_values(served) * max(shares)) + OTHER_JSON


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


def parse_request(
    body: bytes, header_length: str | None, served: Served, max_batch: int
) -> Request:
    """Read an inference request.

    Args:
        body: decompressed.
        header_length: of the JSON part, if the header is there.
        served: the model.
        max_batch: queries of one request, at most.

    Raises:
        BadRequest: if anything is wrong with it; the message begins with the field.
    """
    head, tail = split_body(body, header_length)
    parsed = parse_json(head, served)
    inputs = read_inputs(parsed.inputs, tail, served, max_batch)
    accept = parsed.parameters.get("accept_decoded", True)
    if not isinstance(accept, bool):
        raise BadRequest(f"parameters.accept_decoded: must be true or false, got {short(accept)}")
    timeout = parsed.parameters.get("timeout")
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0
    ):
        raise BadRequest(f"parameters.timeout: must be microseconds above 0, got {short(timeout)}")
    limit = parsed.parameters.get("max_disagreement")
    if limit is not None and (
        isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < 1
    ):
        raise BadRequest(
            f"parameters.max_disagreement: must lie between 0 and 1, got {short(limit)}"
        )
    check_repeated(parsed.parameters)
    tensors = (*parsed.inputs, *(parsed.outputs or ()))
    return Request(
        inputs=inputs,
        identity=parsed.id,
        parameters=parsed.parameters,
        accept_decoded=accept,
        timeout=None if timeout is None else min(timeout, LONGEST) * MICROSECONDS,
        outputs=wanted_outputs(parsed, served),
        max_disagreement=limit,
        unknown=unknown(parsed.parameters, (tensor.parameters for tensor in tensors)),
    )


def short(value: Any) -> str:
    """Return what a client sent, for a message: its beginning, if it is long."""
    if isinstance(value, str | bytes):
        value = value[:LONGEST_SHOWN]  # with its quotes it is still too long, if it was
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


def parse_json(part: memoryview, served: Served) -> InferBody:
    """Read the JSON part."""
    most = json_bytes(served)
    if len(part) > most:
        raise TooLarge(f"body: more than {most} bytes of JSON; send binary tensors")
    head = bytes(part)
    check_counts(head, served)
    try:
        raw = pydantic_core.from_json(head, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise BadRequest(f"body: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BadRequest("body: must be a JSON object")
    check_lengths(raw, served)
    try:
        return InferBody.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadRequest(f"{where}: {first['msg']}") from error


def check_counts(head: bytes, served: Served) -> None:
    """Refuse JSON that takes long to read, by what can be counted before anything is built.

    Raises:
        TooLarge: naming the bound.
    """
    bounds = (
        (head.count(b","), json_values(served), "values"),
        (sum(map(head.count, (b"[", b"{", b":"))), json_lists(served), "lists, objects and keys"),
    )
    for found, most, name in bounds:
        if found > most:
            raise TooLarge(f"body: more than {most} {name} of JSON; send binary tensors")


def check_lengths(raw: Mapping[str, Any], served: Served) -> None:
    """Refuse long lists before each of their elements can become an error of its own.

    Raises:
        BadRequest: naming the list.
    """
    inputs, outputs = raw.get("inputs"), raw.get("outputs")
    specs = served.signature.inputs
    if isinstance(inputs, list):
        if len(inputs) != len(specs):
            names = ", ".join(repr(spec.name) for spec in specs)
            raise BadRequest(f"inputs: the model takes {len(specs)} ({names}), got {len(inputs)}")
        most = 1 + max(len(spec.shape) for spec in specs)
        for i, tensor in enumerate(inputs):
            shape = tensor.get("shape") if isinstance(tensor, dict) else None
            if isinstance(shape, list) and len(shape) > most:
                shown = short(shape[: LONGEST_SHOWN // 2])  # enough to be cut off, and no more
                raise BadRequest(f"inputs.{i}.shape: at most {most} numbers, got {shown}")
    known = len(output_specs(served.signature))
    if isinstance(outputs, list) and len(outputs) > known:
        raise BadRequest(f"outputs: the model has {known}, got {len(outputs)}")


def read_inputs(
    tensors: Sequence[InputTensor], tail: memoryview, served: Served, max_batch: int
) -> dict[str, np.ndarray]:
    """Return the inputs (B, *shape), checked, in the model's order.

    Raises:
        BadRequest: if one is not the model's, or their batches differ.
    """
    specs = {spec.name: spec for spec in served.signature.inputs}
    found: dict[str, np.ndarray] = {}
    rest = tail
    for i, tensor in enumerate(tensors):
        where = f"inputs.{i}"
        spec = specs.get(tensor.name)
        if spec is None:
            names = ", ".join(map(repr, specs))
            raise BadRequest(f"{where}.name: must be {names}, got {short(tensor.name)}")
        if tensor.name in found:
            raise BadRequest(f"{where}.name: {tensor.name!r} is there twice")
        check_tensor(where, tensor, spec, served, max_batch)
        if tensor.shape[0] != tensors[0].shape[0]:
            raise BadRequest(
                f"{where}.shape: {tensor.name!r} has {tensor.shape[0]} queries, "
                f"{tensors[0].name!r} has {tensors[0].shape[0]}"
            )
        size = binary_size(where, tensor)
        try:
            values, rest = read_values(where, tensor, size, rest)
        except BadTensor as error:
            raise BadRequest(f"{where}.data: {error}") from error
        if why := served.incompatibility(spec, values):
            raise BadRequest(f"{where}.data: {why}")
        found[tensor.name] = values
    if rest:
        told = [t for t in tensors if "binary_data_size" in t.parameters]
        why = "more than the inputs' binary_data_size" if told else "no input has binary_data_size"
        raise BadRequest(f"body: {len(tail)} bytes follow the JSON part, but {why}")
    return {name: found[name] for name in specs}


def check_tensor(
    where: str, tensor: InputTensor, spec: TensorSpec, served: Served, max_batch: int
) -> None:
    """Refuse an input whose datatype or shape is not the model's."""
    datatypes = served.datatypes(spec)
    if tensor.datatype not in datatypes:
        known = " or ".join(datatypes)
        raise BadRequest(
            f"{where}.datatype: {spec.name!r} must be {known}, got {short(tensor.datatype)}"
        )
    shape = tuple(tensor.shape)
    if shape[1:] != spec.shape or len(shape) == 0 or shape[0] < 1:
        dims = ", ".join(map(str, ("B", *spec.shape)))
        raise BadRequest(
            f"{where}.shape: {spec.name!r} must be [{dims}] with B >= 1, got {short(tensor.shape)}"
        )
    if shape[0] > max_batch:
        raise BadRequest(f"{where}.shape: at most {max_batch} queries, got {shape[0]}")
    if "shared_memory_region" in tensor.parameters:
        raise BadRequest(f"{where}.parameters: shared memory is not supported")


def binary_size(where: str, tensor: InputTensor) -> int | None:
    """Return how many of the bytes behind the JSON part are an input's; None if it is in JSON."""
    if "binary_data_size" not in tensor.parameters:
        if tensor.data is None:
            raise BadRequest(f"{where}.data: missing, and there is no binary data")
        return None
    size = tensor.parameters["binary_data_size"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise BadRequest(
            f"{where}.parameters.binary_data_size: must be a number of bytes, got {short(size)}"
        )
    expected = math.prod(tensor.shape) * DATATYPES[tensor.datatype].itemsize
    if tensor.datatype != "BYTES" and size != expected:
        raise BadRequest(
            f"{where}.parameters.binary_data_size: {short(size)}, but shape and datatype make "
            f"{expected}"
        )
    if tensor.data is not None:
        raise BadRequest(f"{where}.data: there is binary data already")
    return size


def read_values(
    where: str, tensor: InputTensor, size: int | None, rest: memoryview
) -> tuple[np.ndarray, memoryview]:
    """Return an input's values, and the bytes that are those of inputs behind it."""
    shape = tuple(tensor.shape)
    if size is None:
        assert tensor.data is not None
        return from_json(tensor.data, tensor.datatype, shape), rest
    if size > len(rest):
        raise BadRequest(
            f"body: {len(rest)} bytes are left for {where}; its binary_data_size says {short(size)}"
        )
    return from_bytes(rest[:size], tensor.datatype, shape), rest[size:]


def wanted_outputs(parsed: InferBody, served: Served) -> tuple[tuple[str, bool], ...]:
    """Return the names of the outputs to send, and which of them in binary."""
    default = parsed.parameters.get("binary_data_output", False)
    if not isinstance(default, bool):
        raise BadRequest("parameters.binary_data_output: must be true or false")
    known = [spec.name for spec in output_specs(served.signature)]
    if not parsed.outputs:
        return tuple((name, default) for name in known)
    wanted: dict[str, bool] = {}
    for i, output in enumerate(parsed.outputs):
        if output.name not in known:
            names = ", ".join(known)
            raise BadRequest(f"outputs.{i}.name: {short(output.name)} is not one of {names}")
        if output.name in wanted:
            raise BadRequest(f"outputs.{i}.name: {output.name!r} is asked for twice")
        binary = output.parameters.get("binary_data", default)
        if not isinstance(binary, bool):
            raise BadRequest(f"outputs.{i}.parameters.binary_data: must be true or false")
        if output.parameters.get("classification") or "shared_memory_region" in output.parameters:
            raise BadRequest(
                f"outputs.{i}.parameters: classification and shared memory are not supported"
            )
        wanted[output.name] = binary
    return tuple(wanted.items())


def render_response(
    request: Request, response: Response, served: Served, version: str = VERSION
) -> tuple[bytes, int | None]:
    """Return a response's body, and the length of its JSON part if binary data follows.

    Args:
        request: says which outputs are wanted, and how.
        response: has them.
        served: the model.
        version: of the model; "" is not told.

    Raises:
        BadRequest: if JSON cannot carry an output's values.
    """
    datatypes = {spec.name: spec.datatype for spec in output_specs(served.signature)}
    outputs, blobs = [], []
    for name, binary in request.outputs:
        value = response.outputs[name]
        entry: dict[str, Any] = {
            "name": name,
            "datatype": datatypes[name],
            "shape": list(value.shape),
        }
        if binary:
            blob = to_bytes(value)
            entry["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            try:
                entry["data"] = to_json(value)
            except BadTensor as error:
                raise BadRequest(f"outputs: {name!r}: {error}: ask for binary_data") from error
        outputs.append(entry)
    reply: dict[str, Any] = {"model_name": served.name}
    if version:
        reply["model_version"] = version
    if request.identity is not None:
        reply["id"] = request.identity
    if parameters := {**request.parameters, **response.parameters}:
        reply["parameters"] = parameters
    head = pydantic_core.to_json({**reply, "outputs": outputs})
    return b"".join([head, *blobs]), len(head) if blobs else None


def server_metadata(version: str) -> dict[str, Any]:
    """Return what GET /v2 says."""
    return {"name": "codedinvnet", "version": version, "extensions": ["binary_tensor_data"]}


def model_metadata(served: Served) -> dict[str, Any]:
    """Return what GET /v2/models/NAME says."""
    signature = served.signature

    def described(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
        return [
            {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.shape]}
            for spec in specs
        ]

    return {
        "name": served.name,
        "versions": [VERSION],
        "platform": signature.platform,
        "inputs": described(signature.inputs),
        "outputs": described(output_specs(signature)),
    }
