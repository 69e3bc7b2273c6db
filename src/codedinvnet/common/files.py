"""Files: written whole or not at all; JSON that a user may have written or damaged."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from codedinvnet.common.errors import UserError

_PIECE = 1 << 20
"""Bytes of a file that are in memory at once while its digest is made."""
_DIGITS = 16


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Of a symbolic link it is the target that is written.

    Raises:
        OSError: of this path, if it cannot be written.
    """
    target = path.resolve()
    name = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with name.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except OSError as error:  # of the temporary file, perhaps, which the user never named
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # it has its place
            name.unlink()


def check_writable(path: Path) -> None:
    """Make sure that a file can be written, before the work whose results it shall hold."""
    place = path.absolute()
    found = next(one for one in (place, *place.parents) if one.exists())
    kind, fits = ("file", found.is_file()) if found == place else ("folder", found.is_dir())
    if not fits or not os.access(found, os.W_OK):
        raise UserError(f"cannot write to {path}: {found} is no {kind} that may be changed")


def check_folder(path: Path, option: str) -> None:
    """Make sure that files can be put into a folder, which need not be there.

    Args:
        path: the folder.
        option: that named it.
    """
    try:
        check_writable(path / "any")
    except UserError as error:
        reason = str(error).partition(": ")[2]
        raise UserError(f"{option}: cannot write into {path}: {reason}") from error


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a value as JSON, readable if it is indented, whole or not at all."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def file_digest(path: Path) -> str:
    """Return a short digest of a file's content, which tells whether it has changed since."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()[:_DIGITS]


def content_digest(content: bytes) -> str:
    """Return what `file_digest` does of a file that holds this."""
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


def free_backup_name(path: Path) -> Path:
    """Return the first of PATH-before-1, PATH-before-2, … that does not exist."""
    numbered = (path.with_name(f"{path.name}-before-{n}") for n in itertools.count(1))
    return next(name for name in numbered if not name.exists())


def parse_json(text: str | bytes, where: str) -> Any:
    """Return what JSON says.

    Args:
        text: the JSON; bytes are UTF-8.
        where: what it is or where it stands, for errors.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def read_json(path: Path, what: str = "") -> Any:
    """Return what a JSON file says.

    Args:
        path: the file.
        what: what it is, for errors, such as "the grid".
    """
    name = f"{what} {path}".strip()
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from error
    return parse_json(text, name)
