"""Serve a protection's small backup as the gateway's fallback: `codedinvnet serve` in a child.

The gateway itself needs no PyTorch; the child does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from codedinvnet.common.errors import UserError, one_line
from codedinvnet.net.listening import free_port
from codedinvnet.net.logs import log_event

DESCRIPTION = "protection.json"
PAUSE = 1.0
"""Seconds until a child that ended is started again."""
STOP = 10.0
"""Seconds that it has to stop."""


def read_protection(folder: Path) -> tuple[dict[str, Any], Path]:
    """Return what a protection says of its model, and the file of the backup that it recommends.

    Raises:
        UserError: if the folder holds none, or it recommends none.
    """
    path = folder / DESCRIPTION
    try:
        found = json.loads(path.read_bytes())
        model, name = found["model"], found["recommended"]
        if not all(isinstance(model[key], str) for key in ("source", "output")):
            raise TypeError
    except OSError as error:
        raise UserError(f"--protection: cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--protection: {path} is not a protection of this release: run protect again"
        ) from error
    if name is None:
        raise UserError(f"--protection: {folder} recommends no backup: {found.get('reason')}")
    backup = folder / f"{name}.onnx"
    if not backup.is_file():
        raise UserError(f"--protection: {folder} has no backup {name!r}: run protect again")
    return model, backup


def write_backup(folder: Path, out: Path) -> str:
    """Write a protection's backup, whose output is named as the model's; return the model's name.

    Raises:
        UserError: if there is none, or the package `onnx` is missing.
    """
    try:
        import onnx
    except ImportError as error:
        how = "pip install 'codedinvnet[onnx]', in a clone -e bundles -e '.[onnx]'"
        raise UserError(f"--protection: {how}") from error
    model, path = read_protection(folder)
    try:
        onnx.checker.check_model(path)
    except Exception as error:  # of several libraries
        raise UserError(f"--protection: cannot read {path}: {one_line(error)}") from error
    shutil.copyfile(path, out)
    name = str(model["source"]).rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return name.removesuffix(".onnx")


class BackupServer:
    """A child process that serves a protection's backup on loopback, and is started again.

    Args:
        folder: the protection's.
        deadline_ms: see `GatewayOptions`.

    Attributes:
        url: of the server.
    """

    def __init__(self, folder: Path, deadline_ms: float) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        try:
            path = Path(self._scratch.name) / "backup.onnx"
            name = write_backup(folder, path)
        except BaseException:
            self._scratch.cleanup()
            raise
        self._command = [sys.executable, "-m", "codedinvnet", "serve", str(path)]
        self._command += ["--set", f"name={name}"]
        self._command += ["--policy", "uncoded", "--workers", "1", "--port", str(port)]
        self._command += ["--deadline-ms", str(deadline_ms)]
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            child = await asyncio.create_subprocess_exec(
                *self._command, stdout=asyncio.subprocess.DEVNULL
            )
            try:
                code = await child.wait()
            finally:
                if child.returncode is None:
                    child.terminate()
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(child.wait(), STOP)
                    if child.returncode is None:
                        child.kill()
            log_event("the small backup's server ended", logging.ERROR, code=code)
            await asyncio.sleep(PAUSE)

    async def stop(self) -> None:
        """End it."""
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        self._scratch.cleanup()
