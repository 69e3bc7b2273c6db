"""Turns the protocol's messages over gRPC into bodies over HTTP, and back, tensors as they are.

Over HTTP all tensors are binary. What a message and a body both say is copied; what only one of
them can say (`binary_data`, `binary_data_output`) is added or left out.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pydantic_core
from google.protobuf.message import DecodeError

from codedinvnet.models.base import DATATYPES
from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.faces.grpc_stubs import pb
from codedinvnet.serving.faces.protobuf import fields
from codedinvnet.serving.faces.v2 import TooLarge, short, split_body
from codedinvnet.serving.tensors import LENGTH, BadTensor, from_bytes, from_json, to_bytes, to_json

SIZE, BINARY, ALL_BINARY = "binary_data_size", "binary_data", "binary_data_output"
MOST_PARTS = 4096
"""Tensors, contents, parameters and sizes of a request. Of a message each takes two bytes, and
hundreds once it is translated."""
MOST_JSON = 1 << 22
"""Values, lists, objects and keys of a request's JSON, or values of typed contents: reading them
holds the interpreter."""
TYPED = {
    "BOOL": ("bool_contents", "?"), "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"), "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"), "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"), "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"), "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"), "BYTES": ("bytes_contents", ""),
}  # fmt: skip
"""Datatype -> where typed contents have it, and the format of one element's bytes."""


class NotInJson(BadRequest):
    """JSON cannot carry an output that is wanted in it."""


class Body(NamedTuple):
    """A body over HTTP."""

    data: bytes
    header_length: int | None
    """The length of the JSON part; None if it is all."""


class Wanted(NamedTuple):
    """How the answer to a request over HTTP is to be written."""

    outputs: Mapping[str, bool]
    """Name -> whether it is binary, of outputs that the client named."""
    default: bool
    """Whether the others are."""


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turn what a strange body raises into BadRequest."""
    try:
        yield
    except (BadTensor, ValueError) as error:
        raise BadRequest(f"body: it is not the protocol's: {error}") from error
    except LookupError as error:
        raise BadRequest(f"body: it is not the protocol's: {error} is missing") from error
    except (TypeError, AttributeError) as error:
        told = "a list, object, text or number stands where it has another kind"
        raise BadRequest(f"body: it is not the protocol's: {told}") from error


def typed_bytes(tensor: Any) -> bytes:
    """Return the protocol's bytes of a tensor's typed contents.

    Raises:
        BadRequest: if its datatype has none, or a value does not fit it.
    """
    if tensor.datatype not in TYPED:
        raise BadRequest(f"{short(tensor.name)}: {short(tensor.datatype)} needs raw contents")
    name, element = TYPED[tensor.datatype]
    values = getattr(tensor.contents, name)
    if tensor.datatype == "BYTES":
        return b"".join(LENGTH.pack(len(value)) + value for value in values)
    try:
        return struct.pack(f"<{len(values)}{element}", *values)
    except struct.error as error:
        raise BadRequest(f"{short(tensor.name)}: {error}") from error


def check_typed(tensors: Sequence[Any]) -> None:
    """Refuse typed contents that take long to read: each value becomes an object.

    Raises:
        TooLarge: naming the bound, and the tensor that passes it.
    """
    values = 0
    for tensor in tensors:
        if tensor.datatype in TYPED:
            values += len(getattr(tensor.contents, TYPED[tensor.datatype][0]))
        if values > MOST_JSON:
            told = f"more than {MOST_JSON} values in typed contents"
            raise TooLarge(f"{short(tensor.name)}: {told}; send raw contents")


def parameters_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a message as JSON has them."""
    return {name: getattr(value, value.WhichOneof("parameter_choice"))
            for name, value in message.items() if value.WhichOneof("parameter_choice")}  # fmt: skip


def set_parameters(message: Any, parameters: Mapping[str, Any] | None) -> None:
    """Write parameters of JSON into a message.

    Raises:
        BadRequest: if gRPC has no such values.
    """
    for name, value in (parameters or {}).items():
        if value is None:  # it says nothing
            continue
        if isinstance(value, bool):
            message[name].bool_param = value
        elif isinstance(value, int) and -(2**63) <= value < 2**63:
            message[name].int64_param = value
        elif isinstance(value, str):
            message[name].string_param = value
        elif isinstance(value, float):
            message[name].double_param = value
        else:
            raise BadRequest(f"parameters.{name}: gRPC has no such value: {short(value)}")


