"""Reads a `torch.export` program so that loading and running it can do nothing but compute.

`torch.export.load` trusts its file. It unpickles example inputs, and weights and constants that are
marked so; it evaluates sizes as Python text; it pastes names unescaped into Python text that it
runs; a node may name any function that can be reached from `torch`, the operating system's among
them; and a shared library in the file is loaded. Here a copy of the file is loaded that has been
looked through before, without example inputs and guards.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import math
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload

from codedinvnet.errors import UserError, one_line

_MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/"
_PLAIN_FILES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|\.format_version|version"
    r"|extra/.*|data/weights/weight_\d+|data/constants/tensor_\d+"
)
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_CALLED = ("target", "as_operator")
_NAMES = ("name", "as_name", "forward_arg_names")
"""What becomes names of variables, arguments and subgraphs in the Python text of the program."""
_PATHS = ("parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name")
"""What becomes paths of attributes there, some of them in quotes."""
_STRANGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What looking through a description of another form raises."""
_LIBRARIES = ("aten", "prims")
_FILES = ("from_file",)
"""Operators of theirs that read or write files."""
_HIGHER_ORDER = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond")
_OPERATORS = re.compile(
    r"getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_"
)
_SYMBOLIC = re.compile(r"torch\.(_sym_\w+|sym_\w+)")
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_NUMBERS = ("as_int", "as_float", "as_bool", "min_val", "max_val")
"""What SymPy would read as Python text if it were text."""
_ON_ONE_LINE = re.compile(r"[\w +*/%()<>=.,'-]*", re.ASCII)
"""Sizes, which SymPy reads without line breaks: comments and continuations would then change."""
_ARITHMETIC = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.UnaryOp),
    *(ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow),
)
_FUNCTIONS = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Min|Max|Abs|(Floor|Ceil|Clean)Div|ModularIndexing"
    r"|Where|(Python)?Mod|(Ceil|Floor|Trunc|Round)ToInt|ToFloat|TruncToFloat|[LR]Shift|PowByNatural"
    r"|FloatPow|(Int|Float)TrueDiv|Identity|Equality|Unequality|(Strict)?(Less|Greater)Than"
    r"|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not"
)


class _Refused(Exception):
    """Says what stands in the file that is not loaded."""


def load_program(content: bytes, where: str) -> torch.export.ExportedProgram:
    """Return the program in the content of a file.

    Args:
        content: the content of a file that `torch.export.save` wrote.
        where: the file, for messages.

    Raises:
        UserError: if it is no such file, another release's, or would do more than compute.
    """
    try:
        files = _files(content)
        # Not an archive of torch.export as PyTorch 2.9 and later write it.
        if _MODEL not in files or not set(_CONFIGS) <= files.keys():
            raise UserError(
                f"{where} is no program as torch.export.save of this release (PyTorch "
                f"{torch.__version__}) writes it: export the model anew"
            )
        description = json.loads(files[_MODEL])
        _check(description, files)
    except _Refused as refused:
        raise UserError(
            f"{where} is not loaded, since it could do more than compute: {refused}"
        ) from refused
    except (zipfile.BadZipFile, *_STRANGE) as error:
        raise UserError(f"{where} is truncated or no .pt2 file: {one_line(error)}") from error
    description["guards_code"] = []  # Python text; `Signature` has what the inputs must be
    files[_MODEL] = json.dumps(description).encode()
    try:
        with _quiet():
            return torch.export.load(io.BytesIO(_archive(files)))
    except Exception as error:  # PyTorch raises whatever it meets
        found = description.get("torch_version", "another release")
        raise UserError(
            f"{where} was exported by PyTorch {found}, and PyTorch {torch.__version__} cannot load "
            f"it ({one_line(error)}): export the model anew"
        ) from error


