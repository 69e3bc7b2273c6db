"""Mirrored images, where there is no time to ask the model about all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.protect.distil import BudgetStage
from tests.conftest import Command
from tests.protect.conftest import COUNT, arguments, description, killed


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images, about which a model seems to answer slowly."""
    x = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr("codedinvnet.protect.parts.check_teacher", lambda *_: 1000.0)
    return tmp_path / "x.npy"


@pytest.mark.parametrize(("model", "mirrors"), [("colours", True), ("images", False)])
def test_images_are_mirrored_only_if_the_model_keeps_its_answers(
    model: str, mirrors: bool, call: Command, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What most of an image shows is the same then, and a weighted sum of its pixels is not."""
    seen: list[int] = []
    mirrored = BudgetStage.mirrored

    def noted(stage: BudgetStage, images: Any, *more: Any) -> Any:
        seen.append(len(images))
        return mirrored(stage, images, *more)

    monkeypatch.setattr(BudgetStage, "mirrored", noted)
    out = pictures.parent / "out"
    outcome = call(*arguments(model, pictures, out, "--methods", "small-backup"))
    assert outcome.code == 0, outcome.err
    assert bool(seen) == mirrors
    told = [note for note in description(out)["notes"] if "not mirrored in training" in note]
    assert len(told) == (not mirrors)


def test_a_training_that_goes_on_mirrors_as_it_did(
    call: Command, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments("images", pictures, pictures.parent / "out", "--methods", "small-backup")
    with monkeypatch.context() as changed:
        changed.setattr("codedinvnet.protect.parts.train_stage", killed)  # it is planned
        assert call(*words).code == 130
    asked = "codedinvnet.protect.parts.agreement_when"
    monkeypatch.setattr(asked, lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr(BudgetStage, "mirrored", lambda *_: pytest.fail("mirrored"))
    outcome = call(*words)
    assert outcome.code == 0, outcome.err
    (note,) = (n for n in description(pictures.parent / "out")["notes"] if "mirrored" in n)
    assert "--minutes" in note
