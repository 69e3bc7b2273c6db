"""All methods by name: this package's, and those of a user's own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.berrut import ApproxIFER
from codedinvnet.codes.invnet import AverageImage, CodedInvNet, Oracle, PaperInvNet
from codedinvnet.codes.method import Method
from codedinvnet.codes.nercc import NeRCC
from codedinvnet.codes.parm import ParM
from codedinvnet.codes.plain import Plain, Replication
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import file_digest
from codedinvnet.common.user_code import import_user_module

OWN: tuple[type[Method], ...] = (
    *(CodedInvNet, SmallBackup, ApproxIFER, NeRCC, ParM, PaperInvNet, AverageImage),
    *(Plain, Replication, Oracle),
)
"""This package's, in the order of tables: ours, its rivals, other encoders, bounds."""
METHODS: Mapping[str, Method] = {kind.name: kind() for kind in OWN}
"""The same by name."""
UNTRAINED = (ApproxIFER.name, NeRCC.name)
"""Those that go around any model and need no training, the cheapest to decode of each kind."""
OURS = CodedInvNet.name
"""The method that is served by default, and that others are compared with."""
_found: dict[str, Method] = {}
"""Those that were found elsewhere, by the text that named them and by name."""


class UnknownMethod(UserError):
    """A method that this package does not have, and that names no file."""


def find_method(text: str) -> Method:
    """Return a method by its name, or by `FILE.py:CLASS`."""
    found = METHODS.get(text) or _found.get(text)
    if found is not None:
        return found
    path, colon, name = text.rpartition(":")
    if colon and path.endswith(".py"):
        return _keep(text, _in_file(Path(path), name))
    raise UnknownMethod(
        f"{text!r} is not one of {', '.join(METHODS)}; a method of your own is FILE.py:CLASS"
    )


def known_method(name: str) -> Method | None:
    """Return a method that a row names; None for one whose file nobody named here.

    Rows may be anybody's, so no file is run that they name.
    """
    if ":" in name:
        return _found.get(name)
    try:
        return find_method(name)
    except UserError:
        return None


def _keep(text: str, method: Method) -> Method:
    if method.name in METHODS:
        raise UserError(f"{text}: this package has a method {method.name!r}: choose another name")
    other = _found.get(method.name, method)
    if other.digest != method.digest:
        raise UserError(
            f"{text}: its name is {method.name!r}, as that of another method in {other.file}: rows "
            "are told apart by names, so give it another one"
        )
    _found[text] = _found[method.name] = method
    return method


def _in_file(path: Path, name: str) -> Method:
    """Make a method of a class in a user's file, which is run."""
    if not path.is_file():
        raise UserError(f"there is no file {path} with a method {name}")
    kind = getattr(import_user_module(str(path), f"{path}:{name}"), name, None)
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise UserError(f"{path} has no subclass {name} of Method")
    if lacking := kind.lacking():
        raise UserError(f"{path}: {name} lacks {', '.join(lacking)}")
    method = kind()
    method.file, method.digest = str(path), f"{file_digest(path)}:{kind.__qualname__}"
    return method
