"""ONNX Runtime in place of PyTorch, for what a worker computes on a processor.

PyTorch computes a convolution of one image as a copy and a product, and pays for every call; ONNX
Runtime, which computes in float32, too, takes a half to a third of the time. Only the shapes that a
service meets most are exported: one image, and one full group. The extra `onnx` installs what it
needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codedinvnet.models.network import Network
from codedinvnet.models.runtime import exported_session, kept_at


class Exported:
    """A module's forward pass for inputs of certain shapes, by ONNX Runtime.

    The export takes seconds and is kept in the cache folder, named by what it depends on.

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


class ExportedModule(nn.Module):
    """A module whose inputs of certain shapes ONNX Runtime computes, and PyTorch all others."""

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
    """Let ONNX Runtime compute networks that nothing else uses, in place.

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
    paths = [kept_at(network.module, network.examples) for network in networks]
    return all(path is None or path.is_file() for path in paths)
