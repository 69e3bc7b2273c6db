"""A digest of a module, with all that its forward pass depends on: values, and code.

Modules are walked as pickle would walk them, which says what an object is made of; nothing is
pickled. Of classes and functions the files count in which they are written. A file of a user's
own counts with those that it imports, an installed package's with the package's version.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from codedinvnet.files import file_digest

_OWN = "codedinvnet"
_SITES = {"site-packages", "dist-packages"}
_LIBRARY = ("stdlib", "platstdlib")
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""Types whose values `repr` tells apart."""


class _NoDigestError(Exception):
    """Something has no digest that another process would come to as well."""


def module_digest(module: nn.Module) -> str | None:
    """Return a digest that is another one if the module's attributes, weights or code are others.

    What code reads elsewhere, such as a file or the environment, does not count.

    Args:
        module: the module, on any device.

    Returns:
        64 characters; None if an attribute has no digest (a lock, a class made in a function).
    """
    walk = _Walk()
    walk.words(sys.version)
    try:
        walk.add(module)
    except Exception:  # whatever an attribute raises that cannot be pickled
        return None
    return walk.digest.hexdigest()


class _Walk:
    """Adds values to a digest, each object once."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.numbers: dict[int, int] = {}
        self.alive: list[Any] = []
        """What has a number, so that no later object gets its id."""
        self.modules: set[str] = set()

    def words(self, *words: object) -> None:
        self.digest.update(f"{words!r}\n".encode())

    def add(self, value: Any) -> None:
        kind = type(value)
        if kind in (bytes, str):  # they may be large
            self.words(kind.__name__, len(value))
            self.digest.update(value if kind is bytes else value.encode(errors="surrogatepass"))
            return
        if kind in _PLAIN:
            self.words(kind.__name__, value)
            return
        if kind is tuple:  # equal ones may be one object or not
            self.words("tuple", len(value))
            for inner in value:
                self.add(inner)
            return
        if id(value) in self.numbers:
            self.words("again", self.numbers[id(value)])
            return
        self.numbers[id(value)] = len(self.alive)
        self.alive.append(value)
        if kind in (Tensor, nn.Parameter):
            self.add_tensor(value)
        elif kind in (list, dict):
            items = value if kind is list else [part for item in value.items() for part in item]
            self.words(kind.__name__, len(value))
            for inner in items:
                self.add(inner)
        elif kind in (set, frozenset):
            if not all(type(inner) in _PLAIN for inner in value):
                raise _NoDigestError
            self.words(kind.__name__, sorted(map(repr, value)))
        elif isinstance(value, ModuleType):
            self.add_code(value.__name__)
        elif isinstance(value, type):
            self.add_class(value)
        elif isinstance(value, FunctionType):
            self.add_function(value)
        elif isinstance(value, MethodType):  # pickle would say its name alone
            self.add((value.__func__, value.__self__))
        else:
            self.add_object(value)

    def add_tensor(self, value: Tensor) -> None:
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        self.words("tensor", plain.dtype, tuple(plain.shape))
        self.digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)

    def add_class(self, value: type) -> None:
        if "<locals>" in value.__qualname__:  # its methods may hold values of the function's
            raise _NoDigestError
        self.words("class", value.__module__, value.__qualname__)
        for base in value.__mro__:
            self.add_code(base.__module__)

    def add_function(self, value: FunctionType) -> None:
        code = value.__code__
        if code.co_filename.startswith("<"):  # it was made of text
            raise _NoDigestError
        constants = [constant for constant in code.co_consts if type(constant) in _PLAIN]
        self.words("function", value.__qualname__, code.co_code, code.co_names, constants)
        self.add_code(value.__globals__["__name__"])
        self.add(value.__defaults__)
        self.add(value.__kwdefaults__)
        self.add(tuple(cell.cell_contents for cell in value.__closure__ or ()))
        self.add(vars(value))

    def add_object(self, value: Any) -> None:
        """Add what pickle would make an object of; it raises if it could not."""
        made = value.__reduce_ex__(4)
        if isinstance(made, str):
            self.words("global", value.__module__, made)
            self.add_code(value.__module__)
            return
        self.words("object", len(made))
        for part in made[:3]:  # a function, its arguments, and the state
            self.add(part)
        for items in made[3:5]:  # of a list, and of a dict
            self.add(None if items is None else list(items))
        for part in made[5:]:
            self.add(part)

    def add_code(self, name: str) -> None:
        """Add the file of a module, the version of its package or the modules that it imports."""
        if name in self.modules:
            return
        self.modules.add(name)
        if name in sys.builtin_module_names:
            self.words("code", name)
            return
        module, package = sys.modules[name], sys.modules[name.partition(".")[0]]
        file = getattr(module, "__file__", None)
        self.words("code", name, file_digest(Path(file)) if file else "")
        version = _version(package)
        if version is not None:
            self.words("version", version)
        elif file or hasattr(module, "__path__"):  # a namespace package has no file
            for imported in sorted(_imported(module)):
                self.add_code(imported)
        else:
            raise _NoDigestError


def _version(package: ModuleType) -> str | None:
    """Return the version that tells what code an installed package has; None of a user's own."""
    if package.__name__ != _OWN:
        file = getattr(package, "__file__", None)
        if not file:
            return None
        path = Path(file).resolve()
        if not _SITES.intersection(path.parts):
            library = (Path(sysconfig.get_path(kind)).resolve() for kind in _LIBRARY)
            return sys.version if any(map(path.is_relative_to, library)) else None
    found = getattr(package, "__version__", None)
    with suppress(importlib.metadata.PackageNotFoundError):
        found = found or importlib.metadata.version(package.__name__)
    return str(found) if found else None


def _imported(module: ModuleType) -> set[str]:
    """Return the modules that a module's file imports, and those that its names are of."""
    found = _named_in_imports(module)
    for name, value in list(vars(module).items()):
        if not name.startswith("__"):
            is_module = isinstance(value, ModuleType)
            of = value.__name__ if is_module else getattr(value, "__module__", None)
            if isinstance(of, str):
                found.add(of)
    return {name for name in found if name in sys.modules}


def _named_in_imports(module: ModuleType) -> set[str]:
    """Return what may be modules in the import statements of a file, those in functions too."""
    file, found = getattr(module, "__file__", None), set()
    if not file or not file.endswith(".py"):
        return set()
    for node in ast.walk(ast.parse(Path(file).read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            place = "." * node.level + (node.module or "")
            of = importlib.util.resolve_name(place, module.__package__) if node.level else place
            found |= {of, *(f"{of}.{alias.name}" for alias in node.names)}
    return found
