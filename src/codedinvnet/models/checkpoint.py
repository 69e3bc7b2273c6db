"""Weights on disk: safetensors with a JSON header, never unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from codedinvnet.common.errors import UserError
from codedinvnet.common.files import write_atomically

FORMAT_VERSION = 1
PART = "part"
"""The name of a method's trained part among the modules of its checkpoint."""
_HEADER = "codedinvnet"


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header to one safetensors file."""
    text = json.dumps({"format_version": FORMAT_VERSION, **header})
    write_atomically(path, save(_plain(tensors), metadata={_HEADER: text}))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a short digest of names, shapes, types and values, equal for equal ones alone."""
    return hashlib.sha256(save(_plain(tensors))).hexdigest()[:16]


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_checkpoint` wrote."""
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[_HEADER])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is truncated or not a safetensors file: {error} (pickles, which torch.save "
            "writes, are not read, since unpickling runs code)"
        ) from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by codedinvnet: its header is missing") from error
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}; this release reads version {FORMAT_VERSION}"
        )
    return tensors, header


def module_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Flatten the state of several modules into one mapping, `name.key` each."""
    return dict(nn.ModuleDict(modules).state_dict())


def load_modules(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], where: Path
) -> None:
    """Fill modules from a mapping that `module_tensors` made; other keys are ignored."""
    own = {key: value for key, value in tensors.items() if key.partition(".")[0] in modules}
    try:
        nn.ModuleDict(modules).load_state_dict(own)
    except RuntimeError as error:
        raise UserError(f"{where} holds another architecture: {differences(error)}") from error


def differences(error: RuntimeError) -> str:
    """Return what PyTorch says of a state that is not a module's, in one line."""
    told = " ".join(str(error).split()).partition(": ")[2]
    return told if len(told) <= 300 else f"{told[:300]}…"


def optimizer_tensors(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Flatten the per-parameter state of optimisers, `name.parameter.key` each."""
    return {
        f"{name}.{index}.{key}": torch.as_tensor(value)
        for name, optimizer in optimizers.items()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizers(
    optimizers: Mapping[str, torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Fill optimisers from a mapping that `optimizer_tensors` made; rates are left as they are."""
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for full, value in tensors.items():
            if full.startswith(f"{name}."):
                index, key = full.removeprefix(f"{name}.").split(".", 1)
                state.setdefault(int(index), {})[key] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