def contents(tensors: Sequence[Any], raw: Sequence[bytes]) -> list[bytes]:
    """Return the bytes of a message's tensors.

    Raises:
        BadRequest: if there are not as many raw contents as tensors.
        TooLarge: if typed contents have very many values.
    """
    if not raw:
        check_typed(tensors)
        return [typed_bytes(tensor) for tensor in tensors]
    if len(raw) != len(tensors):
        raise BadRequest(f"raw contents: {len(tensors)} tensors, got {len(raw)}")
    return list(raw)


def request_to_http(message: bytes) -> tuple[Body, str, str]:
    """Return a serialized ModelInferRequest as a body, and its model's name and version.

    The body asks for binary answers.

    Raises:
        BadRequest: if it is none.
        TooLarge: if it has very many parts, or values in typed contents.
    """
    request = parsed_request(message)
    blobs = contents(request.inputs, request.raw_input_contents)
    inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "parameters": {**parameters_of(tensor.parameters), SIZE: len(blob)},
        }
        for tensor, blob in zip(request.inputs, blobs, strict=True)
    ]
    head: dict[str, Any] = {"inputs": inputs}
    if request.id:
        head["id"] = request.id
    head["parameters"] = {**parameters_of(request.parameters), ALL_BINARY: True}
    if request.outputs:
        head["outputs"] = [
            {"name": output.name, "parameters": {**parameters_of(output.parameters), BINARY: True}}
            for output in request.outputs
        ]
    return joined(head, blobs), request.model_name, request.model_version


@reading()
def response_from_http(data: bytes, header_length: str | None) -> bytes:
    """Return the body of an answer as a serialized ModelInferResponse.

    Raises:
        BadRequest: if it is no answer of the protocol.
    """
    head, blobs = separated(data, header_length, "outputs")
    response = pb.ModelInferResponse(
        model_name=str(head.get("model_name") or ""),
        model_version=str(head.get("model_version") or ""),  # null, of KServe's server
        id=str(head.get("id") or ""),
    )
    parameters = head.get("parameters") or {}
    set_parameters(response.parameters, {k: v for k, v in parameters.items() if k != ALL_BINARY})
    add_tensors(response.outputs, response.raw_output_contents, blobs)
    message: bytes = response.SerializeToString()
    return message


def add_tensors(
    entries: Any, contents: Any, tensors: Sequence[tuple[dict[str, Any], bytes]]
) -> None:
    """Add tensors, each as JSON describes it and in bytes, to a message's lists of both."""
    for tensor, blob in tensors:
        entry = entries.add()
        entry.name, entry.datatype = tensor["name"], tensor["datatype"]
        entry.shape.extend(tensor["shape"])
        own = {k: v for k, v in (tensor.get("parameters") or {}).items() if k != SIZE}
        set_parameters(entry.parameters, own)
        contents.append(blob)


@reading()
def request_from_http(
    data: bytes, header_length: str | None, model: str, version: str
) -> tuple[bytes, Wanted]:
    """Return the body of a request as a serialized ModelInferRequest, and what it asks for.

    Raises:
        BadRequest: if it is no request of the protocol, or gRPC cannot say it.
        TooLarge: if its JSON has very many values, or other parts.
    """
    check_json(split_body(data, header_length)[0])
    head, blobs = separated(data, header_length, "inputs")
    request = pb.ModelInferRequest(
        model_name=model, model_version=version, id=str(head.get("id") or "")
    )
    parameters = dict(head.get("parameters") or {})
    default = bool(parameters.pop(ALL_BINARY, False))
    set_parameters(request.parameters, parameters)
    add_tensors(request.inputs, request.raw_input_contents, blobs)
    outputs = {}
    for output in head.get("outputs") or ():
        own = dict(output.get("parameters") or {})
        outputs[output["name"]] = bool(own.pop(BINARY, default))
        requested = request.outputs.add()
        requested.name = output["name"]
        set_parameters(requested.parameters, own)
    return request.SerializeToString(), Wanted(outputs, default)


