"""ONNX Runtime in place of PyTorch, for what a worker computes on a processor.

PyTorch computes a convolution of one image as a copy and a product, and pays for every call: with
ONNX Runtime f takes about a third of the time for one image. It computes in float32, too. Only the
shapes that a service meets most are exported: one image, and one full group. The extra `onnx`
installs what it needs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from codedinvnet import nn as nn_code
from codedinvnet.checkpoint import (
    file_digest,
    module_tensors,
    tensors_digest,
    write_atomically,
)
from codedinvnet.data.finding import cache_dir
from codedinvnet.errors import UserError
from codedinvnet.methods import CodedMethod
from codedinvnet.nn.fusion import Encoding, FusionEncoder, uniform_weights
from codedinvnet.nn.resnet import ResNet
from codedinvnet.nn.transform import TransformSequence
from codedinvnet.serving.metrics import log_event

PYTORCH, ONNX_RUNTIME = "pytorch", "onnxruntime"
ENGINES = (PYTORCH, ONNX_RUNTIME)
NEEDED = ("onnx", "onnxruntime", "onnxscript")
NETWORKS = (TransformSequence, ResNet)
"""What is computed for one image: the i-ResNet, the i-RevNet, and plain classifiers."""


def check_engine(engine: str, device: str) -> None:
    """Refuse an engine that does not exist, is not installed, or does not compute there.

    Raises:
        UserError: saying which.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine: {engine!r} is not one of {', '.join(ENGINES)}")
    if engine == PYTORCH:
        return
    if torch.device(device).type != "cpu":
        raise UserError(f"--engine: {engine} computes on processors only, not on {device}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--engine: {engine} needs {', '.join(missing)}: pip install 'codedinvnet[onnx]'"
        )


class Exported:
    """A module's forward pass for inputs of certain shapes, by ONNX Runtime.

    The export takes seconds and is kept in the cache folder, named by what it depends on.

    Args:
        module: in evaluation mode.
        examples: inputs of these shapes; float32, on the processor.

    Raises:
        UserError: if PyTorch cannot export the module.
    """

    def __init__(self, module: nn.Module, examples: Sequence[Tensor]) -> None:
        import onnxruntime

        self.shapes = [example.shape for example in examples]
        options = onnxruntime.SessionOptions()
        # With one thread there is no pool of them, so that a session outlives the fork of a worker.
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            _exported(module, examples), options, providers=["CPUExecutionProvider"]
        )
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


class ExportedNetwork(nn.Module):
    """A network whose single images ONNX Runtime computes, and PyTorch all else.

    Args:
        network: in evaluation mode; maps (B, C, H, W) to one tensor.
        image_shape: (C, H, W) of its input.
    """

    def __init__(self, network: nn.Module, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.network = network
        self.exported = Exported(network, [torch.zeros(1, *image_shape)])

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) as the network does."""
        found: Tensor = self.exported(x)[0] if self.exported.fits(x) else self.network(x)
        return found

    def inverse(self, z: Tensor, **options: Any) -> Tensor:
        """Return the network's inverse (the oracle's code asks for it), by PyTorch."""
        return cast(TransformSequence, self.network).inverse(z, **options)


class ExportedEncoder(FusionEncoder):
    """A fusion encoder whose single full groups ONNX Runtime computes, and PyTorch all else.

    Args:
        encoder: in evaluation mode.
        group_shape: (k, C, H, W) of a full group.
    """

    def __init__(self, encoder: FusionEncoder, group_shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.side_features, self.keeps_apart = encoder.side_features, encoder.keeps_apart
        group = torch.zeros(1, *group_shape)
        self.exported = Exported(_Encode(encoder), [group, uniform_weights(group)])

    def encode(self, x: Tensor, weights: Tensor) -> Encoding:
        if not self.exported.fits(x, weights):
            return self.encoder.encode(x, weights)
        parity, *side = self.exported(x, weights)
        return Encoding(parity, side[0] if side else x.new_zeros(*x.shape[:2], 0))


class _Encode(nn.Module):
    """An encoder as a module of tensors; side features of length 0 are no output."""

    def __init__(self, encoder: FusionEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        parity, side = self.encoder.encode(x, weights)
        return (parity, side) if self.encoder.side_features else (parity,)


def run_by_onnxruntime(method: CodedMethod, image_shape: tuple[int, int, int]) -> None:
    """Let ONNX Runtime compute a method's networks and its encoder, in place.

    Args:
        method: on the processor; one that nothing else uses.
        image_shape: (C, H, W) of an image with its padding.

    Raises:
        UserError: if PyTorch cannot export one of them.
    """
    done: dict[nn.Module, nn.Module] = {}

    def replaced(module: nn.Module) -> nn.Module:
        if module not in done:
            done[module] = (
                ExportedEncoder(module, (method.k, *image_shape))
                if isinstance(module, FusionEncoder)
                else ExportedNetwork(module, image_shape)
            )
        return done[module]

    def walk(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, (*NETWORKS, FusionEncoder)):
                setattr(module, name, replaced(child))
            elif child not in done.values():
                walk(child)

    for value in vars(method).values():
        if isinstance(value, nn.Module):
            walk(value)


def _exported(module: nn.Module, examples: Sequence[Tensor]) -> bytes:
    """Return a module as ONNX, from the cache if it is there."""
    path = cache_dir() / "onnx" / f"{_digest(module, examples)}.onnx"
    with suppress(OSError):
        return path.read_bytes()
    log_event("exporting for ONNX Runtime", module=type(module).__name__, kept=str(path))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch, about itself
            program = torch.onnx.export(module.eval(), tuple(examples), dynamo=True, verbose=False)
        assert program is not None
        content: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # PyTorch's exporter raises whatever it meets
        reason = str(error).strip().splitlines()
        raise UserError(
            f"--engine: PyTorch {torch.__version__} cannot export {type(module).__name__}: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    with suppress(OSError):  # without a cache it is exported every time
        write_atomically(path, content)
    return content


def _digest(module: nn.Module, examples: Sequence[Tensor]) -> str:
    """Return a name for what an export depends on: the module, shapes, our code and PyTorch's."""
    plain = (bool, int, float, str, tuple)
    parts = [
        (name, type(part).__name__, {k: v for k, v in vars(part).items() if isinstance(v, plain)})
        for name, part in module.named_modules()
    ]
    words = (
        parts,
        tensors_digest(module_tensors({"module": module})),
        [tuple(example.shape) for example in examples],
        [file_digest(path) for path in sorted(Path(nn_code.__file__).parent.glob("*.py"))],
        torch.__version__,
    )
    return hashlib.sha256(repr(words).encode()).hexdigest()[:24]
