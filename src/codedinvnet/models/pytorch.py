"""PyTorch's models: modules that a user's function makes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from codedinvnet.common.errors import UserError, one_line
from codedinvnet.common.files import content_digest, file_digest
from codedinvnet.common.user_code import user_module
from codedinvnet.models.base import DATATYPES, TensorSpec, check_told
from codedinvnet.models.checkpoint import differences, tensors_digest
from codedinvnet.models.probe import Arrays, Opened

PLATFORM = "pytorch"
SEED = 0
"""PyTorch's random seed while a factory runs: all workers draw the same initial weights."""
_NUMPY_TYPES = {
    getattr(torch, str(dtype)): name for name, dtype in DATATYPES.items() if name != "BYTES"
}


class Network(nn.Module):
    """A module of tensors, in the order of the inputs, whatever it takes and returns itself.

    Args:
        module: the module.
        names: of its arguments.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the outputs by their names."""
        return dict(_named("", self.module(**dict(zip(self.names, tensors, strict=True)))))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(tensors).values())


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of what a module returns: a tensor, or a dict, named or plain tuple."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping) or hasattr(value, "_asdict"):
        fields = value if isinstance(value, Mapping) else value._asdict()
        for key, inner in fields.items():
            yield from _named(f"{name}_{key}" if name else str(key), inner)
    elif isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            yield from _named(f"{name or 'output'}_{index}", inner)
    elif value is not None:
        raise UserError(f"output {name or 'output'!r} is a {type(value).__name__}, and no tensor")


def open_factory(
    name: str,
    weights: Path | None,
    told: Sequence[TensorSpec],
    device: torch.device,
) -> Opened:
    """Open what a user's function returns: a module, or a module and example inputs.

    PyTorch keeps its number of threads, whatever the user's code sets.

    Args:
        name: `package.module:function`, or `path/file.py:function`.
        weights: a safetensors file of all the module's tensors.
        told: the inputs, if the function returns no examples.
        device: the device to compute on.
    """
    place, _, attribute = name.rpartition(":")
    threads = torch.get_num_threads()
    try:
        home = user_module(place)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            made = getattr(home, attribute)()
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UserError(
            f"the factory {name} raised {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        torch.set_num_threads(threads)
    module, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise UserError(
            f"the factory {name} returned a {type(module).__name__}, and neither a torch.nn.Module "
            "nor (module, example_inputs)"
        )
    module.eval().requires_grad_(False)
    digest = _load_weights(module, weights) if weights else tensors_digest(module.state_dict())
    inputs = inputs_of(name, module, examples, told)
    code = file_digest(Path(home.__file__)) if home.__file__ else ""
    return open_module(module, inputs, content_digest(f"{digest} {code}".encode()), device)


def open_module(
    module: nn.Module, inputs: tuple[TensorSpec, ...], digest: str, device: torch.device
) -> Opened:
    """Open a module, which moves to the device."""
    network = Network(module.to(device), [spec.name for spec in inputs])

    def compute(arrays: Mapping[str, np.ndarray]) -> Arrays:
        tensors = [
            torch.from_numpy(np.require(arrays[spec.name], requirements=["C", "W"])).to(device)
            for spec in inputs
        ]
        with torch.inference_mode():
            found = network.named(tensors)
        return {name: tensor.cpu().numpy() for name, tensor in found.items()}

    return Opened(inputs, None, PLATFORM, digest, compute, network)


def _load_weights(module: nn.Module, path: Path) -> str:
    """Fill a module from a safetensors file and return the file's digest."""
    try:
        load_model(module, path)
        return file_digest(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(
            f"{path} is truncated or not a safetensors file: {one_line(error)}"
        ) from error
    except RuntimeError as error:  # PyTorch's, with a line for each kind of difference
        raise UserError(f"{path} holds another architecture: {differences(error)}") from error


def inputs_of(
    name: str, module: nn.Module, examples: Any, told: Sequence[TensorSpec]
) -> tuple[TensorSpec, ...]:
    """Return the inputs of a named factory's module, by its examples or as they were told."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    where = f"the module of {name}"
    if examples is None:
        if not told:
            raise UserError(
                f"the factory {name} returned no example inputs: return (module, example_inputs), "
                f"or give inputs as NAME:DATATYPE:SHAPE of {', '.join(named)}"
            )
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            check_told(told, named, where)
        return tuple(told)
    if told:
        raise UserError(f"inputs: the factory {name} returns example inputs, which tell them")
    if not isinstance(examples, Mapping):
        given = [examples] if isinstance(examples, Tensor) else list(examples)
        if len(given) > len(named):
            raise UserError(
                f"the factory {name} returned {len(given)} example inputs, and {where} takes "
                f"{len(named)} by name"
            )
        examples = dict(zip(named, given, strict=False))
    specs = []
    for key, value in examples.items():
        if not isinstance(value, Tensor):
            raise UserError(f"the factory {name}: the example of {key!r} is no tensor")
        if value.dtype not in _NUMPY_TYPES:
            raise UserError(f"{where}: {key!r} is {value.dtype}, which the protocol lacks")
        specs.append(TensorSpec(str(key), _NUMPY_TYPES[value.dtype], tuple(value.shape[1:])))
    return tuple(specs)
