"""What clients and servers say to each other: requests, responses, metadata and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from codedinvnet.net.protocol.tensors import (
    DATATYPES,
    BadTensor,
    TensorSpec,
    from_bytes,
    from_json,
    size_of,
)

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The HTTP header that says how many bytes of a body are JSON, where binary tensors follow."""
SHOWN = 100
"""Characters of a client's value in a message."""
DEEPEST = 32
"""Levels of lists and objects in a request's parameters."""
MOST_PARAMETERS = 64 * 1024
"""Characters of a request's parameters, which its answer repeats."""
JSON_VALUES = 1 << 18
"""Values of JSON that a request may have even if the model's query has fewer."""
OTHER_JSON = 1 << 14
"""Values, lists, objects and keys of a request in addition to those of its tensors."""
VALUE_LENGTH, TEXT_LENGTH = 24, 4096
"""Bytes of JSON for a number and for a text, at most."""
BINARY_LENGTH = 4
"""Bytes of a number in a binary tensor, at least: images may come as floats."""


class ProtocolError(Exception):
    """A request or response is not the protocol's; the message begins with the field."""


class TooLarge(ProtocolError):
    """A request has more bytes or values than the server takes."""


@dataclass(frozen=True)
class RequestedOutput:
    """An output that a client wants.

    Attributes:
        name: the output's.
        binary: whether its values are sent behind the JSON part.
        parameters: other ones that the client gave.
    """

    name: str
    binary: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)


class InputTensor(NamedTuple):
    """An input of a request whose values have not been read yet."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Mapping[str, Any]
    data: Any
    """A list of JSON values, bytes, or None for bytes that are still to come."""
    size: int
    """How many of the bytes behind the JSON part are its own."""

    def read(self, where: str) -> np.ndarray:
        """Convert its data to an array.

        Raises:
            ProtocolError: naming the field.
        """
        convert = from_json if type(self.data) is list else from_bytes
        try:
            return convert(self.data, self.datatype, self.shape)
        except BadTensor as error:
            raise ProtocolError(f"{where}.data: {error}") from error


@dataclass(frozen=True)
class Head:
    """A request without its tensors' values.

    Attributes:
        inputs: the tensors, in the client's order.
        id: what the client calls the request; None without one.
        parameters: the request's.
        outputs: those that the client named; () for all.
        binary: whether outputs that it did not name are sent in binary.
        model: its name and version, where the message has them.
    """

    inputs: tuple[InputTensor, ...]
    id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[RequestedOutput, ...] = ()
    binary: bool = False
    model: tuple[str, str] = ("", "")

    @property
    def tail(self) -> int:
        """How many bytes of tensors follow the JSON part."""
        return sum(tensor.size for tensor in self.inputs)

    def request(self) -> InferRequest:
        """Read the tensors' values.

        Raises:
            ProtocolError: naming the field.
        """
        arrays = {tensor.name: tensor.read(f"inputs.{i}") for i, tensor in enumerate(self.inputs)}
        own = {t.name: t.parameters for t in self.inputs if t.parameters}
        given = (self.id, self.parameters, self.outputs, self.binary)
        return InferRequest(arrays, *given, self.model[0], self.model[1], own)


Check = Callable[[Head], None]
"""Called with a request before its tensors' values are read; raises what refuses it."""


@dataclass(frozen=True)
class InferRequest:
    """An inference request.

    Attributes:
        inputs: name -> values, in the client's order.
        id: what the client calls the request; None without one.
        parameters: the request's.
        outputs: those that are wanted; () for all.
        binary: whether outputs that are not named are sent in binary.
        model_name: the model's; "" where the address says it.
        model_version: likewise; "" for the server's choice.
        input_parameters: input -> its parameters, where it has some.
    """

    inputs: Mapping[str, np.ndarray]
    id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[RequestedOutput, ...] = ()
    binary: bool = False
    model_name: str = ""
    model_version: str = ""
    input_parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many bytes the inputs' values take."""
        return sum([size_of(array) for array in self.inputs.values()])

    def wants_binary(self, output: str) -> bool:
        """Return whether an output is to be sent in binary."""
        return next((o.binary for o in self.outputs if o.name == output), self.binary)


