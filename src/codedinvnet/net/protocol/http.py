"""Requests and responses as bodies of HTTP: JSON, with binary tensors behind it.

A header says how long the JSON part is where binary tensors follow, in the order of the tensors.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import pydantic_core

from codedinvnet.net.protocol.messages import (
    HEADER_LENGTH,
    Check,
    Head,
    InferRequest,
    InferResponse,
    InputTensor,
    Limits,
    ProtocolError,
    RequestedOutput,
    TooLarge,
    check_parameters,
    short,
)
from codedinvnet.net.protocol.tensors import DATATYPES, BadTensor, datatype_of, to_bytes, to_json

SIZE, BINARY, ALL_BINARY = "binary_data_size", "binary_data", "binary_data_output"
MOST_TENSORS, MOST_AXES = 1024, 32
ANY = Limits()


class Body(NamedTuple):
    """The body of a message."""

    data: bytes
    header_length: int | None
    """The length of the JSON part; None if it is all."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers that describe it."""
        if self.header_length is None:
            return {"Content-Type": "application/json"}
        length = {HEADER_LENGTH: str(self.header_length)}
        return {"Content-Type": "application/octet-stream", **length}


def inflated(data: bytes, coding: str, limit: int) -> bytes:
    """Decompress a body, gzip or zlib by its header.

    Raises:
        TooLarge: if it has more than `limit` bytes then; no more of it are decompressed.
        ProtocolError: if it is damaged, cut short, or followed by something else.
    """
    decoder = zlib.decompressobj(wbits=47)
    try:
        found = decoder.decompress(data, limit + 1)
    except zlib.error as error:
        raise ProtocolError(f"body: not valid {coding}: {error}") from error
    if len(found) > limit:
        raise TooLarge(f"body: more than {limit} bytes when decompressed")
    if not decoder.eof:
        raise ProtocolError(f"body: the {coding} data is cut short")
    if rest := len(decoder.unused_data):
        raise ProtocolError(f"body: {rest} bytes follow the {coding} data")
    return found


def parse_request(
    body: bytes,
    header_length: str | None = None,
    encoding: str | None = None,
    limits: Limits = ANY,
    check: Check | None = None,
) -> InferRequest:
    """Read an inference request.

    Args:
        body: as it came.
        header_length: the header's value; None without it.
        encoding: the Content-Encoding; None without one.
        limits: what is taken.
        check: see `Check`.

    Raises:
        ProtocolError: if anything is wrong with it; the message begins with the field.
    """
    coding = (encoding or "identity").lower()
    if coding not in ("identity", "gzip", "deflate"):
        raise ProtocolError(f"Content-Encoding: {short(encoding)} is not supported (gzip, deflate)")
    length = _length(header_length)
    if coding != "identity":
        body = inflated(body, coding, limits.head if length is None else limits.body)
    view = memoryview(body)
    if length is not None and length > len(view):
        raise ProtocolError(f"{HEADER_LENGTH}: {length} is more than the body's {len(view)}")
    head = parse_head(view[:length], limits, length is not None, check)
    tail = view[len(view) if length is None else length :]
    if head.tail != len(tail):
        what = "bytes follow the JSON part, but its binary_data_size say"
        raise ProtocolError(f"body: {len(tail)} {what} {head.tail}")
    return _with_tail(head, tail).request()


def _length(header: str | None) -> int | None:
    if header is None:
        return None
    if not (header.isascii() and header.isdigit()) or len(header) > 18:
        raise ProtocolError(f"{HEADER_LENGTH}: must be a number, got {short(header)}")
    return int(header)


def _with_tail(head: Head, tail: memoryview) -> Head:
    """Give each tensor its bytes."""
    tensors, place = [], 0
    for tensor in head.inputs:
        if tensor.data is None:
            tensors.append(tensor._replace(data=tail[place : place + tensor.size]))
            place += tensor.size
        else:
            tensors.append(tensor)
    return Head(tuple(tensors), head.id, head.parameters, head.outputs, head.binary)


