"""A finished protection, for this folder and for all who serve one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.cli import main
from codedinvnet.protection import distil, students
from codedinvnet.protection.folder import DESCRIPTION
from tests.conftest import once
from tests.protection.factories import FEATURES

PLACE = "tests.protection.factories"
COUNT = 2000
MADE = (0, 3)
"""Exit statuses with a protection; a backup that was trained for a moment isn't recommended."""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have backups trained for a moment."""
    monkeypatch.setattr(distil, "MOST_ROUNDS", 3)
    monkeypatch.setattr(distil, "FEWEST_STEPS", 8)
    monkeypatch.setattr(students, "WIDTHS", (8, 32))


def queries(folder: Path) -> Path:
    """Write inputs of `vectors`."""
    path = folder / "x.npy"
    np.save(path, np.random.default_rng(0).random((COUNT, FEATURES), np.float32))
    return path


def arguments(model: str, inputs: Path, out: Path, *more: str) -> list[str]:
    """Return a command line, with k = 4 and one size of backups."""
    base = ["protect", f"{PLACE}:{model}", "--inputs", str(inputs), "--out", str(out), "--k", "4"]
    base += () if "--task" in more else ("--task", "classify")
    return [*base, "--minutes", "5", *(() if "--work" in more else ("--work", "0.25")), *more]


def description(folder: Path) -> dict[str, Any]:
    """Return what a protection is."""
    found: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    return found


@pytest.fixture(scope="session")
def finished(shared: Path) -> Path:
    """A protection of `vectors`."""
    once(shared / "protect", lambda: protect(shared / "protect"))
    return shared / "protect" / "out"


def protect(folder: Path) -> None:
    """Make a protection in a new folder."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(distil, "MOST_ROUNDS", 100)
        changed.setattr(students, "WIDTHS", (32,))
        assert main(arguments("vectors", queries(folder), folder / "out", "--json")) == 0
