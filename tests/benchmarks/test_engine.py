"""`benchmarks engine`, with exports of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import speed
from benchmarks.timing import Sizes
from codedinvnet.errors import UserError
from tests.conftest import Command

TINY = Sizes(rounds=2, plain_rounds=1, seconds=0.0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEDINVNET_CACHE", str(tmp_path))


def test_both_engines_do_the_same_tasks(
    bundle_folder: Path, tmp_path: Path, call_benchmarks: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "engine.json"
    monkeypatch.setattr(speed, "QUICK", TINY)
    outcome = call_benchmarks("engine", bundle_folder, "--quick", "--json", "--out", out)
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert json.loads(out.read_text()) == report
    assert report["engine_k"] == 4
    assert " 1 thread, " in report["machine"]
    for task in ("query", "parity"):
        times = report[f"engine_ms_{task}"]
        assert list(times) == ["PyTorch", "ONNX Runtime"]
        assert all(0 < of["min"] <= of["median"] <= of["max"] for of in times.values())
        ratio = times["PyTorch"]["median"] / times["ONNX Runtime"]["median"]
        assert report[f"engine_ratio_{task}"] == pytest.approx(ratio, rel=0.02)
        assert 0 <= report[f"engine_difference_{task}"]["ONNX Runtime"] < 1e-4
    text = speed.table(report)
    assert "engine_ratio_parity" in text
    assert not speed.aims(report)


def test_without_onnx_runtime_nothing_is_measured(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codedinvnet.models.runtime.NEEDED", ("nowhere_to_be_found",))
    with pytest.raises(UserError, match="onnxruntime needs nowhere_to_be_found"):
        speed.run("engine", str(bundle_folder), sizes=TINY)
