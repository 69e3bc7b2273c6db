from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from codedinvnet.codes.registry import find_method
from codedinvnet.common.config import PartSettings, PixelFusionSettings
from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageSource, load_images, sample_images
from codedinvnet.evaluation.parts import DataSet, Scored
from codedinvnet.evaluation.trials import DataSetSettings, Trial
from tests.evaluation.grids import PAPER, PART

ONE_EPOCH = PartSettings(epochs=1)


def data_set(
    bundle: Path | str,
    train: ImageSource | None,
    test: ImageSource,
    folder: Path,
    split: Scored = "test",
    part: PartSettings = ONE_EPOCH,
) -> DataSet:
    paper = PixelFusionSettings.model_validate(PAPER)
    budgets: dict[str, Any] = {"backup": part, "parity": part, "paper": paper}
    settings = DataSetSettings(bundle=str(bundle), classifier=part, **budgets)
    device = torch.device("cpu")
    return DataSet("mnist", settings, train, test, folder, device, split=split)


def test_images_of_other_classes_than_a_bundles_are_refused(tmp_path: Path) -> None:
    """Of both splits: labels are places among the classes."""
    images = sample_images("mnist")
    other = replace(images, classes=images.classes[::-1])
    told = "has other classes than bundle 'mnist': label 0 is 9 instead of 0"
    for train, test in ((None, other), (other, images)):
        with pytest.raises(UserError, match=told):
            data_set("mnist", train, test, tmp_path)


OWN = """
from codedinvnet.codes.backup import SmallBackup

class Tolerant(SmallBackup):
    name = "tolerant"
    def made_with(self, given, settings):
        return {**super().made_with(given, settings), "missing": given.stragglers}
    def untrained(self, given, made_with):
        return super().untrained(given, {**made_with, "width": 1 + made_with["missing"]})
"""


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], str]:
    """Return the name of a class of a user's file."""
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return lambda name: find_method(f"{path}:{name}").name


def trial_of(method: str, bundle: Path) -> Trial:
    return Trial(method, method, "mnist", "invertible", 4, 1, 1, str(bundle), 1)


def test_a_part_that_depends_on_the_tolerance_is_that_of_its_trial(
    own: Callable[[str], str], bundle_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Trials that differ in their missing workers alone share a folder, and no part."""
    train, test = (load_images("mnist", split, data_dir=data_dir) for split in ("train", "test"))
    short = PartSettings.model_validate(PART)
    data = data_set(bundle_folder, train, test, tmp_path / "runs", part=short)
    trial = trial_of(own("Tolerant"), bundle_folder)
    one, two, again = (data.part(replace(trial, missing=missing)) for missing in (1, 2, 1))
    assert sum(p.numel() for p in one.parameters()) < sum(p.numel() for p in two.parameters())
    assert again is one