def parse_head(
    part: bytes | memoryview,
    limits: Limits = ANY,
    binary: bool = True,
    check: Check | None = None,
) -> Head:
    """Read the JSON part of a request.

    Args:
        part: its bytes.
        limits: what is taken.
        binary: whether tensors' bytes may follow.
        check: see `Check`.

    Raises:
        ProtocolError: if anything is wrong with it; the message begins with the field.
    """
    if len(part) > limits.head:
        raise TooLarge(f"body: more than {limits.head} bytes of JSON; send binary tensors")
    raw = _object(bytes(part), limits)
    tensors = _list(raw, "inputs")
    if tensors is None:
        raise ProtocolError("inputs: missing")
    parameters = _parameters("", raw)
    default = parameters.get(ALL_BINARY, False)
    if not isinstance(default, bool):
        raise ProtocolError(f"parameters.{ALL_BINARY}: must be true or false")
    identity = raw.get("id")
    if identity is not None and not isinstance(identity, str):
        raise ProtocolError(f"id: must be a string, got {short(identity)}")
    head = Head(
        tuple(_tensor(f"inputs.{i}", tensor, binary) for i, tensor in enumerate(tensors)),
        identity,
        parameters,
        tuple(
            _requested(f"outputs.{i}", output, default)
            for i, output in enumerate(_list(raw, "outputs") or ())
        ),
        default,
    )
    check_head(head)
    if check is not None:
        check(head)
    return head


def check_head(head: Head) -> None:
    """Refuse names that stand twice, and parameters that no answer can repeat.

    Raises:
        ProtocolError: naming the field.
    """
    names = {"inputs": [t.name for t in head.inputs], "outputs": [o.name for o in head.outputs]}
    for kind, own in names.items():
        for i, name in enumerate(own):
            if name in own[:i]:
                raise ProtocolError(f"{kind}.{i}.name: {short(name)} is there twice")
    check_parameters(head.parameters)


