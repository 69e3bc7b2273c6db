"""ONNX files, which ONNX Runtime computes."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codedinvnet.engines import ONNX_RUNTIME, check_installed
from codedinvnet.errors import UserError, one_line
from codedinvnet.files import content_digest
from codedinvnet.models.base import TensorSpec
from codedinvnet.models.probe import Arrays, Compute, Opened
from codedinvnet.models.runtime import session
from codedinvnet.models.specs import Declared, input_specs

PLATFORM = "onnxruntime_onnx"

_TYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
_WHERE = r"^\[ONNXRuntimeError\] : \d+ : \w+ : (/\S+:\d+ [^)]*\) )?"
"""What ONNX Runtime says before a reason: a number, and the place in its own code."""


def open_onnx(path: Path, told: Sequence[TensorSpec], threads: int) -> Opened:
    """Open an ONNX file, with the files of its weights if it has them beside it.

    Raises:
        UserError: if it is damaged, cannot be run, or takes what the protocol lacks.
    """
    check_installed(ONNX_RUNTIME)
    content = path.read_bytes()
    beside = _weights_beside(path, content)
    digests = [content_digest(part) for part in (content, *(f.read_bytes() for f in beside))]
    try:
        running = session(str(path) if beside else content, threads)
    except Exception as error:  # ONNX Runtime has many
        version = importlib.metadata.version("onnxruntime")
        reason = re.sub(_WHERE, "", one_line(error))
        raise UserError(f"{path}: ONNX Runtime {version} cannot run it: {reason}") from error
    for value in running.get_outputs():
        if value.type not in _TYPES:
            raise UserError(
                f"{path}: output {value.name!r} is {value.type}, which the protocol lacks"
            )
    declared = [
        Declared(value.name, _TYPES.get(value.type, value.type), _axes(value.shape))
        for value in running.get_inputs()
    ]
    inputs, max_batch = input_specs(declared, told, str(path))
    digest = digests[0] if not beside else content_digest("".join(digests).encode())
    return Opened(inputs, max_batch, PLATFORM, digest, by_session(running))


def by_session(running: Any) -> Compute:
    """Return what computes a batch by an ONNX Runtime session."""
    names = [value.name for value in running.get_outputs()]
    texts = {value.name for value in running.get_inputs() if value.type == "tensor(string)"}

    def compute(inputs: Mapping[str, np.ndarray]) -> Arrays:
        feeds = {
            name: np.vectorize(bytes.decode, otypes=[object])(array) if name in texts else array
            for name, array in inputs.items()
        }
        found = dict(zip(names, running.run(None, feeds), strict=True))
        return {
            name: np.vectorize(str.encode, otypes=[object])(array)
            if array.dtype == object
            else array
            for name, array in found.items()
        }

    return compute


def _axes(shape: Sequence[int | str | None]) -> tuple[int | str, ...]:
    return tuple("?" if size is None else size for size in shape)


def _weights_beside(path: Path, content: bytes) -> list[Path]:
    """Return the files that an ONNX file has its larger tensors in, in their order.

    Raises:
        UserError: if the file is damaged, or one of them is missing or outside its folder.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    try:
        graph = onnx.load_model_from_string(content).graph
    except Exception as error:  # the decoder's, which has no name of its own
        raise UserError(f"{path} is truncated or no ONNX file: {one_line(error)}") from error
    names = {
        entry.value
        for tensor in graph.initializer
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    folder = path.resolve().parent
    for name in sorted(names):
        place = (folder / name).resolve()
        if not place.is_relative_to(folder) or not place.is_file():
            raise UserError(f"{path} has its weights in {name}, which is not in its folder")
    return [folder / name for name in sorted(names)]
