"""What a process of the service holds: memory, file descriptors (Linux), and a port."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def memory(pid: int) -> int:
    """Return a process's resident bytes (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    """Return how many file descriptors a process has open (Linux)."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def free_port() -> int:
    """Return a port of this machine that nobody listens on, for now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