def response_to_http(message: bytes, wanted: Wanted) -> Body:
    """Return a serialized ModelInferResponse as the body of an answer.

    Raises:
        NotInJson: if JSON cannot carry an output that is wanted in it.
        BadRequest: if it is none, or an output is not what it says.
    """
    response = parsed(pb.ModelInferResponse, message)
    outputs, blobs = [], []
    data = contents(response.outputs, response.raw_output_contents)
    for tensor, blob in zip(response.outputs, data, strict=True):
        entry = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
        }
        parameters = parameters_of(tensor.parameters)
        if wanted.outputs.get(tensor.name, wanted.default):
            parameters[SIZE] = len(blob)
            blobs.append(blob)
        else:
            told = f"outputs: {tensor.name!r}: "
            try:
                array = from_bytes(blob, tensor.datatype, tuple(tensor.shape))
            except (BadTensor, ValueError) as error:
                raise BadRequest(f"{told}{error}") from error
            except KeyError as error:
                raise NotInJson(f"{told}{error}: ask for binary_data") from error
            try:
                entry["data"] = to_json(array)
            except BadTensor as error:
                raise NotInJson(f"{told}{error}: ask for binary_data") from error
        if parameters:
            entry["parameters"] = parameters
        outputs.append(entry)
    head: dict[str, Any] = {"model_name": response.model_name}
    if response.model_version:
        head["model_version"] = response.model_version
    if response.id:
        head["id"] = response.id
    if response.parameters:
        head["parameters"] = parameters_of(response.parameters)
    return joined({**head, "outputs": outputs}, blobs)


def parsed(kind: Any, message: bytes) -> Any:
    """Return a serialized message.

    Raises:
        BadRequest: if it is none of the kind.
    """
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise BadRequest(f"it is no {kind.DESCRIPTOR.name}") from error


def parsed_request(message: bytes) -> Any:
    """Return a serialized ModelInferRequest.

    Its own fields are counted before they are parsed.

    Raises:
        BadRequest: if it is none.
        TooLarge: if it has very many parts.
    """
    parts = 0
    try:
        for _ in fields(message):
            parts += 1
            check_parts(parts)
    except ValueError as error:
        raise BadRequest("it is no ModelInferRequest") from error
    request = parsed(pb.ModelInferRequest, message)
    parts += sum(len(tensor.shape) + len(tensor.parameters) for tensor in request.inputs)
    check_parts(parts + sum(len(output.parameters) for output in request.outputs))
    return request


def check_parts(parts: int) -> None:
    """Refuse a request of so many parts, if these are very many.

    Raises:
        TooLarge: naming the bound.
    """
    if parts > MOST_PARTS:
        raise TooLarge(f"more than {MOST_PARTS} tensors, contents, parameters and sizes")


def check_json(head: memoryview) -> None:
    """Refuse JSON that takes long to read, by what can be counted before anything is built.

    Raises:
        TooLarge: naming the bound.
    """
    text = bytes(head)
    if sum(map(text.count, (b",", b"[", b"{", b":"))) > MOST_JSON:
        told = f"body: more than {MOST_JSON} values, lists, objects and keys of JSON"
        raise TooLarge(f"{told}; send binary tensors")


def joined(head: Mapping[str, Any], blobs: Sequence[bytes]) -> Body:
    """Return a body of its JSON part and binary tensors."""
    text = pydantic_core.to_json(head)
    return Body(b"".join([text, *blobs]), len(text) if blobs else None)


def separated(
    data: bytes, header_length: str | None, tensors: str
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], bytes]]]:
    """Return a body's JSON part, and the tensors in it, each with its bytes.

    Raises:
        TooLarge: if it has very many parts.
    """
    head, tail = split_body(data, header_length)
    found = pydantic_core.from_json(bytes(head))
    entries = [entry for key in ("inputs", "outputs") for entry in found.get(key) or ()]
    parts = len(entries) + len(found.get("parameters") or ())
    for entry in entries:
        parts += len(entry.get("shape") or ()) + len(entry.get("parameters") or ())
    check_parts(parts)
    return found, list(_with_bytes(found[tensors], tail))


def _with_bytes(
    tensors: Sequence[dict[str, Any]], tail: memoryview
) -> Iterator[tuple[dict[str, Any], bytes]]:
    rest = tail
    for tensor in tensors:
        size = (tensor.get("parameters") or {}).get(SIZE)
        if size is None:
            if tensor["datatype"] not in DATATYPES:
                told = f"datatype {short(tensor['datatype'])} is none that JSON can carry"
                raise BadTensor(f"{short(tensor['name'])}: {told}")
            array = from_json(tensor["data"], tensor["datatype"], tuple(tensor["shape"]))
            yield tensor, to_bytes(array)
            continue
        if not 0 <= size <= len(rest):
            raise BadTensor(f"{tensor['name']}: {len(rest)} bytes are left, not {size}")
        yield tensor, bytes(rest[:size])
        rest = rest[size:]
    if rest:
        raise BadTensor(f"{len(rest)} bytes follow the last tensor")
