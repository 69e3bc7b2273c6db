"""`codedinvnet.protect`: a protection of a model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import codedinvnet
from codedinvnet.models.onnx_file import export
from codedinvnet.models.pytorch import Network
from codedinvnet.protection import distil, run, students
from codedinvnet.protection.costs import Interval
from tests.protection.conftest import COUNT
from tests.protection.factories import FEATURES, Applied, TwoInputs

QUERIES = np.random.default_rng(0).random((COUNT, FEATURES), np.float32)


@pytest.fixture(autouse=True)
def _trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have backups trained until they are recommended, and timed as on a quiet machine."""
    times = {"model": Interval(1.0, 1.0, 1.0), "backup": Interval(0.2, 0.2, 0.2)}
    monkeypatch.setattr(run, "_times", lambda *_: times)
    monkeypatch.setattr(distil, "MOST_ROUNDS", 60)
    monkeypatch.setattr(students, "WIDTHS", (32,))


def protect(model: Any, inputs: Any, **more: Any) -> codedinvnet.Protection:
    return codedinvnet.protect(model, inputs, "classify", minutes=5, work=0.45, **more)


def test_a_module_in_memory_is_protected_and_kept(tmp_path: Path) -> None:
    model, threads = Applied(FEATURES, 3).train(), torch.get_num_threads()
    drawn = torch.get_rng_state()
    made = protect(model, torch.from_numpy(QUERIES))
    assert model.training
    assert model.first.requires_grad
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), drawn)
    new = np.random.default_rng(1).random((500, FEATURES), np.float32)
    answered = made.answer({"x": new})
    with torch.inference_mode():
        wanted = model(torch.from_numpy(new)).argmax(1).numpy()
    agrees = answered.values.argmax(1) == wanted
    assert made.limit is not None
    assert answered.released.mean() > 0.5
    assert agrees[answered.released].mean() >= 1 - 2 * made.limit
    made.save(tmp_path / "kept")
    kept = codedinvnet.open_protection(tmp_path / "kept").answer({"x": new})
    np.testing.assert_array_equal(kept.values, answered.values)
    np.testing.assert_array_equal(kept.released, answered.released)
    with pytest.raises(codedinvnet.UserError, match="already holds a protection"):
        made.save(tmp_path / "kept")
    assert made.description["recommended"] == made.description["table"][0]["method"]


def test_an_onnx_model_in_memory_is_protected_in_a_folder(tmp_path: Path) -> None:
    network = Network(Applied(FEATURES, 3), ["x"])
    content = export(network, {"x": torch.zeros(4, FEATURES)}, ["scores"])
    made = protect(onnx.load_from_string(content), {"x": QUERIES}, folder=tmp_path / "out")
    assert made.answer({"x": QUERIES[:5]}).values.shape == (5, 3)
    assert codedinvnet.open_protection(tmp_path / "out").output == "scores"


@pytest.mark.parametrize(
    ("inputs", "task", "message"),
    [
        (QUERIES[:50], "classify", "found 50 different inputs; at least 200 are needed"),
        (QUERIES, None, "--task classify, labels, regress or embed"),
        (QUERIES, "regress", "needs --tolerance"),
        (QUERIES[:, :5], "classify", "fails on a query"),
        ("images", "classify", "a module doesn't say what shapes it takes"),
    ],
)
def test_what_the_command_refuses_is_raised(inputs: Any, task: str | None, message: str) -> None:
    with pytest.raises(codedinvnet.UserError, match=message):
        codedinvnet.protect(Applied(FEATURES, 3), inputs, task)


def test_without_a_quick_backup_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_timed", lambda *_: 0.9)
    numbers = QUERIES[:, :5].astype(float)  # NumPy's usual floats are not the module's
    flags = QUERIES[:, 5:8] < 0.5
    with pytest.raises(codedinvnet.UserError, match=r"no backup is recommended; .* use hedging"):
        protect(TwoInputs(), {"numbers": numbers, "flags": flags})
