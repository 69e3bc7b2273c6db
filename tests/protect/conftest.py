"""A finished protection, for all tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.cli import main
from codedinvnet.errors import UserError
from codedinvnet.models import open_model
from codedinvnet.protect import distil
from codedinvnet.protect.folder import DESCRIPTION, export_part
from tests.conftest import once
from tests.models.factories import save_onnx
from tests.protect import factories
from tests.protect.factories import FEATURES

PLACE = "tests.protect.factories"
COUNT = 400
EXPORT = "codedinvnet.protect.run.export_part"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have parts trained for a moment; none is exported, which takes longer than that."""

    def refused(*_: Any) -> None:
        raise UserError("not exported")

    monkeypatch.setattr(distil, "MOST_ROUNDS", 6)
    monkeypatch.setattr(distil, "FEWEST_STEPS", 8)
    monkeypatch.setattr(EXPORT, refused)


@pytest.fixture
def exported(_short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have small backups exported for ONNX Runtime after all."""
    monkeypatch.setattr(EXPORT, export_part)


def queries(folder: Path) -> Path:
    """Write inputs of `vectors`."""
    path = folder / "x.npy"
    np.save(path, np.random.default_rng(0).random((COUNT, FEATURES), np.float32))
    return path


def arguments(model: str, inputs: Path, out: Path, *more: str) -> list[str]:
    """Return a command line, with k = 4."""
    base = ["protect", f"{PLACE}:{model}", "--inputs", str(inputs), "--out", str(out), "--k", "4"]
    return [*base, "--minutes", "5", *more]


def killed(*_: Any, **__: Any) -> None:
    """Stand for what a user stops with Ctrl-C."""
    raise KeyboardInterrupt


def description(folder: Path) -> dict[str, Any]:
    """Return what a protection is."""
    found: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    return found


@pytest.fixture(scope="session")
def finished(shared: Path) -> Path:
    """A protection of `vectors` by all methods, with labels and an own backup."""
    once(shared / "protect", lambda: protect(shared / "protect"))
    return shared / "protect" / "out"


def protect(folder: Path) -> None:
    folder.mkdir()
    inputs = queries(folder)
    labels = folder / "labels.npy"
    model = open_model(f"{PLACE}:vectors")
    np.save(labels, model.run({"x": np.load(inputs)})["output"].argmax(1))
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(distil, "MOST_ROUNDS", 60)
        changed.setattr(EXPORT, export_part)
        methods = ("--methods", "small-backup,code,approxifer,nercc")
        smaller = save_onnx(factories.smaller, folder / "smaller.onnx")
        more = ("--labels", str(labels), "--backup", str(smaller), "--json", *methods)
        assert main(arguments("vectors", inputs, folder / "out", *more)) == 0
