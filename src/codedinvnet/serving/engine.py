"""ONNX Runtime in place of PyTorch, for what a worker computes on a processor.

PyTorch computes a convolution of one image as a copy and a product, and pays for every call; ONNX
Runtime, which computes in float32, too, takes a half to a third of the time. Only the shapes that a
service meets most are exported: one image, and one full group. The extra `onnx` installs what it
needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from codedinvnet.methods import CodedMethod
from codedinvnet.models.runtime import exported_session, kept_at
from codedinvnet.nn.fusion import Encoding, FusionEncoder, uniform_weights
from codedinvnet.nn.resnet import ResNet
from codedinvnet.nn.transform import TransformSequence

NETWORKS = (TransformSequence, ResNet)
"""What is computed for one image: the i-ResNet, the i-RevNet, and plain classifiers."""


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
        self.session = exported_session(module, examples)
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
        exported: its forward pass for one image.
    """

    def __init__(self, network: nn.Module, exported: Exported) -> None:
        super().__init__()
        self.network, self.exported = network, exported

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
        exported: its pass for one full group and the group's weights.
    """

    def __init__(self, encoder: FusionEncoder, exported: Exported) -> None:
        super().__init__()
        self.encoder, self.exported = encoder, exported
        self.side_features, self.keeps_apart = encoder.side_features, encoder.keeps_apart

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


class _Part(NamedTuple):
    """A module that ONNX Runtime can take over."""

    parent: nn.Module
    name: str
    """In its parent."""
    module: nn.Module
    exports: nn.Module
    """The module, or what makes a module of tensors of it."""
    examples: Sequence[Tensor]


def _parts(method: CodedMethod, image_shape: tuple[int, int, int]) -> Iterator[_Part]:
    """Yield a method's networks and encoders, wherever they are used."""

    def walk(parent: nn.Module) -> Iterator[_Part]:
        for name, child in parent.named_children():
            if isinstance(child, FusionEncoder):
                group = torch.zeros(1, method.k, *image_shape)
                weights = uniform_weights(group)
                yield _Part(parent, name, child, _Encode(child).eval(), [group, weights])
            elif isinstance(child, NETWORKS):
                yield _Part(parent, name, child, child, [torch.zeros(1, *image_shape)])
            else:
                yield from walk(child)

    for value in vars(method).values():
        if isinstance(value, nn.Module):
            yield from walk(value)


def run_by_onnxruntime(method: CodedMethod, image_shape: tuple[int, int, int]) -> None:
    """Let ONNX Runtime compute a method's networks and its encoder, in place.

    Args:
        method: on the processor; one that nothing else uses.
        image_shape: (C, H, W) of an image with its padding.

    Raises:
        UserError: if one of them cannot be exported.
    """
    done: dict[nn.Module, nn.Module] = {}
    for part in list(_parts(method, image_shape)):
        if part.module not in done:
            exported = Exported(part.exports, part.examples)
            done[part.module] = (
                ExportedEncoder(part.module, exported)
                if isinstance(part.module, FusionEncoder)
                else ExportedNetwork(part.module, exported)
            )
        setattr(part.parent, part.name, done[part.module])


def is_kept(method: CodedMethod, image_shape: tuple[int, int, int]) -> bool:
    """Tell whether the cache, if there is one, has what else takes `run_by_onnxruntime` seconds."""
    paths = [kept_at(part.exports, part.examples) for part in _parts(method, image_shape)]
    return all(path is None or path.is_file() for path in paths)
