from __future__ import annotations

import pytest

from codedinvnet import report
from codedinvnet.bundle import Bundle
from codedinvnet.evaluation import Evaluation
from codedinvnet.report import figures, info_report


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
