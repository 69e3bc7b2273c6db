from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.models.bundle import load_bundle
from tests.conftest import Command
from tests.models.factories import words_onnx


def evaluate(
    call: Command, bundle_folder: Path, data_dir: Path, *words: str | Path
) -> dict[str, Any]:
    outcome = call("evaluate", bundle_folder, "--json", "--k", "4", "--data-dir", data_dir, *words)
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert isinstance(report, dict)
    return report


def test_evaluate_is_repeatable_and_the_seed_counts(
    call: Command, bundle_folder: Path, data_dir: Path
) -> None:
    first = evaluate(call, bundle_folder, data_dir)
    assert (first["dataset"], first["split"]) == ("mnist", "test")
    assert (first["images"], first["k"], first["groupings"]) == (200, 4, 5)
    assert first["worst_position_accuracy"] == min(first["position_accuracies"])
    assert evaluate(call, bundle_folder, data_dir) == first
    other = evaluate(call, bundle_folder, data_dir, "--seed", "1", "--groupings", "2")
    assert other["groupings"] == 2
    assert other["position_accuracies"] != first["position_accuracies"]
    assert other["normal_accuracy"] == first["normal_accuracy"]
    printed = call("evaluate", bundle_folder, "--k", "4", "--data-dir", data_dir).out
    assert dict(line.split(maxsplit=1) for line in printed.splitlines()).keys() == first.keys()


def test_evaluate_arms_and_splits(call: Command, bundle_folder: Path, data_dir: Path) -> None:
    plain = evaluate(call, bundle_folder, data_dir)
    mean = evaluate(call, bundle_folder, data_dir, "--method", "average-image")
    shuffled = evaluate(call, bundle_folder, data_dir, "--shuffle-parity")
    arms = [(report["method"], report["shuffled_parity"]) for report in (plain, mean, shuffled)]
    assert arms == [("coded-invnet", False), ("average-image", False), ("coded-invnet", True)]
    assert len({tuple(report["position_accuracies"]) for report in (plain, mean, shuffled)}) == 3
    sizes = {
        split: evaluate(call, bundle_folder, data_dir, "--split", split)["images"]
        for split in ("train", "validation", "sample")
    }
    assert sizes == {"train": 700, "validation": 100, "sample": 1000}


def test_invert(call: Command, bundle_folder: Path, data_dir: Path) -> None:
    outcome = call("invert", bundle_folder, "--json", "--data-dir", data_dir, "--limit", "30")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert report["images"] == 30
    assert report["largest_error"] < 1e-4
    assert 0 < report["largest_singular_value"] <= report["coefficient"] + 1e-5
    assert report["coefficient"] == 0.9
    assert report["iterations"] > 1
    loose = call(
        "invert", bundle_folder, "--json", "--split", "sample", "--limit", "30", "--tolerance", "1"
    )
    assert json.loads(loose.out)["iterations"] < report["iterations"]


def test_info(call: Command, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codedinvnet.evaluation.cost.REPEATS", 3)
    outcome = call("info", bundle_folder, "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    model = load_bundle(bundle_folder).model
    assert report["embedding_parameters"] == sum(p.numel() for p in model.network.parameters())
    # One channel of 32 x 32, squeezed once and twice: 3x3, 1x1, 3x3 convolutions of 8 channels.
    first = (4 * 8 * 9 + 8 * 8 + 8 * 4 * 9) * 16 * 16
    second = (16 * 8 * 9 + 8 * 8 + 8 * 16 * 9) * 8 * 8
    assert report["embedding_macs"] == first + second
    assert report["head_macs"] == 32 * 32 * 10
    assert 0 < report["encoder_macs_k2"] < report["encoder_macs_k4"] < 2 * report["encoder_macs_k2"]
    assert "encoder_macs_k10" not in report  # not served
    assert report["embedding_ms"] > 0
    assert report["encoder_ms_k4"] > 0
    assert report["group_sizes"] == [2, 3, 4]
    assert report["provenance"]["settings"]["name"] == "tiny-recovery"


def test_info_of_a_model_of_ones_own(call: Command, tmp_path: Path) -> None:
    path = words_onnx(tmp_path / "words.onnx", ("batch", "length"))
    words = ("info", path, "--input", "tokens:INT32:7", "--scores", "scores:logits")
    report = json.loads(call(*words, "--json").out)
    assert (report["kind"], report["platform"]) == ("onnx", "onnxruntime_onnx")
    assert report["inputs"] == [{"name": "tokens", "datatype": "INT32", "shape": [7]}]
    assert report["scores"] == {"output": "scores", "kind": "logits"}
    lines = dict(re.split("  +", line) for line in call(*words).out.splitlines())
    assert lines["digest"] == report["digest"]
    assert lines["input tokens"] == "INT32 (B, 7)"
    assert lines["output label"] == "INT64 (B)"
    assert lines["scores"] == "scores (logits, if it classifies)"
