"""Options that a command takes from its command line, or from a JSON file by the same names.

What neither says is left to the defaults of the command's own settings.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from codedinvnet.cli.common import seed
from codedinvnet.errors import UserError, nearest

Settings = TypeVar("Settings")

KINDS: Mapping[Any, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    seed: ("a whole number", (int,)),
    Path: ("a path, as text", (str,)),
    None: ("text", (str,)),
}
"""What parses an option -> what is asked for in a file, and the types that JSON has for it."""


def add_config(sub: argparse.ArgumentParser) -> None:
    """Add `--config` to a command that has all its other options already."""
    known = {name_of(action): action for action in sub._actions if action.dest != "help"}
    for action in known.values():
        action.default = argparse.SUPPRESS  # so that only what was given is there
    sub.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="take options from this JSON file, by their names here without the dashes; the "
        "command line comes first (none)",
    )
    sub.set_defaults(known=known)


def name_of(action: argparse.Action) -> str:
    """Return what a file calls an option."""
    return action.option_strings[-1].removeprefix("--") if action.option_strings else action.dest


def settings_of(arguments: argparse.Namespace, kind: type[Settings]) -> Settings:
    """Return a command's settings: the command line's, then the file's, then the defaults.

    Args:
        arguments: of a command with `add_config`.
        kind: a dataclass whose fields are the destinations of the command's options.

    Raises:
        UserError: if the file cannot be read, has unknown names or wrong types, or nobody says
            what the command needs.
    """
    given = dict(vars(arguments))
    path, known = given.pop("config"), given.pop("known")
    del given["run"]
    found = {**({} if path is None else read_config(path, known)), **given}
    for action in known.values():
        if not action.option_strings and action.dest not in found:
            name = action.dest
            raise UserError(f"{name.upper()}: is needed, on the command line or in --config FILE")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})


def read_config(path: Path, known: Mapping[str, argparse.Action]) -> dict[str, Any]:
    """Return the options in a file by their destinations.

    Args:
        path: a JSON file.
        known: the options that there are, by their names.

    Raises:
        UserError: naming the file and the option.
    """
    from codedinvnet.files import read_json

    found, where = read_json(path, "--config:"), f"--config: {path}"
    if not isinstance(found, dict):
        raise UserError(f"{where}: must be a JSON object of options")
    values = {}
    for name, value in found.items():
        if name not in known:
            near = nearest(name, known)
            hint = f", did you mean {near!r}?" if near else ""
            raise UserError(f"{where}: {name!r} is no option{hint}")
        values[known[name].dest] = _value(f"{where}: {name}", value, known[name])
    return values


def _value(where: str, value: Any, action: argparse.Action) -> Any:
    """Return an option's value as the command line would have it."""
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise UserError(f"{where}: must be true or false, got {json.dumps(value)}")
        return value
    wanted, kinds = KINDS.get(action.type, KINDS[None])
    several = isinstance(action, argparse._AppendAction)
    values = value if several and isinstance(value, list) else [value]
    if (several and not isinstance(value, list)) or not all(
        isinstance(one, kinds) and not isinstance(one, bool) for one in values
    ):
        told = f"a list, each of it {wanted}" if several else wanted
        raise UserError(f"{where}: must be {told}, got {json.dumps(value)}")
    parse: Any = action.type or str
    try:
        converted = [parse(one) for one in values]
    except (ValueError, OverflowError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{where}: {error}") from error
    return converted if several else converted[0]
