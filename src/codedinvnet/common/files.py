"""Files: written whole or not at all; JSON that a user may have written or damaged."""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import json
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codedinvnet.common.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABANDONED = 3600.0
"""A temporary file that is older than this many seconds was left by a killed writer."""
_PIECE = 1 << 20
"""Bytes of a file that are in memory at once while its digest is made."""
_DIGITS = 16


def write_atomically(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Of a symbolic link it is the target that is written.

    Args:
        path: the file.
        content: what it shall hold.
        mode: who may do what with it, less what the umask takes away.

    Raises:
        OSError: of this path, if it cannot be written.
    """
    try:
        _write_atomically(path.resolve(), content, mode)
    except OSError as error:  # of the temporary file, perhaps, which the user never named
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_atomically(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}-"
    for left in path.parent.glob(f"{glob.escape(prefix)}????????"):  # of a killed writer
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
    name = path.parent / f"{prefix}{secrets.token_hex(4)}"
    # The kernel takes the umask from this mode; mkstemp's would be the owner's alone.
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):  # an interrupt after it was put in its place
            os.unlink(name)
        raise


def check_writable(path: Path) -> None:
    """Make sure that a file can be written, before the work whose results it shall hold."""
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
    """
    try:
        check_writable(path / ".any")
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
        read = text.decode() if isinstance(text, bytes) else text
        return json.loads(read)
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
    """
    name = f"{what} {path}".strip()
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from error
    return parse_json(text, name)
