"""What is stored of a bundle's approximate answers, and the commands that make and check it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.method import given_by
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import file_digest
from codedinvnet.models.bundle import Bundle, load_bundle, shipped_bundles
from codedinvnet.models.checkpoint import PART, module_tensors, save_checkpoint
from codedinvnet.protection.bound import Curve
from codedinvnet.protection.calibration import (
    DECODED,
    FILE,
    GUESSED,
    Calibration,
    Kind,
    calibration_of,
    load_calibration,
)
from tests.conftest import Command


@pytest.fixture
def copy(bundle_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of a bundle that a test may write to."""
    return Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))


def test_a_group_goes_by_the_next_larger_size(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    curves = {
        Kind("code", k, DECODED): Curve.of(random.random((200, k)), random.random((200, k)) < 0.9)
        for k in (2, 4)
    }
    Calibration("weights", 400, curves).save(tmp_path / FILE)
    stored = load_calibration(tmp_path, "weights")
    for size, k in ((1, 2), (2, 2), (3, 4), (4, 4)):
        curve = stored.curve("code", size)
        assert curve is not None
        expected = curves[Kind("code", k, DECODED)]
        assert curve.thresholds.tolist() == expected.thresholds.tolist()  # none is rounded down
        assert curve.released.tolist() == expected.released.tolist()
    assert stored.curve("code", 5) is None
    assert stored.curve("code", 2, GUESSED) is None


def test_a_trained_part_has_the_curves_that_it_made(tmp_path: Path) -> None:
    curve = Curve.of(np.ones((9, 1)), np.ones((9, 1), bool))
    curves = {Kind(name, k, DECODED): curve for name in ("backup", "code") for k in (4, 10)}
    Calibration("weights", 9, curves, {"backup-k4": "a", "backup-k10": "b"}).save(tmp_path / FILE)
    stored = load_calibration(tmp_path, "weights")
    for k, digest, sizes in ((10, "b", range(1, 11)), (4, "a", range(1, 5)), (10, "a", ())):
        found = stored.of_part("backup", k, digest)
        assert [n for n in range(1, 11) if found.curve("backup", n) is not None] == [*sizes]
        assert {kind.k for kind in found.curves if kind.method == "backup"} <= {k}
        assert found.curve("code", 3) is not None


def test_a_calibration_that_is_missing_damaged_or_of_other_weights_is_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="calibrate"):
        load_calibration(tmp_path, "weights")
    path = tmp_path / FILE
    Calibration("another", 1, {}).save(path)
    with pytest.raises(UserError, match="other weights"):
        load_calibration(tmp_path, "weights")
    for text in ('{"format_version": 1}', "[]", '{"format_version": 9, "curves": []}'):
        path.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            load_calibration(tmp_path, "weights")


@pytest.mark.parametrize("name", shipped_bundles())
def test_shipped_bundles_are_calibrated_for_their_weights(name: str) -> None:
    bundle = load_bundle(name)
    stored = load_calibration(bundle.folder, bundle.digest())
    assert stored.images == 5000
    parts = bundle.folder.glob("*-k*.safetensors")
    assert stored.parts == {part.stem: file_digest(part) for part in parts}
    for method, answer in (
        ("coded-invnet", DECODED),
        ("small-backup", DECODED),
        ("small-backup", GUESSED),
    ):
        curve = stored.curve(method, 10, answer)
        assert curve is not None
        assert curve.released[-1] == 5000
        thresholds = [curve.threshold(limit) for limit in (0.005, 0.01, 0.02)]
        assert thresholds == sorted(thresholds, reverse=True)
        assert thresholds[-1] < 1


def test_a_bundle_is_calibrated_for_its_largest_size_and_no_larger_one(
    call: Command, copy: Path, data_dir: Path
) -> None:
    info = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps({**info, "group_sizes": [2, 3]}))
    made = call("calibrate", copy, "--data-dir", data_dir, "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out)["written"] == str(copy / FILE)
    stored = load_calibration(copy, load_bundle(copy).digest())
    assert stored.curve("coded-invnet", 3) is not None
    assert stored.curve("coded-invnet", 4) is None


def save_backup(bundle: Bundle, k: int) -> None:
    """Put an untrained small backup next to a bundle's weights."""
    settings = {"method": "small-backup", "base": "invertible", "k": k, "width": 4}
    part = SmallBackup().untrained(given_by(bundle, k), settings)
    header = {"settings": {**settings, "bundle": bundle.digest()}}
    path = bundle.folder / f"small-backup-k{k}.safetensors"
    save_checkpoint(path, module_tensors({PART: part}), header)


def test_a_part_that_was_exchanged_is_not_calibrated(
    call: Command, copy: Path, data_dir: Path
) -> None:
    bundle = load_bundle(copy)
    for k in (3, 4):
        save_backup(bundle, k)
    assert call("calibrate", copy, "--data-dir", data_dir).code == 0

    def calibrated(k: int) -> bool:
        stored = calibration_of(bundle.folder, bundle.digest(), "small-backup", k)
        return stored.curve("small-backup", k) is not None

    assert calibrated(3)
    assert calibrated(4)
    save_backup(bundle, 3)
    assert not calibrated(3)
    assert calibrated(4)


def test_a_place_that_takes_no_calibration_is_refused_before_the_work(
    copy: Path, tmp_path: Path, call: Command
) -> None:
    """The images are not even looked for."""
    (copy / FILE).mkdir()
    outcome = call("calibrate", copy, "--data-dir", tmp_path / "nowhere")
    assert outcome.code == 2
    assert "calibration.json is no file that may be changed: name another file by --out" in (
        outcome.err
    )
    outcome = call("calibrate", copy, "--data-dir", tmp_path / "nowhere", "--out", tmp_path)
    assert outcome.code == 2
    assert f"cannot write to {tmp_path}: {tmp_path} is no file that may be changed" in outcome.err