def _object(text: bytes, limits: Limits) -> dict[str, Any]:
    limits.check_counts(text)
    try:
        raw = pydantic_core.from_json(text, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise ProtocolError(f"body: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ProtocolError("body: must be a JSON object")
    return raw


def _list(raw: Mapping[str, Any], key: str) -> list[Any] | None:
    found = raw.get(key)
    if found is not None and not isinstance(found, list):
        raise ProtocolError(f"{key}: must be a list, got {short(found)}")
    if found is not None and len(found) > MOST_TENSORS:
        raise ProtocolError(f"{key}: at most {MOST_TENSORS}, got {len(found)}")
    return found


def _parameters(where: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    found = raw.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ProtocolError(f"{where}parameters: must be an object, got {short(found)}")
    return found


def _tensor(where: str, raw: Any, binary: bool) -> InputTensor:
    """Read what describes a tensor.

    Raises:
        ProtocolError: naming the field.
    """
    if not isinstance(raw, dict):
        raise ProtocolError(f"{where}: must be an object, got {short(raw)}")
    for key in ("name", "datatype"):
        if not isinstance(raw.get(key), str):
            raise ProtocolError(f"{where}.{key}: must be a string, got {short(raw.get(key))}")
    name, datatype, shape = raw["name"], raw["datatype"], raw.get("shape")
    if datatype not in DATATYPES:
        raise ProtocolError(f"{where}.datatype: {short(datatype)} is not supported")
    sound = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    if not isinstance(shape, list) or not sound or len(shape) > MOST_AXES:
        raise ProtocolError(f"{where}.shape: must be a list of sizes, got {short(shape)}")
    parameters, data = _parameters(f"{where}.", raw), raw.get("data")
    if SIZE not in parameters:
        if not isinstance(data, list):
            why = "missing, and there is no binary data" if data is None else "must be a list"
            raise ProtocolError(f"{where}.data: {why}")
        return InputTensor(name, datatype, tuple(shape), parameters, data, 0)
    size = parameters[SIZE]
    if type(size) is not int or size < 0:
        raise ProtocolError(
            f"{where}.parameters.{SIZE}: must be a number of bytes, got {short(size)}"
        )
    expected = math.prod(shape) * DATATYPES[datatype].itemsize
    if datatype != "BYTES" and size != expected:
        why = f"{short(size)}, but shape and datatype make {expected}"
        raise ProtocolError(f"{where}.parameters.{SIZE}: {why}")
    if data is not None:
        raise ProtocolError(f"{where}.data: there is binary data already")
    if not binary:
        raise ProtocolError(f"{where}.parameters.{SIZE}: needs the header {HEADER_LENGTH}")
    return InputTensor(name, datatype, tuple(shape), parameters, None, size)


def _requested(where: str, raw: Any, default: bool) -> RequestedOutput:
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        raise ProtocolError(f"{where}.name: must be a string")
    parameters = _parameters(f"{where}.", raw)
    binary = parameters.get(BINARY, default)
    if not isinstance(binary, bool):
        raise ProtocolError(f"{where}.parameters.{BINARY}: must be true or false")
    return RequestedOutput(raw["name"], binary, parameters)


def render_request(request: InferRequest, *, binary: bool = True) -> Body:
    """Write a request.

    Args:
        request: it says how outputs are to be sent.
        binary: send the inputs' values behind the JSON part.

    Raises:
        ProtocolError: if JSON cannot carry an input's values.
    """
    inputs, blobs = _entries("inputs", request.inputs, dict.fromkeys(request.inputs, binary))
    for entry in inputs:
        own = request.input_parameters.get(entry["name"])
        if own:
            kept = {k: v for k, v in own.items() if k not in (SIZE, BINARY)}
            entry["parameters"] = {**kept, **entry.get("parameters", {})}
    head: dict[str, Any] = {} if request.id is None else {"id": request.id}
    parameters = dict(request.parameters)
    if request.binary:
        parameters[ALL_BINARY] = True
    if parameters:
        head["parameters"] = parameters
    head["inputs"] = inputs
    if request.outputs:
        head["outputs"] = [
            {"name": one.name, "parameters": {**one.parameters, BINARY: one.binary}}
            for one in request.outputs
        ]
    return _body(head, blobs)


def render_response(response: InferResponse, request: InferRequest) -> Body:
    """Write the response to a request, which says which outputs are sent in binary.

    Raises:
        ProtocolError: if JSON cannot carry an output's values.
    """
    ways = {name: request.wants_binary(name) for name in response.outputs}
    outputs, blobs = _entries("outputs", response.outputs, ways)
    head: dict[str, Any] = {"model_name": response.model_name}
    if response.model_version:
        head["model_version"] = response.model_version
    if response.id is not None:
        head["id"] = response.id
    if response.parameters:
        head["parameters"] = response.parameters
    head["outputs"] = outputs
    return _body(head, blobs)


def _entries(
    kind: str, arrays: Mapping[str, Any], binary: Mapping[str, bool]
) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Describe tensors in JSON; also return the bytes of those that are sent in binary."""
    entries, blobs = [], []
    for name, array in arrays.items():
        entry: dict[str, Any] = {
            "name": name,
            "datatype": datatype_of(array),
            "shape": list(array.shape),
        }
        if binary[name]:
            blobs.append(to_bytes(array))
            entry["parameters"] = {SIZE: len(blobs[-1])}
        else:
            try:
                entry["data"] = to_json(array)
            except BadTensor as error:
                raise ProtocolError(f"{kind}: {name!r}: {error}: ask for binary_data") from error
        entries.append(entry)
    return entries, blobs


def _body(head: Mapping[str, Any], blobs: list[bytes]) -> Body:
    text = pydantic_core.to_json(head)
    return Body(b"".join([text, *blobs]), len(text)) if blobs else Body(text, None)


def parse_response(
    data: bytes, header_length: str | None = None, limits: Limits = ANY
) -> InferResponse:
    """Read the response to an inference request.

    Raises:
        ProtocolError: if it is none.
    """
    view, length = memoryview(data), _length(header_length)
    if length is not None and length > len(view):
        raise ProtocolError(f"{HEADER_LENGTH}: {length} is more than the body's {len(view)}")
    raw = _object(bytes(view[:length]), limits)
    rest = view[len(view) if length is None else length :]
    arrays: dict[str, Any] = {}
    for i, entry in enumerate(_list(raw, "outputs") or ()):
        tensor = _tensor(f"outputs.{i}", entry, length is not None)
        if tensor.data is None:
            if tensor.size > len(rest):
                raise ProtocolError(f"outputs.{i}: {len(rest)} bytes are left, not {tensor.size}")
            tensor, rest = tensor._replace(data=rest[: tensor.size]), rest[tensor.size :]
        values = tensor.read(f"outputs.{i}")
        arrays[tensor.name] = values if values.flags.writeable else values.copy()
    if rest:
        raise ProtocolError(f"body: {len(rest)} bytes follow the last tensor")
    identity = raw.get("id")
    return InferResponse(
        arrays,
        str(raw.get("model_name") or ""),
        str(raw.get("model_version") or ""),
        None if identity is None else str(identity),
        _parameters("", raw),
    )
