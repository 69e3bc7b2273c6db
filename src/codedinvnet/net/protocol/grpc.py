"""Requests and responses as messages of the protocol's gRPC service.

Needs the published stubs (the extra `grpc`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from codedinvnet.common.errors import UserError
from codedinvnet.net.protocol.http import check_head
from codedinvnet.net.protocol.messages import (
    Check,
    Head,
    InferRequest,
    InferResponse,
    InputTensor,
    Metadata,
    ProtocolError,
    RequestedOutput,
    TooLarge,
    short,
)
from codedinvnet.net.protocol.tensors import DATATYPES, LENGTH, TensorSpec, datatype_of, to_bytes

try:
    from tritonclient.grpc import service_pb2 as pb
except (ImportError, RuntimeError) as error:  # tritonclient makes the first the second
    raise UserError("gRPC needs an extra: pip install 'codedinvnet[grpc]'") from error

__all__ = ["SERVICE", "parse", "parse_request", "pb"]
__all__ += ["render_metadata", "render_response", "serialized"]
SERVICE = "inference.GRPCInferenceService"
MOST_PARTS = 4096
"""Tensors, contents, parameters and sizes of a request. Two bytes of a message make one."""
MOST_TYPED = 1 << 22
"""Values in typed contents: each becomes an object."""
TYPED = {
    "BOOL": ("bool_contents", "?"), "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"), "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"), "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"), "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"), "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"), "BYTES": ("bytes_contents", ""),
}  # fmt: skip
"""Datatype -> where typed contents have it, and the format of one element's bytes."""


def parse_request(message: bytes, check: Check | None = None) -> InferRequest:
    """Read a serialized ModelInferRequest, whose outputs are raw contents.

    Args:
        message: as it came.
        check: see `Check`.

    Raises:
        ProtocolError: if it is none; the message begins with the field.
        TooLarge: if it has very many parts, or values in typed contents.
    """
    _check_parts(message)
    request = parse(pb.ModelInferRequest, message)
    sizes = sum(len(tensor.shape) + len(tensor.parameters) for tensor in request.inputs)
    if sizes + sum(len(output.parameters) for output in request.outputs) > MOST_PARTS:
        raise TooLarge(f"more than {MOST_PARTS} parameters and sizes")
    inputs = _tensors("inputs", request.inputs, request.raw_input_contents)
    head = Head(
        tuple(inputs),
        request.id or None,
        _parameters(request.parameters),
        tuple(
            RequestedOutput(output.name, True, _parameters(output.parameters))
            for output in request.outputs
        ),
        True,
        (request.model_name, request.model_version),
    )
    check_head(head)
    if check is not None:
        check(head)
    return head.request()


def render_response(response: InferResponse) -> bytes:
    """Write a response as a serialized ModelInferResponse.

    Raises:
        ProtocolError: if gRPC cannot carry a parameter.
    """
    message = pb.ModelInferResponse(
        model_name=response.model_name,
        model_version=response.model_version,
        id=response.id or "",
    )
    _set_parameters(message.parameters, response.parameters)
    for name, array in response.outputs.items():
        _add(message.outputs, message.raw_output_contents, name, array)
    return serialized(message)


def render_metadata(metadata: Metadata) -> bytes:
    """Write a model's metadata as a serialized ModelMetadataResponse."""

    def described(specs: Sequence[TensorSpec]) -> list[Any]:
        kind = pb.ModelMetadataResponse.TensorMetadata
        return [kind(name=s.name, datatype=s.datatype, shape=[-1, *s.shape]) for s in specs]

    return serialized(
        pb.ModelMetadataResponse(
            name=metadata.name,
            versions=metadata.versions,
            platform=metadata.platform,
            inputs=described(metadata.inputs),
            outputs=described(metadata.outputs),
        )
    )


def parse(kind: Any, message: bytes) -> Any:
    """Read a serialized message.

    Raises:
        ProtocolError: if it is none of the kind.
    """
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise ProtocolError(f"it is no {kind.DESCRIPTOR.name}") from error


def serialized(message: Any) -> bytes:
    """Write a message."""
    found: bytes = message.SerializeToString()
    return found


def _add(entries: Any, contents: Any, name: str, array: Any) -> Any:
    """Add a tensor to a message's lists of descriptions and of raw contents."""
    entry = entries.add()
    entry.name, entry.datatype = name, datatype_of(array)
    entry.shape.extend(array.shape)
    contents.append(to_bytes(array))
    return entry


def _tensors(kind: str, entries: Sequence[Any], raw: Sequence[bytes]) -> Iterator[InputTensor]:
    """Yield tensors, with the bytes of their raw or typed contents."""
    if raw and len(raw) != len(entries):
        raise ProtocolError(f"raw contents: {len(entries)} tensors, got {len(raw)}")
    values = 0
    for i, entry in enumerate(entries):
        where, datatype, shape = f"{kind}.{i}", entry.datatype, tuple(entry.shape)
        if datatype not in DATATYPES:
            raise ProtocolError(f"{where}.datatype: {short(datatype)} is not supported")
        if any(not 0 <= size < 1 << 40 for size in shape):
            raise ProtocolError(f"{where}.shape: must be sizes, got {short(list(shape))}")
        if not raw and datatype in TYPED:
            values += len(getattr(entry.contents, TYPED[datatype][0]))
            if values > MOST_TYPED:
                raise TooLarge(f"{where}: more than {MOST_TYPED} typed values; send raw contents")
        data = raw[i] if raw else _typed(where, entry)
        parameters = _parameters(entry.parameters)
        yield InputTensor(entry.name, datatype, shape, parameters, data, 0)


def _typed(where: str, tensor: Any) -> bytes:
    """Return the protocol's bytes of a tensor's typed contents.

    Raises:
        ProtocolError: if its datatype has none, or a value does not fit it.
    """
    if tensor.datatype not in TYPED:
        raise ProtocolError(f"{where}: {short(tensor.datatype)} needs raw contents")
    name, element = TYPED[tensor.datatype]
    values = getattr(tensor.contents, name)
    if tensor.datatype == "BYTES":
        return b"".join(LENGTH.pack(len(value)) + value for value in values)
    try:
        return struct.pack(f"<{len(values)}{element}", *values)
    except struct.error as error:
        raise ProtocolError(f"{where}: {error}") from error


def _parameters(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a message as JSON has them."""
    if not message:
        return {}
    choices = (
        (name, value, value.WhichOneof("parameter_choice")) for name, value in message.items()
    )
    return {name: getattr(value, choice) for name, value, choice in choices if choice}


def _set_parameters(message: Any, parameters: Mapping[str, Any]) -> None:
    for name, value in parameters.items():
        if value is None:  # as good as none
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
            raise ProtocolError(f"parameters.{name}: gRPC has no such value: {short(value)}")


def _check_parts(message: bytes) -> None:
    """Count a message's own fields before it is parsed.

    Raises:
        TooLarge: if they are very many.
        ProtocolError: if it is no message of fields with lengths.
    """
    place = parts = 0
    while place < len(message):
        tag, place = _varint(message, place)
        if tag & 7 != 2:
            raise ProtocolError("it is no ModelInferRequest: a field has no length")
        size, place = _varint(message, place)
        place, parts = place + size, parts + 1
        if place > len(message):
            raise ProtocolError("it is no ModelInferRequest: it is cut short")
        if parts > MOST_PARTS:
            raise TooLarge(f"more than {MOST_PARTS} tensors, contents and parameters")


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Return the number at a place of a message, and the place behind it."""
    value = shift = 0
    while shift < 64 and place < len(message):
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise ProtocolError("it is no ModelInferRequest: it is cut short")
