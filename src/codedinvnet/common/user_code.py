"""Loads what a user wrote: a Python file, or a module of an installed package or of this folder."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from codedinvnet.common.errors import UserError, one_line

_BY_VALUE = ("cloudpickle", "ray.cloudpickle")
"""Picklers that would name a module which another machine cannot import."""


def user_module(place: str) -> ModuleType:
    """Import a user's file, or a module of an installed package or of this folder.

    Modules next to a file can be imported by it.

    Raises:
        Exception: whatever the user's code raises; FileNotFoundError if there is no such file.
    """
    if not place.endswith(".py"):
        _importable(Path.cwd())
        return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    _importable(path.resolve().parent)
    return load_file(path)


def import_user_module(place: str, what: str) -> ModuleType:
    """Import as `user_module` does; UserError, beginning with `what` it is for, if that fails."""
    try:
        return user_module(place)
    except Exception as error:  # whatever the user's code raises
        kind = type(error).__name__
        raise UserError(f"{what}: {kind}: {one_line(error)}") from error


def load_file(path: Path) -> ModuleType:
    """Run a user's Python file as a module; each call runs it again.

    Raises:
        Exception: whatever the file raises; no module is left behind then.
    """
    where = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"codedinvnet_file_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{where}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks itself up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    for pickler in filter(None, map(sys.modules.get, _BY_VALUE)):  # that the file has imported
        pickler.register_pickle_by_value(module)
    return module


def _importable(folder: Path) -> None:
    """Let modules of a folder be imported, after those that are installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