@dataclass(frozen=True)
class InferResponse:
    """The answer to an inference request.

    Attributes:
        outputs: name -> values.
        model_name: the model's.
        model_version: likewise; "" without one.
        id: the request's; None if it has none.
        parameters: the response's.
    """

    outputs: Mapping[str, np.ndarray]
    model_name: str = ""
    model_version: str = ""
    id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


class Metadata(NamedTuple):
    """What a server says of a model."""

    name: str
    inputs: tuple[TensorSpec, ...]
    """Shapes are those of one query; the batch axis comes first."""
    outputs: tuple[TensorSpec, ...]
    platform: str = ""
    versions: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return what `GET /v2/models/NAME` answers."""
        return {
            "name": self.name,
            "versions": list(self.versions),
            "platform": self.platform,
            "inputs": [self._spec(spec) for spec in self.inputs],
            "outputs": [self._spec(spec) for spec in self.outputs],
        }

    @staticmethod
    def _spec(spec: TensorSpec) -> dict[str, Any]:
        return {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.shape]}


def server_metadata(version: str) -> dict[str, Any]:
    """Return what `GET /v2` answers."""
    return {"name": "codedinvnet", "version": version, "extensions": ["binary_tensor_data"]}


@dataclass(frozen=True)
class Limits:
    """Bounds on a request that are checked before anything is built of it.

    Attributes:
        values: values, lists, objects and keys of JSON.
        head: bytes of JSON.
        body: bytes of JSON and binary tensors.
    """

    values: int = 1 << 23
    head: int = 1 << 26
    body: int = 1 << 31

    @classmethod
    def of(cls, inputs: Sequence[TensorSpec], max_batch: int, memory: int) -> Limits:
        """Derive bounds from a model's inputs.

        Args:
            inputs: the model's.
            max_batch: queries of one request.
            memory: bytes that all requests may hold together.
        """
        sizes = [math.prod(spec.shape) for spec in inputs]
        values = max(JSON_VALUES, sum(sizes)) + OTHER_JSON
        texts = sum(n for spec, n in zip(inputs, sizes, strict=True) if spec.datatype == "BYTES")
        head = values * VALUE_LENGTH + max_batch * texts * TEXT_LENGTH
        widths = (
            TEXT_LENGTH
            if spec.datatype == "BYTES"
            else max(BINARY_LENGTH, DATATYPES[spec.datatype].itemsize)
            for spec in inputs
        )
        query = sum(size * width for size, width in zip(sizes, widths, strict=True))
        body = min(max(max_batch * query, head) + MOST_PARAMETERS, memory)
        deepest = max((len(spec.shape) for spec in inputs), default=0)
        return cls(values * (2 + deepest), min(head, body), body)

    def check_counts(self, head: bytes) -> None:
        """Refuse JSON that takes long to read.

        Raises:
            TooLarge: naming the bound.
        """
        if sum(map(head.count, (b",", b"[", b"{", b":"))) > self.values:
            raise TooLarge(f"body: more than {self.values} values of JSON; send binary tensors")


def short(value: Any) -> str:
    """Return a client's value for a message: its beginning if it is long."""
    if isinstance(value, str | bytes | list | tuple):
        value = value[:SHOWN]
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that an answer cannot repeat.

    Raises:
        ProtocolError: if they are long, nested deeply, or no JSON.
    """
    if not parameters:
        return
    level: list[Any] = [parameters]
    for _ in range(DEEPEST):
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v)]
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            break
    else:
        raise ProtocolError(f"parameters: nested more than {DEEPEST} deep")
    try:
        repeated = json.dumps(parameters, allow_nan=False)
    except ValueError as error:
        raise ProtocolError(f"parameters: {error}") from error
    if len(repeated) > MOST_PARAMETERS:
        raise ProtocolError(f"parameters: more than {MOST_PARAMETERS} characters")
