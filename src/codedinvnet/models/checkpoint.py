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
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        # Asked only now: the length that a safetensors file begins with may look like a pickle.
        with open(path, "rb") as file:
            start = file.read(2)
        if start == b"PK" or start[:1] == b"\x80":
            raise UserError(
                f"{path} is a pickle (a torch.save file); only safetensors checkpoints are read, "
                "since unpickling runs code"
            ) from error
        raise UserError(f"{path} is truncated or not a safetensors file: {error}") from error
    try:
        header = json.loads(metadata[_HEADER])
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path} was not written by codedinvnet: its header is missing") from error
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}; this release reads version {FORMAT_VERSION}"
        )
    return tensors, header


def module_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Flatten the state of several modules into one mapping, `name.key` each."""
    return {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


def load_modules(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], where: Path
) -> None:
    """Fill modules from a mapping that `module_tensors` made; other keys are ignored."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, module in modules.items():
        prefix = f"{name}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        expected = module.state_dict()
        for key in sorted(expected.keys() | state.keys()):
            if key not in state:
                problem = f"{prefix}{key} is missing"
            elif key not in expected:
                problem = f"{prefix}{key} is not part of this architecture"
            elif expected[key].shape != state[key].shape:
                found, wanted = tuple(state[key].shape), tuple(expected[key].shape)
                problem = f"{prefix}{key} has shape {found}, expected {wanted}"
            else:
                continue
            raise UserError(f"{where} holds another architecture: {problem}")
        states[name] = state
    for name, module in modules.items():
        module.load_state_dict(states[name])


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
