"""Rows that are older than what they measure: how they are told, and how pages show them."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

import codedinvnet

SIMULATED = ("driver.py", "scheduler", "simulation")
"""What decides a simulated figure, in the package."""
NOTE = re.compile(r"\n*> \*\*Stale\*\*: (.*)")


@cache
def simulated_digest(package: Path = Path(codedinvnet.__file__).parent) -> str:
    """Return a digest of the source of scheduler, driver and simulator."""
    found = hashlib.sha256()
    for name in SIMULATED:
        for path in sorted([package / name, *(package / name).rglob("*.py")]):
            if path.is_file():
                found.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def note(what: str, command: str) -> str:
    """Return the line of a page below a table with stale rows."""
    return f"> **Stale**: {what}; `{command}` makes them again."
