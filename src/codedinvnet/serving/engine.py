"""ONNX Runtime in place of PyTorch, for what a worker computes on a processor.

PyTorch computes a convolution of one image as a copy and a product, and pays for every call; ONNX
Runtime, which computes in float32, too, takes a half to a third of the time. Only the shapes that a
service meets most are exported: one image, and one full group. The extra `onnx` installs what it
needs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codedinvnet import nn as nn_code
from codedinvnet.checkpoint import (
    file_digest,
    module_tensors,
    tensors_digest,
    write_atomically,
)
from codedinvnet.classifier import Network
from codedinvnet.data.finding import cache_dir
from codedinvnet.errors import UserError

PYTORCH, ONNX_RUNTIME = "pytorch", "onnxruntime"
ENGINES = (PYTORCH, ONNX_RUNTIME)
NEEDED = ("onnx", "onnxruntime", "onnxscript")


def check_engine(engine: str, device: str) -> None:
    """Refuse an engine that does not compute on a device.

    Raises:
        UserError: saying so.
    """
    if engine == ONNX_RUNTIME and torch.device(device).type != "cpu":
        raise UserError(f"the engine {engine} computes on processors only, not on {device}")


def check_installed(engine: str) -> None:
    """Refuse an engine that is not installed here.

    Raises:
        UserError: naming what is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if engine == ONNX_RUNTIME and missing:
        raise UserError(
            f"the engine {engine} needs {', '.join(missing)}: pip install 'codedinvnet[onnx]'"
        )


class Exported:
    """A module's forward pass for inputs of certain shapes, by ONNX Runtime.

    The export takes seconds and is kept in the cache folder, named by what it depends on.

    Args:
        module: in evaluation mode.
        examples: inputs of these shapes; float32, on the processor.

    Raises:
        UserError: if the module cannot be exported, or ONNX Runtime cannot run the export.
    """

    def __init__(self, module: nn.Module, examples: Sequence[Tensor]) -> None:
        self.shapes = [example.shape for example in examples]
        path = _kept_at(module, examples)
        self.session: Any = None
        if path is not None:
            with suppress(Exception):  # not there, cut short, or too new: ONNX Runtime has many
                self.session = _session(path.read_bytes())
        if self.session is None:
            content = _export(module, examples)
            try:
                self.session = _session(content)
            except Exception as error:  # ONNX Runtime has many, one for a release that is too old
                reason = str(error).strip().splitlines()[-1]
                raise UserError(
                    f"the engine {ONNX_RUNTIME} cannot run {type(module).__name__}: {reason}"
                ) from error
            if path is not None:
                with suppress(OSError):  # without a cache it is exported every time
                    write_atomically(path, content)
        self.names = [value.name for value in self.session.get_inputs()]

    def fits(self, *inputs: Tensor) -> bool:
        """Tell whether inputs have the shapes, type and place that were exported."""
        return all(
            x.shape == shape and x.dtype == torch.float32 and x.device.type == "cpu"
            for x, shape in zip(inputs, self.shapes, strict=True)
        )

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        arrays = [x.numpy() for x in inputs]
        found = self.session.run(None, dict(zip(self.names, arrays, strict=True)))
        return [torch.from_numpy(array) for array in found]


class ExportedModule(nn.Module):
    """A module whose inputs of certain shapes ONNX Runtime computes, and PyTorch all else.

    Args:
        module: in evaluation mode; maps tensors to a tensor, or to a tuple of tensors.
        examples: inputs of these shapes.
    """

    def __init__(self, module: nn.Module, examples: Sequence[Tensor]) -> None:
        super().__init__()
        self.module, self.exported = module, Exported(module, examples)
        with torch.inference_mode():
            self.several = isinstance(module(*examples), tuple)

    def forward(self, *inputs: Tensor) -> Any:
        """Map inputs as the module does."""
        if not self.exported.fits(*inputs):
            return self.module(*inputs)
        found = self.exported(*inputs)
        return tuple(found) if self.several else found[0]


def run_by_onnxruntime(networks: Iterable[Network]) -> None:
    """Let ONNX Runtime compute networks, in place.

    Args:
        networks: on the processor; that nothing else uses.

    Raises:
        UserError: if one of them cannot be exported.
    """
    done: dict[nn.Module, nn.Module] = {}
    for network in list(networks):
        if network.module not in done:
            done[network.module] = ExportedModule(network.module, network.examples)
        setattr(network.owner, network.name, done[network.module])


def is_kept(networks: Iterable[Network]) -> bool:
    """Tell whether the cache, if there is one, has what else takes `run_by_onnxruntime` seconds."""
    paths = [_kept_at(network.module, network.examples) for network in networks]
    return all(path is None or path.is_file() for path in paths)


def _session(content: bytes) -> Any:
    """Return what runs an export."""
    # The official builds report to their makers, and keep a thread and a database for it, which
    # workers would inherit.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # With one thread there is no pool of them, so that a session outlives the fork of a worker.
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what goes wrong is raised
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _export(module: nn.Module, examples: Sequence[Tensor]) -> bytes:
    """Return a module as ONNX.

    Raises:
        UserError: if PyTorch cannot export it.
    """
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            redirect_stdout(sys.stderr),  # where some releases of onnxscript print
        ):
            warnings.simplefilter("ignore")  # of PyTorch, about itself
            program = torch.onnx.export(module, tuple(examples), dynamo=True, verbose=False)
        assert program is not None
        content: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # PyTorch's exporter raises whatever it meets
        reason = str(error).strip().splitlines()
        raise UserError(
            f"the engine {ONNX_RUNTIME}: PyTorch {torch.__version__} cannot export "
            f"{type(module).__name__}: {reason[0] if reason else type(error).__name__}"
        ) from error
    return content


def _version(name: str) -> str:
    """Return a library's version, also of one that another distribution installs (GPU builds)."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module(name).__version__)


def _kept_at(module: nn.Module, examples: Sequence[Tensor]) -> Path | None:
    """Return where the cache has an export, or would; None without a cache.

    The name says what it depends on: the module, shapes, our code and the libraries that export.
    """
    try:
        folder = cache_dir() / "onnx"
    except RuntimeError:  # this user has no home
        return None
    plain = (bool, int, float, str, tuple)
    parts = [
        (name, type(part).__name__, {k: v for k, v in vars(part).items() if isinstance(v, plain)})
        for name, part in module.named_modules()
    ]
    code = [Path(__file__), *sorted(Path(nn_code.__file__).parent.glob("*.py"))]
    words = (
        parts,
        tensors_digest(module_tensors({"module": module})),
        [tuple(example.shape) for example in examples],
        [file_digest(path) for path in code],
        torch.__version__,
        [_version(name) for name in NEEDED],
    )
    return folder / f"{hashlib.sha256(repr(words).encode()).hexdigest()[:24]}.onnx"
