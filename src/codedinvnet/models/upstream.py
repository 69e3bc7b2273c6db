"""What the gateway needs to call servers' models in the Open Inference Protocol V2."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from codedinvnet.errors import UserError
from codedinvnet.models.base import DATATYPES, HEADER_LENGTH, TensorSpec
from codedinvnet.models.specs import Declared, input_specs

PATH = "/v2/models/"
"""What a model's URL has behind the server's address."""
Writes: TypeAlias = Callable[[], tuple[bytes, dict[str, str]]]
"""Returns the body of a request, and its headers about that."""


def declared_inputs(
    metadata: Mapping[str, Any], told: Sequence[TensorSpec], where: str
) -> tuple[tuple[TensorSpec, ...], int | None]:
    """Return the inputs of one query that a model's metadata declare, and its largest batch.

    Args:
        metadata: the protocol's model metadata.
        told: see `input_specs`.
        where: the model, for messages.

    Raises:
        UserError: see `input_specs`.
    """
    inputs = [
        Declared(
            str(tensor["name"]),
            str(tensor["datatype"]),
            tuple("?" if int(size) < 0 else int(size) for size in tensor["shape"]),
        )
        for tensor in metadata["inputs"]
    ]
    return input_specs(inputs, told, where)


def check_server(url: str, flag: str) -> None:
    """Refuse the URL of a server's model where that of the server is wanted.

    Args:
        url: of either.
        flag: the option that has it, for messages.

    Raises:
        UserError: if it is a model's.
    """
    server, of_model, _ = url.partition(PATH)
    if of_model:
        raise UserError(f"{flag}: {url!r} is a model's URL: name the server alone: {server}")


def binary_request(
    arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]
) -> tuple[bytes, dict[str, str]]:
    """Return the body of a request with binary tensors, and its headers."""
    head, blobs = described(arrays, specs)
    return b"".join([head, *blobs]), {HEADER_LENGTH: str(len(head))}


def json_request(
    arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]
) -> tuple[bytes, dict[str, str]]:
    """Return the body of a request in JSON alone, and its headers: some servers take no other."""
    inputs = [
        {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": list(arrays[spec.name].shape),
            "data": arrays[spec.name].astype(DATATYPES[spec.datatype]).ravel().tolist(),
        }
        for spec in specs
    ]
    return json.dumps({"inputs": inputs}).encode(), {"Content-Type": "application/json"}


def described(
    arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]
) -> tuple[bytes, list[bytes]]:
    """Return the JSON part of a request for binary answers, and its tensors."""
    blobs = [
        np.ascontiguousarray(arrays[s.name], DATATYPES[s.datatype].newbyteorder("<")).tobytes()
        for s in specs
    ]
    inputs = [
        {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": list(arrays[spec.name].shape),
            "parameters": {"binary_data_size": len(blob)},
        }
        for spec, blob in zip(specs, blobs, strict=True)
    ]
    asked = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    return json.dumps(asked).encode(), blobs


def outputs_of(data: bytes, length: str | None) -> dict[str, np.ndarray]:
    """Return an answer's outputs of numbers; texts are left out."""
    place = len(data) if length is None else int(length)
    found = {}
    for tensor in json.loads(data[:place])["outputs"]:
        shape, datatype = tuple(map(int, tensor["shape"])), str(tensor["datatype"])
        size = (tensor.get("parameters") or {}).get("binary_data_size")
        begin = place
        place += size or 0
        if datatype == "BYTES":
            continue
        if datatype not in DATATYPES:
            name = tensor["name"]
            told = "which is not read here: let the server return FP32"
            raise ValueError(f"output {name!r} is {datatype}, {told}")
        dtype = DATATYPES[datatype]
        if size is None:
            found[tensor["name"]] = np.array(tensor["data"], dtype).reshape(shape)
            continue
        if size != math.prod(shape) * dtype.itemsize or place > len(data):
            raise ValueError(f"output {tensor['name']!r} has {size} bytes")
        array = np.frombuffer(data, dtype.newbyteorder("<"), math.prod(shape), begin)
        found[tensor["name"]] = array.astype(dtype).reshape(shape)
    return found
