"""Downloads of the image sets that torchvision knows."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from codedinvnet.data.finding import layouts
from codedinvnet.data.names import KNOWN
from codedinvnet.data.sources import Split
from codedinvnet.errors import UserError

_NETWORK_TIMEOUT = 30.0  # seconds without an answer; urllib would otherwise wait for ever
_STALE_SECONDS = 24 * 3600.0


def download_images(name: str, split: Split, root: Path) -> None:
    """Fetch torchvision's files into root; each is there whole or not at all."""
    from torchvision import datasets  # takes as long to import as PyTorch

    known = KNOWN[name]
    timeout = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        socket.setdefaulttimeout(_NETWORK_TIMEOUT)
        # A download that breaks off leaves nothing behind: files are moved only at the end.
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as partial:
            with contextlib.redirect_stdout(sys.stderr):  # older releases of torchvision print
                getattr(datasets, known.dataset)(partial, download=True)
            _move_files(Path(partial) / known.folder, root / known.folder, skip=(".gz",))
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError, zlib.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"could not download {name!r} into {root} ({reason}); without a network, pass "
            f"--data-dir DIR with one of: {layouts(Path('DIR'), name, split)}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _remove_stale(root: Path) -> None:
    """Remove what a download left that was killed; a young one may still be running."""
    for partial in root.glob(".partial-*"):
        if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


def _move_files(source: Path, target: Path, skip: Sequence[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in skip:
            path.replace(target / path.name)
