"""Options of a command as one pydantic model: each with its default, unit, help and group.

`codedinvnet.cli.options` makes the command line, `--help` and `--config` of such a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from codedinvnet.common.errors import UserError


class Help(NamedTuple):
    """What `--help` says of an option."""

    text: str
    group: str = ""
    """Its heading; "" for the positional argument."""
    unset: str = ""
    """What happens without a value, where the default is none."""
    unit: str = ""
    metavar: str | None = None
    rare: bool = False
    """Whether it has no flag of its own: `--set NAME=VALUE`, or a line of the file, says it."""
    flag: str = ""
    """Where it differs from the field's name."""


def option(default: Any, text: str, group: str = "", **more: Any) -> Any:
    """Return the field of an option.

    Args:
        default: its value if nothing is said; `...` if it is needed.
        text: for `--help`.
        group: see `Help`.
        **more: other attributes of `Help`, and constraints of pydantic's `Field`.
    """
    about = {name: more.pop(name) for name in Help._fields if name in more}
    extra: Any = {"help": Help(text, group, **about)._asdict()}
    return Field(default, json_schema_extra=extra, **more)


def help_of(field: FieldInfo) -> Help:
    """Return what `--help` says of a field."""
    extra: Any = field.json_schema_extra or {}
    return Help(**extra["help"])


class Options(BaseModel):
    """The base of a command's options. Values must have the declared type."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @classmethod
    def names(cls) -> Iterator[tuple[str, str]]:
        """Yield each field's name, and what the command line and a file call it."""
        for name, field in cls.model_fields.items():
            yield name, help_of(field).flag or name.replace("_", "-")

    def check(self) -> None:
        """Refuse what does not fit together.

        Raises:
            UserError: beginning with the flag.
        """

    def refuse(self, name: str, why: str) -> UserError:
        """Return the error that refuses a field's value."""
        about, said = help_of(type(self).model_fields[name]), dict(type(self).names())[name]
        dashes = "--set " if about.rare else "--" if about.group else ""
        return UserError(f"{dashes}{said}: {why}")
