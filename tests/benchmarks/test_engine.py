from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import engine
from codedinvnet.errors import UserError
from codedinvnet.rows import read_rows
from tests.conftest import Command


class Clock:
    """Stands still but for the arms, which move it on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def arm(self, name: str, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_arms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.perf_counter)
    arms = {"slow": clock.arm("slow", 9.0, 4.0), "fast": clock.arm("fast", 1.0, 0.4)}
    times = engine.in_turn(arms, 3, 1.0)
    assert times["slow"] == pytest.approx([4000.0] * 3)
    assert times["fast"] == pytest.approx([400.0] * 3)
    warm = ["slow", "fast", "fast"]
    forward, backward = ["slow", *["fast"] * 3], [*["fast"] * 3, "slow"]
    assert clock.calls == [*warm, *forward, *backward, *forward]


def test_a_ratio_is_that_of_the_medians() -> None:
    times = {"PyTorch": [2.0, 4.0, 9.0], "ONNX Runtime": [1.0, 1.0, 3.0]}
    found = engine.compared("it", times, 0.1)
    assert found["ms"] == {"PyTorch": 4.0, "ONNX Runtime": 1.0}
    assert found["faster"] == {"PyTorch": {"times": 4.0, "rounds": [2.0, 4.0]}}
    assert found["errors"] == {"PyTorch": 0.0, "ONNX Runtime": 0.1}


def test_rows_are_appended_and_printed_as_a_table(
    call_benchmarks: Command, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEDINVNET_CACHE", str(tmp_path))
    monkeypatch.setattr(engine, "QUICK_SECONDS", 0.0)
    out = tmp_path / "speed.jsonl"
    outcome = call_benchmarks("engine", bundle_folder, "--quick", "--out", out)
    assert outcome.code == 0, outcome.err
    rows = read_rows(out)
    assert outcome.out.strip() == engine.table([*rows, *rows]).strip()  # the last of a kind counts
    assert outcome.out.count("| PyTorch |") == 2
    assert [row["what"] for row in rows] == ["a query", "the parity of 4"]
    for row in rows:
        assert {"machine", "cores", "commit", "began", "weights"} <= row.keys()
        assert row["quick"] is True
        assert 0 < row["errors"]["ONNX Runtime"] < 1e-4
        ms, told = row["ms"], row["faster"]["PyTorch"]
        assert told["times"] == round(ms["PyTorch"] / ms["ONNX Runtime"], 3)
        assert told["rounds"][0] <= told["rounds"][1]


def test_what_cannot_be_written_or_computed_is_told_before_anything_is_measured(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "measured", None)
    with pytest.raises(UserError, match="it is a folder"):
        engine.run([str(bundle_folder)], out=tmp_path)
    monkeypatch.setattr("codedinvnet.models.runtime.NEEDED", ("nowhere_to_be_found",))
    with pytest.raises(UserError, match="onnxruntime needs nowhere_to_be_found"):
        engine.run([str(bundle_folder)], out=None)
