"""ONNX files, which ONNX Runtime computes."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codedinvnet.common.engines import ONNX_RUNTIME, check_installed
from codedinvnet.common.errors import UserError, one_line
from codedinvnet.common.files import content_digest, file_digest
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
    """Open an ONNX file, with the files of its weights next to it if it has any."""
    check_installed(ONNX_RUNTIME)
    content = path.read_bytes()
    beside = _weights_beside(path, _parsed(path, content))
    try:
        running = session(str(path) if beside else content, threads)
    except Exception as error:  # ONNX Runtime has many
        version = importlib.metadata.version("onnxruntime")
        reason = re.sub(_WHERE, "", one_line(error))
        raise UserError(f"{path}: ONNX Runtime {version} cannot run it: {reason}") from error
    for value in running.get_outputs():
        if value.type not in _TYPES:
            hint = ""
            if value.type.startswith("seq(map("):
                hint = ": export it without ZipMap (skl2onnx: options={'zipmap': False})"
            raise UserError(
                f"{path}: output {value.name!r} is {value.type}, which the protocol lacks{hint}"
            )
    declared = [
        Declared(value.name, _TYPES.get(value.type, value.type), _axes(value.shape))
        for value in running.get_inputs()
    ]
    inputs, max_batch = input_specs(declared, told, str(path))
    digest = content_digest(content)
    if beside:
        digests = [file_digest(path.parent / name) for name in beside]
        digest = content_digest("".join([digest, *digests]).encode())
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


def whole_onnx(path: Path) -> Any:
    """Return the `onnx.ModelProto` of an ONNX file, with the weights of the files next to it.

    The library's own loader takes no links.
    """
    from onnx.external_data_helper import ExternalDataInfo

    model = _parsed(path, path.read_bytes())
    for tensor in _external(model):
        told = ExternalDataInfo(tensor)
        _check_beside(path, told.location)
        with (path.parent / told.location).open("rb") as file:
            file.seek(told.offset or 0)
            tensor.raw_data = file.read(-1 if told.length is None else told.length)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return model


def _axes(shape: Sequence[int | str | None]) -> tuple[int | str, ...]:
    return tuple("?" if size is None else size for size in shape)


def _weights_beside(path: Path, model: Any) -> list[str]:
    """Return the names of the files that an ONNX file has its larger tensors in, in their order."""
    from onnx.external_data_helper import ExternalDataInfo

    names = sorted({ExternalDataInfo(tensor).location for tensor in _external(model)})
    for name in names:
        _check_beside(path, name)
    return names


def _parsed(path: Path, content: bytes) -> Any:
    import onnx

    try:
        return onnx.load_model_from_string(content)
    except Exception as error:  # the decoder's, which has no name of its own
        raise UserError(f"{path} is truncated or no ONNX file: {one_line(error)}") from error


def _external(message: Any) -> Iterator[Any]:
    """Yield the tensors of a protocol buffer that have their values in other files.

    They are those of graphs, of nodes' attributes, and of graphs in these.
    """
    import onnx

    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL:
            yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _external(inner)


def _check_beside(path: Path, name: str) -> None:
    """Refuse weights that are in no file below a model's folder.

    A link counts if it leads below that folder, or into that of the model's own file, as the links
    of Hugging Face's cache do.
    """
    folder, place = path.parent, path.parent / name
    if ".." not in Path(name).parts and place.is_relative_to(folder) and place.is_file():
        found = place.resolve()
        if found.is_relative_to(folder.resolve()) or found.parent == path.resolve().parent:
            return
    raise UserError(f"{path} has its weights in {name}, which is not in its folder")
