"""The requests of a load, written before the first is sent: from a file, or from the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codedinvnet.errors import UserError
from codedinvnet.models.base import DATATYPE_OF, DATATYPES, HEADER_LENGTH, Signature, TensorSpec
from codedinvnet.models.specs import parse_input
from codedinvnet.serving.gateway.calls import Headers
from codedinvnet.serving.tensors import BadTensor, to_bytes, to_json

DIFFERENT = 64
"""Requests that are generated, or fewer large ones; they are sent in turn."""
MOST_BYTES = 256 * 2**20
"""Of all requests that are kept."""
SMALL = 10
"""Whole numbers that are generated are below it: they may be places in a table."""
Arrays = Mapping[str, np.ndarray]


def signature_of(metadata: Mapping[str, Any], told: Sequence[str]) -> tuple[Signature, bool]:
    """Return a model's inputs by its metadata, and whether they have a batch axis.

    Args:
        metadata: as the protocol has them.
        told: NAME:DATATYPE:SHAPE of inputs whose sizes the metadata leave open.

    Raises:
        UserError: if the size of an axis is not known.
    """
    own = {spec.name: spec for spec in map(parse_input, told)}
    batched = all(list(map(int, t["shape"]))[:1] == [-1] for t in metadata["inputs"])
    specs = []
    for tensor in metadata["inputs"]:
        name, datatype = tensor["name"], tensor["datatype"]
        shape = tuple(int(size) for size in tensor["shape"])[batched:]
        if name in own:
            spec = own.pop(name)
            fits = len(shape) == len(spec.shape) and all(
                size in (-1, given) for size, given in zip(shape, spec.shape, strict=True)
            )
            if spec.datatype != datatype or not fits:
                told_by = f"{datatype} {list(shape)} of one query"
                raise UserError(f"--input {name}: the model takes {told_by}")
            shape = spec.shape
        if -1 in shape:
            example = f"{name}:{datatype}:{'x'.join('N' if n < 0 else str(n) for n in shape)}"
            raise UserError(f"{name!r} has axes of any size: tell them by --input {example}")
        if datatype not in DATATYPES:
            raise UserError(f"{name!r} is {datatype}, which has no numpy type")
        specs.append(TensorSpec(name, datatype, shape))
    if own:
        raise UserError(f"--input: the model has no input {min(own)!r}")
    return Signature(tuple(specs), ()), batched


def generated(signature: Signature, batch: int, seed: int) -> list[Arrays]:
    """Return requests of random values."""
    random = np.random.default_rng(seed)

    def values(spec: TensorSpec) -> np.ndarray:
        shape = (batch, *spec.shape)
        if spec.datatype == "BYTES":
            words = np.empty(shape, object)
            words.ravel()[:] = [b"%08x" % n for n in random.integers(2**32, size=words.size)]
            return words
        dtype = DATATYPES[spec.datatype]
        if dtype.kind == "f":
            return random.random(shape, np.float32).astype(dtype)
        most = {"b": 2}.get(dtype.kind, 256 if spec.datatype == "UINT8" else SMALL)
        return random.integers(most, size=shape).astype(dtype)

    def request() -> Arrays:
        return {spec.name: values(spec) for spec in signature.inputs}

    first = request()
    return [first, *(request() for _ in range(1, _kept(first, DIFFERENT)))]


def _kept(first: Arrays, wanted: int) -> int:
    """Return how many of so many requests are kept, all as large as the first: one at least."""
    size = sum(array.nbytes for array in first.values())
    return max(1, min(wanted, MOST_BYTES // max(1, size)))


def from_file(path: Path, signature: Signature, batch: int, seed: int) -> list[Arrays]:
    """Return requests of a file's queries, in an order of their own.

    Raises:
        UserError: if there are fewer queries than one request has.
    """
    from codedinvnet.protect.images import Preprocessing
    from codedinvnet.protect.inputs import read_inputs

    found = read_inputs(path, signature, Preprocessing())
    if len(found) < batch:
        raise UserError(f"--inputs: {path} has {len(found)} queries, --batch {batch} needs more")
    order = np.random.default_rng(seed).permutation(len(found))
    most = _kept(found.batch(order[:batch]), len(found) // batch)
    return [found.batch(rows) for rows in order[: most * batch].reshape(most, batch)]


def written(arrays: Arrays, batched: bool, binary: bool) -> tuple[bytes, Headers]:
    """Return a request's body over HTTP, and its headers.

    Raises:
        UserError: if JSON has no such values.
    """
    inputs, blobs = [], []
    for name, array in arrays.items():
        one = array if batched else array[0]
        datatype = DATATYPE_OF[array.dtype]
        head: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(one.shape)}
        if binary:
            blobs.append(to_bytes(one))
            head["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            try:
                head["data"] = to_json(one)
            except BadTensor as error:
                raise UserError(f"--inputs: {name!r}: {error}") from error
        inputs.append(head)
    if not binary:
        body = json.dumps({"inputs": inputs}).encode()
        return body, (("content-type", "application/json"),)
    text = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    kind = ("content-type", "application/octet-stream")
    return b"".join([text, *blobs]), ((HEADER_LENGTH.lower(), str(len(text))), kind)
