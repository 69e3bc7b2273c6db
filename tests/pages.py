"""Pages whose commands are run, and whether these print what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
VARIES = re.compile(r"[\d.]+ ms|\{[^}]*\}")
"""Times and counts, which differ from run to run."""


class Step(NamedTuple):
    """A block of code, and the output that the page shows below it; "" if it shows none."""

    language: str
    code: str
    shown: str


def steps(page: str) -> Iterator[Step]:
    """Yield the blocks of code of a page below docs/, in their order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = FENCE.findall(text)
    for (language, code), (following, shown) in zip(found, [*found[1:], ("", "")], strict=True):
        if language != "text":
            yield Step(language, code, shown if following == "text" else "")


def is_like(shown: str, printed: str) -> bool:
    """Tell whether a command printed what a page shows: a line of `...` stands for any lines."""
    lines = [
        r"(?s:.*?)" if line.strip() == "..." else VARIES.sub("VARIES", line) + "\n"
        for line in shown.splitlines()
    ]
    pattern = "".join(each if each.startswith("(?s") else re.escape(each) for each in lines)
    return re.fullmatch(pattern, VARIES.sub("VARIES", printed)) is not None


def run(code: str, folder: Path, timeout: float = 300.0) -> str:
    """Run a block of shell commands in a folder, and return what they print."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", code],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout
