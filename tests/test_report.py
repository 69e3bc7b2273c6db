from __future__ import annotations

from codedinvnet.evaluation import Evaluation
from codedinvnet.report import figures


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
