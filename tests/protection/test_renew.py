"""`codedinvnet calibrate PROTECTION`: thresholds by newer inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import codedinvnet
from codedinvnet.models import open_model
from codedinvnet.protection import renew
from codedinvnet.protection.folder import load_protection
from tests.conftest import Command
from tests.protection.conftest import PLACE, description
from tests.protection.factories import FEATURES


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "protection")


def saved(folder: Path, x: np.ndarray) -> str:
    np.save(folder.parent / "newer.npy", x)
    return str(folder.parent / "newer.npy")


def newer(count: int, features: int = FEATURES, *, hard: bool = False) -> np.ndarray:
    x = np.random.default_rng(7).random((count, features), np.float32)
    return 4 * x - 2 if hard else x


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("hard", [False, True])
def test_thresholds_are_renewed_by_newer_inputs(hard: bool, folder: Path, call: Command) -> None:
    before, x = description(folder), newer(4000, hard=hard)
    outcome = call("calibrate", str(folder), "--inputs", saved(folder, x))
    after = description(folder)
    assert outcome.code == (3 if after["recommended"] is None else 0), outcome.err
    (row,), (old,) = after["table"], before["table"]
    assert outcome.out.count(f"| {row['method']} |") == 2, "the table before, and the new one"
    assert (row["ms"], row["digest"]) == (old["ms"], old["digest"])
    assert row["inputs"] == 2000
    assert (row["agreement"][0] < old["agreement"][0] - 0.05) == hard
    limit = "0.05"
    found = codedinvnet.open_protection(folder, row["method"], float(limit)).answer({"x": x})
    assert found.released.mean() == pytest.approx(row["limits"][limit]["coverage"][0], abs=0.05)
    wanted = open_model(f"{PLACE}:vectors").run({"x": x})["output"].argmax(1)
    agrees = found.values.argmax(1) == wanted
    assert found.agreement.mean() == pytest.approx(agrees.mean(), abs=0.02)
    assert not (found.released & ~agrees).sum() > 0.05 * found.released.sum()
    if after["recommended"]:
        load_protection(folder, open_model(f"{PLACE}:vectors"))
    assert len([*folder.glob("calibration*")]) == 1


@pytest.mark.parametrize(
    ("x", "more", "message"),
    [
        (newer(50), (), r"found 50 different inputs, and .* % needs at least \d+: half"),
        (newer(2000, 5), (), r"has queries of shape \(5,\), not \(12,\)"),
        (newer(2000).astype(str), (), "not FP32"),
        (newer(2000) * np.nan, (), "different inputs"),
        (newer(2000), ("--model", f"{PLACE}:two_inputs"), "run codedinvnet protect on it"),
        (newer(2000), ("--model", "gone.onnx"), "name the protected model by --model"),
    ],
)
def test_what_does_not_fit_leaves_the_thresholds(
    x: np.ndarray, more: tuple[str, ...], message: str, folder: Path, call: Command
) -> None:
    before = contents(folder)
    outcome = call("calibrate", str(folder), "--inputs", saved(folder, x), *more)
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1
    assert_matches(message, outcome.err)
    assert contents(folder) == before


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(AssertionError, match=pattern):
        raise AssertionError(text)


def test_the_inputs_of_the_training_are_refused(
    finished: Path, folder: Path, call: Command
) -> None:
    inputs = str(finished.parent / "x.npy")
    outcome = call("calibrate", str(folder), "--inputs", inputs)
    assert outcome.code == 2
    assert "give inputs that are newer" in outcome.err


def test_a_failed_write_leaves_the_thresholds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = newer(4000)
    path, before = Path(saved(folder, x)), codedinvnet.open_protection(folder).answer({"x": x})

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(renew, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        renew.renew(folder, path)
    after = codedinvnet.open_protection(folder).answer({"x": x})
    np.testing.assert_array_equal(before.released, after.released)
    np.testing.assert_array_equal(before.agreement, after.agreement)


def test_a_protection_needs_inputs(folder: Path, call: Command) -> None:
    outcome = call("calibrate", str(folder))
    assert outcome.code == 2
    assert "--inputs" in outcome.err


def test_a_calibration_outside_of_the_folder_is_not_read(folder: Path) -> None:
    path = folder / "protection.json"
    path.write_text(json.dumps(description(folder) | {"calibration": "../calibration.json"}))
    with pytest.raises(codedinvnet.UserError, match="is damaged"):
        codedinvnet.open_protection(folder)