def _files(content: bytes) -> dict[str, bytes]:
    """Return the files of an archive, by their names below its one folder."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _archive(files: dict[str, bytes]) -> bytes:
    """Return an archive of these files, without what is pickled."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(f"model/{name}", b"" if name.startswith(_SAMPLES) else content)
    return packed.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep PyTorch from logging what it also raises, and from warning about itself."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _check(description: dict[str, Any], files: dict[str, bytes]) -> None:
    """Raise _Refused of what is more than a computation."""
    for name in files:
        known = name in (_MODEL, *_CONFIGS) or name.startswith(_SAMPLES)
        if not known and not _PLAIN_FILES.fullmatch(name):
            raise _Refused(f"it holds {name}")
    for config in _CONFIGS:
        for name, payload in json.loads(files[config])["config"].items():
            if payload["use_pickle"] or not _PLAIN_FILES.fullmatch(
                f"{config.rpartition('/')[0]}/{payload['path_name']}"
            ):
                raise _Refused(f"{name} is pickled")
    for key, value in _items(description):
        if key == "expr_str" and not _is_arithmetic(value):
            raise _Refused(f"a size is {str(value)[:80]!r}")
        if key in _CALLED and isinstance(value, str) and not _is_computation(value):
            raise _Refused(f"it calls {value}")
        if key in _NAMES and not _are_names(value):
            raise _Refused(f"a name is {str(value)[:80]!r}")
        if key in _NUMBERS and not isinstance(value, (int, float, type(None))):
            raise _Refused(f"a number is {str(value)[:80]!r}")
        if key in _PATHS and not _is_path(value):
            raise _Refused(f"a weight's name is {str(value)[:80]!r}")
        if key in ("in_spec", "out_spec") and isinstance(value, str) and value:
            spec = json.loads(value)[1]
            _check_containers(spec)
            if key == "in_spec":
                _check_keywords(spec)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of all objects in a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _items(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _items(inner)


def _are_names(value: Any) -> bool:
    """Tell whether a name, or all names of a list, can be nothing else in Python text.

    Keywords are let through: operators have arguments of such names, and one that is pasted is no
    more than a syntax error. The tables of a graph have names as keys, and objects as values.
    """
    if isinstance(value, list):
        return all(isinstance(name, str) and name.isidentifier() for name in value)
    return not value or isinstance(value, dict) or (isinstance(value, str) and value.isidentifier())


def _is_path(value: Any) -> bool:
    """Tell whether it ends at an attribute of the program's, in quotes or not."""
    if isinstance(value, dict):  # the table of a graph has a tensor of that name
        return True
    return isinstance(value, str) and all(
        step.isprintable()
        and not set(step) & set("\"'\\")
        and not (step.startswith("__") and step.endswith("__"))
        for step in value.split(".")
    )


def _is_arithmetic(text: Any) -> bool:
    if not isinstance(text, str) or not _ON_ONE_LINE.fullmatch(text):
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, TypeError, ValueError, RecursionError):
        return False
    return all(
        isinstance(node, _ARITHMETIC)
        and (not isinstance(node, ast.Call) or _FUNCTIONS.fullmatch(_called(node)))
        and (not isinstance(node, ast.Constant) or _is_plain(node.value))
        for node in nodes
    )


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _is_plain(value: Any) -> bool:
    return value.isidentifier() if isinstance(value, str) else isinstance(value, (int, float))


def _is_computation(target: str) -> bool:
    """Tell whether the target of a node is an operator of PyTorch's, or arithmetic on sizes."""
    first, *names = target.split(".")
    if first == "_operator" and len(names) == 1:
        return _OPERATORS.fullmatch(names[0]) is not None
    if first == "math" and len(names) == 1:
        return not names[0].startswith("_") and callable(getattr(math, names[0], None))
    if _SYMBOLIC.fullmatch(target):
        return True
    if first != "torch" or names[:1] != ["ops"] or len(names) not in (3, 4):
        return False
    if names[1] == "higher_order":
        return len(names) == 3 and names[2] in _HIGHER_ORDER
    if names[1] not in _LIBRARIES or names[2] in _FILES or len(names) != 4:
        return False
    packet = getattr(getattr(torch.ops, names[1]), names[2], None)
    return isinstance(getattr(packet, names[3], None), OpOverload)


def _check_containers(spec: dict[str, Any]) -> None:
    """Refuse inputs and outputs that are in objects of classes, which are imported by name."""
    kind, context = spec["type"], spec["context"]
    keys = None if context is None else json.loads(context)
    plain = keys is None or (isinstance(keys, list) and all(isinstance(key, str) for key in keys))
    if not plain or kind not in (None, *_CONTAINERS):
        raise _Refused(f"its inputs or outputs are in a {kind}: take and return tensors or dicts")
    for inner in spec["children_spec"]:
        _check_containers(inner)


def _check_keywords(spec: dict[str, Any]) -> None:
    """Refuse keyword arguments that are no names: the second of the arguments and these."""
    for inner in spec["children_spec"][1:]:
        keys = json.loads(inner["context"] or "null")
        if not _are_names(keys):
            raise _Refused(f"a keyword argument is {str(keys)[:80]!r}")
