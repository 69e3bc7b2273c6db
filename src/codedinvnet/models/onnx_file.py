"""ONNX files, which ONNX Runtime computes, and to which PyTorch's modules are exported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from codedinvnet.common.devices import denormals_kept
from codedinvnet.common.errors import UserError, one_line
from codedinvnet.common.files import content_digest, file_digest
from codedinvnet.models.base import DATATYPES, TensorSpec, check_told
from codedinvnet.models.probe import Arrays, Compute, Opened

PLATFORM = "onnxruntime_onnx"
NEEDED = ("onnx", "onnxruntime", "onnxscript")
"""Packages that the extra `onnx` installs."""

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


def check_installed() -> None:
    """Refuse to go on without the packages that ONNX files need."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        how = "pip install 'codedinvnet[onnx]', in a clone -e bundles -e '.[onnx]'"
        raise UserError(f"ONNX files need {', '.join(missing)}: {how}")


def open_onnx(path: Path, told: Sequence[TensorSpec], threads: int) -> Opened:
    """Open an ONNX file, with the files of its weights next to it if it has any."""
    check_installed()
    content, model = _parsed(path)
    beside = sorted({_weights_file(path, tensor) for tensor in _external(model)})
    try:
        running = _session(str(path) if beside else content, threads)
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
    inputs, max_batch = _input_specs(running.get_inputs(), told, str(path))
    digest = content_digest(content)
    if beside:
        digest = content_digest("".join([digest, *map(file_digest, beside)]).encode())
    return Opened(inputs, max_batch, PLATFORM, digest, _by_session(running))


def _session(model: bytes | str, threads: int) -> Any:
    """Return what runs an ONNX model."""
    # The official builds report to their makers, and keep a thread and a database for it, which
    # workers would inherit.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # With one thread there is no pool of them, so that a session outlives the fork of a worker.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # For threads of its own; the calling one decides for itself (`devices.flush_denormals`).
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.log_severity_level = 4  # what goes wrong is raised
    with denormals_kept():
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _input_specs(
    declared: Sequence[Any], told: Sequence[TensorSpec], where: str
) -> tuple[tuple[TensorSpec, ...], int | None]:
    """Return the inputs of one query, and how many queries the model takes at once.

    The batch is the first axis of every input. It is free, or of size 1.
    """
    if not declared:
        raise UserError(f"{where} has no input")
    check_told(told, [value.name for value in declared], where)
    known = {spec.name: spec for spec in told}
    specs = tuple(_input_spec(value, known.get(value.name), where) for value in declared)
    fixed = [value.name for value in declared if isinstance(value.shape[0], int)]
    if fixed and len(fixed) < len(declared):
        raise UserError(f"{where}: input {fixed[0]!r} has no free batch axis, though others have")
    return specs, 1 if fixed else None


def _input_spec(value: Any, told: TensorSpec | None, where: str) -> TensorSpec:
    """Return an input as a session declares it; a free axis has a name, or None."""
    place, datatype = f"{where}: input {value.name!r}", _TYPES.get(value.type, value.type)
    if datatype not in DATATYPES:
        raise UserError(f"{place} is {datatype}, which the protocol lacks")
    if not value.shape:
        raise UserError(f"{place} is a single value: it has no batch axis")
    shape = f"({', '.join('?' if size is None else str(size) for size in value.shape)})"
    first, *rest = value.shape
    if told is not None:
        fits = len(rest) == len(told.shape) and all(
            size == given or not isinstance(size, int)
            for size, given in zip(rest, told.shape, strict=True)
        )
        if told.datatype != datatype or not fits:
            raise UserError(f"input {told.name}: {where} has {datatype} {shape}")
        rest = list(told.shape)
    if not all(isinstance(size, int) for size in rest):
        if isinstance(first, int):
            raise UserError(f"{place} is {shape}: the free axis must come first, and be the batch")
        raise UserError(
            f"{place} has several axes of no fixed size, any of which may be the batch: {shape}; "
            f"give the shape of one query with --input {value.name}:{datatype}:SHAPE"
        )
    if isinstance(first, int) and first != 1:
        raise UserError(
            f"{place} is {shape}: its first axis must be a free batch, or a batch of 1, not {first}"
        )
    return TensorSpec(value.name, datatype, tuple(rest))


def _by_session(running: Any) -> Compute:
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


def _parsed(path: Path) -> tuple[bytes, Any]:
    """Return the content of an ONNX file, and what it says."""
    import onnx

    try:
        content = path.read_bytes()
        return content, onnx.load_model_from_string(content)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
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


def _weights_file(path: Path, tensor: Any) -> Path:
    """Return the file of a tensor's values, which must lie below the model's folder.

    A link counts if it leads below that folder, or into that of the model's own file, as the links
    of Hugging Face's cache do.
    """
    from onnx.external_data_helper import ExternalDataInfo

    folder, name = path.parent, ExternalDataInfo(tensor).location
    place = folder / name
    if ".." not in Path(name).parts and place.is_relative_to(folder) and place.is_file():
        found = place.resolve()
        if found.is_relative_to(folder.resolve()) or found.parent == path.resolve().parent:
            return place
    raise UserError(f"{path} has its weights in {name}, which is not in its folder")


def export(module: nn.Module, examples: Mapping[str, Tensor], outputs: Sequence[str]) -> bytes:
    """Return a module of `*tensors` as ONNX, for batches of any size.

    Args:
        module: the module.
        examples: name -> a batch of two queries or more (PyTorch takes a size of 1 for one that
            stays), of each input in their order.
        outputs: the names of its outputs.
    """
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            redirect_stdout(sys.stderr),  # where some releases of onnxscript print
        ):
            warnings.simplefilter("ignore")  # of PyTorch, about itself
            program = torch.onnx.export(
                module,
                tuple(examples.values()),
                input_names=list(examples),
                output_names=list(outputs),
                dynamic_shapes=(tuple({0: torch.export.Dim.DYNAMIC} for _ in examples),),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        content: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # PyTorch's exporter raises whatever it meets
        raise UserError(
            f"PyTorch {torch.__version__} cannot export {type(module).__name__} to ONNX: "
            f"{one_line(error)}"
        ) from error
    return content
