"""Weights on disk: safetensors with a JSON header, written whole or not at all, never unpickled."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from codedinvnet.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT_VERSION = 1
PART = "part"
"""The name of a method's trained part among the modules of its checkpoint."""
ABANDONED = 3600.0
"""Seconds after which nobody is still writing a file."""
_HEADER = "codedinvnet"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Of a symbolic link it is the target that is written.

    Raises:
        OSError: of this path, if it cannot be written.
    """
    try:
        _write_atomically(path.resolve(), content)
    except OSError as error:  # of the temporary file, perhaps, which the user never named
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}-"
    for part in path.parent.glob(f"{glob.escape(prefix)}????????"):  # of a killed writer
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):  # an interrupt after it was put in its place
            os.unlink(name)
        raise


def check_writable(path: Path) -> None:
    """Make sure that a file can be written, before the work whose results it shall hold.

    Raises:
        UserError: saying why it cannot.
    """
    folder = next((parent for parent in path.absolute().parents if parent.exists()), path)
    if path.is_dir():
        reason = "it is a folder"
    elif path.exists() and not path.is_file():
        reason = "it is no ordinary file"
    elif path.exists() and not os.access(path, os.W_OK):
        reason = "it may not be changed"
    elif not folder.is_dir():
        reason = f"{folder} is no folder"
    elif not os.access(folder, os.W_OK):
        reason = f"nothing may be written into {folder}"
    else:
        return
    raise UserError(f"cannot write to {path}: {reason}")


def check_folder(path: Path, option: str) -> None:
    """Make sure that files can be put into a folder, which need not be there.

    Args:
        path: the folder.
        option: that named it.

    Raises:
        UserError: saying why they cannot.
    """
    try:
        check_writable(path / "any")
    except UserError as error:
        reason = str(error).partition(": ")[2]
        raise UserError(f"{option}: cannot write into {path}: {reason}") from error


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    write_atomically(path, text.encode())


def write_picture(path: Path, figure: Figure) -> None:
    """Draw a Matplotlib figure into a file of the format that its name ends with."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=110)
    write_atomically(path, drawn.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header to one safetensors file."""
    text = json.dumps({"format_version": FORMAT_VERSION, **header})
    write_atomically(path, save(_plain(tensors), metadata={_HEADER: text}))


def file_digest(path: Path) -> str:
    """Return a short digest of a file's content, which tells whether it has changed since."""
    return content_digest(path.read_bytes())


def content_digest(content: bytes) -> str:
    """Return what `file_digest` does of a file that holds this."""
    return hashlib.sha256(content).hexdigest()[:16]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a short digest of names, shapes, types and values, equal for equal ones alone."""
    return hashlib.sha256(save(_plain(tensors))).hexdigest()[:16]


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_checkpoint` wrote.

    Raises:
        UserError: if it is missing, cut short, a pickle, of another program or format version.
    """
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
    if not isinstance(header, dict):
        raise UserError(f"{path} was not written by codedinvnet: its header is not an object")
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
    """Fill modules from a mapping that `module_tensors` made; other keys are ignored.

    Raises:
        UserError: if a tensor is missing, unexpected, or of another shape; nothing is loaded then.
    """
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
