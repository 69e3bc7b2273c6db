from __future__ import annotations

import pytest

from codedinvnet.codes.equal_cost import served_macs
from codedinvnet.evaluation import cost
from codedinvnet.evaluation.cost import info_report
from codedinvnet.models.bundle import Bundle


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "REPEATS", 1)


def test_info_of_a_bundle_with_one_size(bundle: Bundle) -> None:
    one = Bundle(bundle.info.model_copy(update={"group_sizes": (4,)}), bundle.model)
    found = info_report(one)
    assert [key for key in found if key.startswith("encoder_macs")] == ["encoder_macs_k4"]
    assert found["small_backup_macs_k4"] == 4 * found["small_backup_one_macs_k4"] > 0
    served = served_macs(bundle.model)
    assert 0.5 * served < found["small_backup_macs_k4"] <= served  # one query's, for all four
    assert found["small_backup_one_ms_k4"] > 0
