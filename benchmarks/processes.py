"""Commands that benchmarks and tests run next to them, and what Linux says of processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from codedinvnet.common.errors import UserError

START_TIMEOUT = 120.0
STOP_TIMEOUT = 20.0
ADDRESS = r"(http://\S+?)(?=[:,]? )"
"""What a server's first line says of where it is."""


@dataclass(frozen=True)
class Running:
    """A command that is ready.

    Attributes:
        process: the command's process.
        found: what was found in its first line.
    """

    process: subprocess.Popen[str]
    found: re.Match[str]

    @property
    def address(self) -> str:
        """Where the server is."""
        return self.found[1]

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self.process.pid


@contextmanager
def running(
    *command: str,
    ready: str = ADDRESS,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Run a command that prints a line when it is ready, and stop it in the end.

    SIGTERM lets it drain, unless the body was interrupted or failed: then no one waits for it.

    Args:
        command: the program and its arguments.
        ready: the pattern of its first line; "": it prints none, and is not waited for.
        log: the file to which its standard error is added.
        env: its environment, if that is not this process's.
    """
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with open(log or os.devnull, "ab") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
        )
    assert process.stdout is not None
    patience = threading.Timer(START_TIMEOUT, process.kill)
    try:
        patience.start()
        found = re.search(ready, process.stdout.readline() if ready else "")
        patience.cancel()
        if found is None:
            told = f"see {log}" if log is not None else "run it to see why"
            raise UserError(f"the server did not start: {' '.join(command)}; {told}")
        yield Running(process, found)
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
    finally:
        patience.cancel()
        process.kill()  # its workers end with it
        process.wait()
        process.stdout.close()


def process_stat(pid: int) -> list[str]:
    """Return the fields behind a process's name: state, parent …; [] if it is gone (Linux)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return stat.rsplit(")", 1)[1].split()


def descendants(pid: int) -> list[int]:
    """Return the processes below one, at any depth (Linux)."""
    fields = {int(path.name): process_stat(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    parents = {child: int(stat[1]) for child, stat in fields.items() if stat}
    found, new = [], [pid]
    while new:
        new = [child for child, above in parents.items() if above in new]
        found += new
    return found
