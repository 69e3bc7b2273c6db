from __future__ import annotations

import pytest
import torch
from torch import Tensor

from codedinvnet import report
from codedinvnet.bundle import Bundle
from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.config import EncoderSettings
from codedinvnet.data import ImageSet
from codedinvnet.evaluation import Evaluation
from codedinvnet.model import CodedModel
from codedinvnet.nn.head import MosaicHead
from codedinvnet.nn.irevnet import IRevNet
from codedinvnet.report import encoder_share, figures, info_report, inversion_report


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "REPEATS", 1)


def test_report_of_evaluation_needs_every_field() -> None:
    result = Evaluation(10, 2, 5, 0.9, 0.8, 0.01, (0.7, 0.9), 0.85)
    assert figures(result) == {
        "images": 10,
        "k": 2,
        "groupings": 5,
        "normal_accuracy": 0.9,
        "recovered_accuracy": 0.8,
        "recovered_accuracy_std": 0.01,
        "worst_position_accuracy": 0.7,
        "agreement": 0.85,
    }


def test_info_of_a_bundle_with_one_size(bundle: Bundle) -> None:
    one = Bundle(bundle.info.model_copy(update={"group_sizes": (4,)}), bundle.model)
    found = info_report(one)
    assert [key for key in found if key.startswith("encoder_macs")] == ["encoder_macs_k4"]
    assert found["recovery_head_macs"] == info_report(bundle)["recovery_head_macs"] > 0


ERRORS = ("largest_error", "mean_error", "iterations", "largest_iterations")


def test_what_was_not_inverted_has_no_error(bundle: Bundle, held_out: ImageSet) -> None:
    found = inversion_report(bundle.model, held_out, max_iterations=1, limit=2)
    assert (found["images"], found["measured"], found["not_converged"]) == (2, 0, 2)
    assert [found[key] for key in ERRORS] == [None] * 4


def test_the_mean_error_is_of_the_images_that_were_inverted(
    bundle: Bundle, held_out: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "INVERSION_BATCH", 3)
    inverse, batches = bundle.model.network.inverse, [None, None, 1]  # iterations of a block

    def hurried(z: Tensor, *, max_iterations: int, **more: float) -> Tensor:
        return inverse(z, max_iterations=batches.pop(0) or max_iterations, **more)

    expected = inversion_report(bundle.model, held_out, tolerance=1e-3, limit=6)
    monkeypatch.setattr(bundle.model.network, "inverse", hurried)
    found = inversion_report(bundle.model, held_out, tolerance=1e-3, limit=8)
    assert (found["images"], found["measured"], found["not_converged"]) == (8, 6, 2)
    assert [found[key] for key in ERRORS] == [expected[key] for key in ERRORS]
    assert 0 < found["mean_error"] < found["largest_error"]


def test_an_inverse_without_iterations_has_taken_one(
    bundle: Bundle, held_out: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = IRevNet(bundle.model.input_shape, blocks=(1,), strides=(1,), hidden=(4,))
    monkeypatch.setattr(bundle.model, "network", network.eval())
    found = inversion_report(bundle.model, held_out, limit=3)
    assert found["measured"] == 3
    assert found["largest_error"] < 1e-4
    assert (found["iterations"], found["largest_iterations"]) == (1, 1)


def test_what_a_mosaic_reads_from_a_parity_is_counted_beside_its_encoder(bundle: Bundle) -> None:
    assert info_report(bundle)["reading_macs"] == 0
    encoder = EncoderSettings(kind="mosaic", width=4, side_features=5)
    network = bundle.info.model.network.model_copy(update={"strides": (1, 1)})
    settings = bundle.info.model.model_copy(update={"encoder": encoder, "network": network})
    mosaic = Bundle(bundle.info.model_copy(update={"model": settings}), CodedModel(settings))
    found = info_report(mosaic)
    channels, height, width = found["latent_shape"]
    assert isinstance(mosaic.model.recovery_head, MosaicHead)
    assert found["reading_macs"] == mosaic.model.recovery_head.readings * channels * height * width
    group = torch.zeros(1, 4, *mosaic.model.input_shape)
    assert found["encoder_macs_k4"] == count_macs(lambda: mosaic.model.encoder(group))
    share = found["encoder_macs_k4"] / found["embedding_macs"]
    assert encoder_share(mosaic.model, 4) == pytest.approx(share)
