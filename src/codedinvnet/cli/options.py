"""Options that a command takes from its command line, or from a JSON file by the same names.

`add_options` makes a parser of an `Options` model, and `options_of` a model of what was said. What
nothing says is left to the model's defaults.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from codedinvnet.common.errors import UserError, nearest
from codedinvnet.common.options import Help, Options, help_of

Kind = TypeVar("Kind", bound=Options)
WORDS = {"int_parsing": "must be a whole number", "float_parsing": "must be a number"}
"""What is said in place of pydantic's own words, by its types of errors."""


def add_options(sub: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Add the options of a model to a command, by groups, with `--config` and `--set`."""
    groups: dict[str, Any] = {}
    rare = []
    for name, flag in kind.names():
        field = kind.model_fields[name]
        about = help_of(field)
        text = f"{about.text} ({_default(field, about)})"
        if about.rare:
            rare.append(textwrap.fill(f"  {flag:<20}{text}", 79, subsequent_indent=" " * 22))
            continue
        if not about.group:
            sub.add_argument(name, nargs="?", default=argparse.SUPPRESS, help=about.text)
            continue
        if about.group not in groups:
            groups[about.group] = sub.add_argument_group(about.group)
        how: dict[str, Any] = {"action": "store_true"} if field.annotation is bool else {}
        if get_origin(field.annotation) is tuple:
            how["action"] = "append"
        if field.annotation is not bool and about.metavar:
            how["metavar"] = about.metavar
        groups[about.group].add_argument(
            f"--{flag}", dest=name, default=argparse.SUPPRESS, help=text, **how
        )
    more = sub.add_argument_group("settings")
    more.add_argument(
        "--config", metavar="FILE", help="take options from this JSON file; flags come first"
    )
    if rare:
        more.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="one of the settings below; repeatable",
        )
        settings = "\n".join(rare).replace("%", "%%")
        sub.epilog = f"settings, for --set and --config:\n{settings}\n\n{sub.epilog or ''}"


def _default(field: FieldInfo, about: Help) -> str:
    """Return an option's default in words, with its unit."""
    if field.is_required():
        return "needed"
    if field.default is None or field.default is False or field.default in ("", ()):
        return f"default: {about.unset or 'none'}"
    value = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
    return f"default: {value} {about.unit}".rstrip()


def options_of(arguments: argparse.Namespace, kind: type[Kind]) -> Kind:
    """Return a command's options: the command line's, then the file's, then the defaults.

    Args:
        arguments: of a command with `add_options`.
        kind: its model.
    """
    names = {flag: name for name, flag in kind.names()}
    flags = {name: flag for flag, name in names.items()}
    found: dict[str, Any] = {}
    if arguments.config is not None:
        where = f"--config: {arguments.config}"
        for flag, value in _file(Path(arguments.config), where).items():
            name = _known(flag, names, where)
            found[name] = _checked(kind, name, f"{where}: {flag}", value, text=False)
    for word in getattr(arguments, "set", []):
        flag, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--set: must be NAME=VALUE, got {word!r}")
        found |= _from_text(kind, {flag: value}, "--set")
    for name, flag in flags.items():
        if name in vars(arguments):
            where = f"--{flag}" if help_of(kind.model_fields[name]).group else flag.upper()
            found[name] = _checked(kind, name, where, vars(arguments)[name], text=True)
        elif name not in found and kind.model_fields[name].is_required():
            raise UserError(f"{flag.upper()}: is needed, on the command line or in --config FILE")
    options = kind(**found)
    try:
        options.check()
    except UserError as error:
        flag, _, why = str(error).removeprefix("--").partition(": ")
        if arguments.config is None or names.get(flag) in (None, *vars(arguments)):
            raise
        raise UserError(f"--config: {arguments.config}: {flag}: {why}") from error
    return options


def from_text(kind: type[Kind], given: Mapping[str, str]) -> Kind:
    """Return options of their names and values as text; several values have commas between them."""
    return kind(**_from_text(kind, given, "options"))


def _from_text(kind: type[Options], given: Mapping[str, str], where: str) -> dict[str, Any]:
    names = {flag: name for name, flag in kind.names()}
    found = {}
    for flag, value in given.items():
        name = _known(flag.replace("_", "-"), names, where)
        several = get_origin(kind.model_fields[name].annotation) is tuple
        text: Any = value.split(",") if several else value
        found[name] = _checked(kind, name, f"{where} {flag}", text, text=True)
    return found


def _file(path: Path, where: str) -> dict[str, Any]:
    from codedinvnet.common.files import read_json

    found = read_json(path, "--config:")
    if not isinstance(found, dict):
        raise UserError(f"{where}: must be a JSON object of options")
    return found


def _known(flag: str, names: Mapping[str, str], where: str) -> str:
    """Return the field of a name in a file or behind `--set`."""
    if flag not in names:
        near = nearest(flag, names)
        hint = f", did you mean {near!r}?" if near else ""
        raise UserError(f"{where}: {flag!r} is no option{hint}")
    return names[flag]


def _checked(kind: type[Options], name: str, where: str, value: Any, *, text: bool) -> Any:
    """Return a value as the model has it.

    Args:
        kind: the model.
        name: the field's.
        where: what says it, for errors.
        value: of JSON, or the command line's text.
        text: which of the two.
    """
    field = kind.model_fields[name]
    annotation: Any = field.annotation
    if field.metadata:
        annotation = Annotated[(annotation, *field.metadata)]
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    try:
        if text:
            return adapter.validate_python(value)
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        message = WORDS.get(fault["type"], fault["msg"].replace("Input should", "must"))
        shown = json.dumps(value) if not text else value
        raise UserError(f"{where}: {message[0].lower()}{message[1:]}, got {shown}") from error
