from __future__ import annotations

import copy

import pytest
import torch

from codedinvnet.data import ImageSet, sample_images
from codedinvnet.evaluation.inversion import inversion_report
from codedinvnet.models.bundle import Bundle, load_bundle
from codedinvnet.models.coded import invertible
from codedinvnet.nn.irevnet import IRevNet

ERRORS = ("largest_error", "mean_error", "iterations", "largest_iterations")


def test_what_was_not_inverted_has_no_error(bundle: Bundle, held_out: ImageSet) -> None:
    found = inversion_report(bundle.model, held_out, max_iterations=1, limit=2)
    assert (found["images"], found["measured"], found["not_converged"]) == (2, 0, 2)
    assert [found[key] for key in ERRORS] == [None] * 4


def test_an_inverse_without_iterations_has_taken_one(
    bundle: Bundle, held_out: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = IRevNet(bundle.model.input_shape, blocks=(1,), strides=(1,), hidden=(4,))
    monkeypatch.setattr(bundle.model, "network", network.eval())
    found = inversion_report(bundle.model, held_out, limit=3)
    assert found["measured"] == 3
    assert found["largest_error"] < 1e-4
    assert (found["iterations"], found["largest_iterations"]) == (1, 1)


def test_a_shipped_bundle_inverts_its_embeddings_to_the_tolerance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, source = load_bundle("mnist").model, sample_images("mnist")
    monkeypatch.setattr(model.network, "largest_singular_value", lambda: 0.9)  # takes 9 s
    coarse = inversion_report(model, source, tolerance=2e-4, limit=4)
    assert 1e-6 < coarse["largest_error"] <= 2e-4
    # The rounding of the latents is left in float32.
    assert inversion_report(model, source, tolerance=1e-6, limit=4)["largest_error"] <= 2e-6
    network = invertible(copy.deepcopy(model.network)).double()
    with torch.inference_mode():
        x = model.prepare(source.batch(torch.arange(4))[0]).double()
        assert float((network.inverse(network(x), tolerance=1e-6) - x).abs().max()) <= 1e-6
