"""JSON that a user may have written or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from codedinvnet.errors import UserError


def parse_json(text: str | bytes, where: str) -> Any:
    """Return what JSON says.

    Args:
        text: the JSON; bytes are UTF-8.
        where: what it is or where it stands, for errors.

    Raises:
        UserError: one line, if it is no JSON, or one that Python cannot hold (nested too deeply, or
            with a number of thousands of digits).
    """
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not JSON: it is not text") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def read_json(path: Path, what: str = "") -> Any:
    """Return what a JSON file says.

    Args:
        path: the file.
        what: what it is, for errors, such as "the grid".

    Raises:
        UserError: one line, if it cannot be read or is not JSON.
    """
    name = f"{what} {path}".strip()
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from error
    return parse_json(text, name)
