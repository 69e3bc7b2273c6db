from __future__ import annotations

import pytest
import torch

from codedinvnet.codes.equal_cost import count_macs, served_macs
from codedinvnet.common.config import EncoderSettings
from codedinvnet.evaluation import cost
from codedinvnet.evaluation.cost import info_report
from codedinvnet.models.bundle import Bundle
from codedinvnet.models.coded import build_model
from codedinvnet.nn.head import MosaicHead


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "REPEATS", 1)


def test_info_of_a_bundle_with_one_size(bundle: Bundle) -> None:
    one = Bundle(bundle.info.model_copy(update={"group_sizes": (4,)}), bundle.model)
    found = info_report(one)
    assert [key for key in found if key.startswith("encoder_macs")] == ["encoder_macs_k4"]
    assert found["recovery_head_macs"] == info_report(bundle)["recovery_head_macs"] > 0
    assert found["small_backup_macs_k4"] == 4 * found["small_backup_one_macs_k4"] > 0
    served = served_macs(bundle.model)
    assert 0.5 * served < found["small_backup_macs_k4"] <= served  # one query's, for all four
    assert found["small_backup_one_ms_k4"] > 0


def test_what_a_mosaic_reads_from_a_parity_is_counted_beside_its_encoder(bundle: Bundle) -> None:
    assert info_report(bundle)["reading_macs"] == 0
    encoder = EncoderSettings(kind="mosaic", width=4, side_features=5)
    network = bundle.info.model.network.model_copy(update={"strides": (1, 1)})
    settings = bundle.info.model.model_copy(update={"encoder": encoder, "network": network})
    mosaic = Bundle(bundle.info.model_copy(update={"model": settings}), build_model(settings))
    found = info_report(mosaic)
    channels, height, width = found["latent_shape"]
    assert isinstance(mosaic.model.recovery_head, MosaicHead)
    assert found["reading_macs"] == mosaic.model.recovery_head.readings * channels * height * width
    group = torch.zeros(1, 4, *mosaic.model.input_shape)
    assert found["encoder_macs_k4"] == count_macs(lambda: mosaic.model.encoder(group))
