"""ONNX Runtime, to which PyTorch's modules are exported."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codedinvnet import nn as nn_code
from codedinvnet.common.devices import denormals_kept
from codedinvnet.common.engines import ENGINES, ONNX_RUNTIME
from codedinvnet.common.errors import UserError, one_line
from codedinvnet.common.files import file_digest, write_atomically
from codedinvnet.data import cache_dir
from codedinvnet.models.checkpoint import module_tensors, tensors_digest

_KEPT = ("codedinvnet.", "torch.nn.")
_PLAIN = (bool, int, float, str, tuple)
_CODE = (nn_code.__file__, __file__)


def exported_session(module: nn.Module, examples: Sequence[Tensor]) -> Any:
    """Return the ONNX Runtime session of a module's forward pass, for inputs of certain shapes.

    The export takes seconds. A bundle's is kept in the cache folder, named by what it depends on.
    """
    path = kept_at(module, examples)
    if path is not None:
        with suppress(Exception):  # not there, cut short, or too new: ONNX Runtime has many
            return session(path.read_bytes(), torch.get_num_threads())
    content = export(module, examples)
    try:
        found = session(content, torch.get_num_threads())
    except Exception as error:  # ONNX Runtime has many, one for a release that is too old
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"the engine {ONNX_RUNTIME} cannot run {type(module).__name__}: {reason}"
        ) from error
    if path is not None:
        with suppress(OSError):  # without a cache it is exported every time
            write_atomically(path, content)
    return found


def session(model: bytes | str, threads: int) -> Any:
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


def any_batch(inputs: int) -> tuple[Any, ...]:
    """Return the option `dynamic_shapes` with which a module of `*tensors` takes any batch.

    Its examples must be of two queries or more: a size of 1 would be taken for one that stays.
    """
    return (tuple({0: torch.export.Dim.DYNAMIC} for _ in range(inputs)),)


def export(module: nn.Module, examples: Sequence[Tensor], **options: Any) -> bytes:
    """Return a module as ONNX."""
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            redirect_stdout(sys.stderr),  # where some releases of onnxscript print
        ):
            warnings.simplefilter("ignore")  # of PyTorch, about itself
            program = torch.onnx.export(
                module, tuple(examples), dynamo=True, verbose=False, **options
            )
        assert program is not None
        content: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # PyTorch's exporter raises whatever it meets
        raise UserError(
            f"the engine {ONNX_RUNTIME}: PyTorch {torch.__version__} cannot export "
            f"{type(module).__name__}: {one_line(error)}"
        ) from error
    return content


def kept_at(module: nn.Module, examples: Sequence[Tensor]) -> Path | None:
    """Return where the cache keeps an export, or would; None if it keeps none.

    The name is a digest of the module's weights and plain attributes, shapes, and the code that
    exports. Modules of a user's own classes are not kept, because their code may do anything.
    """
    parts = [*module.modules()]
    if not all(type(part).__module__.startswith(_KEPT) for part in parts):
        return None
    try:
        folder = cache_dir() / "onnx"
    except RuntimeError:  # this user has no home
        return None
    code = [path for place in _CODE for path in sorted(Path(place).parent.glob("*.py"))]
    libraries = map(importlib.import_module, ENGINES[ONNX_RUNTIME].needed)
    words = (
        tensors_digest(module_tensors({"module": module})),
        [(type(part), sorted(_plain_attributes(part))) for part in parts],
        [(tuple(example.shape), str(example.dtype)) for example in examples],
        [file_digest(path) for path in code],
        importlib.metadata.version("codedinvnet"),
        [torch.__version__, *(library.__version__ for library in libraries)],
    )
    return folder / f"{hashlib.sha256(repr(words).encode()).hexdigest()[:24]}.onnx"


def _plain_attributes(module: nn.Module) -> list[tuple[str, object]]:
    """Return the attributes that say what a module computes."""
    return [(key, value) for key, value in vars(module).items() if type(value) in _PLAIN]
