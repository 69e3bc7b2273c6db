"""The three bundles answer as they did when they were shipped: accuracy and every probability."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from codedinvnet.models.bundle import load_bundle
from tests.golden.figures import ANSWERS, BUNDLES, COUNT, SIZES, answers, images

ACCURACY = {
    "mnist": {"normal": 98.67, "k2": 98.33, "k4": 98.67, "k10": 98.0},
    "fashion": {"normal": 92.67, "k2": 93.33, "k4": 93.0, "k10": 93.0},
    "cifar10": {"normal": 75.33, "k2": 73.67, "k4": 73.0, "k10": 70.0},
}
"""Accuracy in %, of the 300 images: normal, and recovered in groups of 2, 4 and 10."""
CLOSE = 0.02
"""Of a probability; other processors differ by 0.002 at most, and 1/255 is the file's grain."""


@pytest.fixture(scope="module", params=BUNDLES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(name: str) -> dict[str, torch.Tensor]:
    return answers(name)


@pytest.mark.parametrize("which", ["normal", *(f"k{k}" for k in SIZES)])
def test_accuracy_and_probabilities_are_those_of_the_release(
    name: str, found: dict[str, torch.Tensor], which: str
) -> None:
    _, labels = images(name)
    accuracy = 100 * float((found[which].argmax(1) == labels).double().mean())
    assert accuracy == pytest.approx(ACCURACY[name][which], abs=0.4)  # one image
    with np.load(ANSWERS) as kept:
        wanted = torch.from_numpy(kept[f"{name}_{which}"]).double() / 255
    assert (found[which] - wanted).abs().max() < CLOSE


@pytest.mark.parametrize("k", SIZES)
def test_the_bundle_decodes_what_the_served_code_decodes(
    name: str, found: dict[str, torch.Tensor], k: int
) -> None:
    bundle, (pixels, _) = load_bundle(name), images(name)
    groups = pixels.unflatten(0, (COUNT // k, k))[:3]
    latents = bundle.embed(groups.flatten(0, 1)).unflatten(0, groups.shape[:2])
    parity = bundle.encode(groups)
    for lost in range(k):
        others = torch.cat([latents[:, :lost], latents[:, lost + 1 :]], dim=1)
        decoded = bundle.decode(parity, others)
        served = found[f"k{k}"].unflatten(0, (COUNT // k, k))[:3, lost]
        assert torch.allclose(decoded, served, atol=1e-3)
    direct = bundle.classify(latents.flatten(0, 1))
    assert torch.allclose(direct, found["normal"][: len(direct)], atol=1e-3)
