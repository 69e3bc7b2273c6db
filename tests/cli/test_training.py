from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from codedinvnet.evaluation import stages
from codedinvnet.models.bundle import WEIGHTS, load_bundle
from codedinvnet.models.checkpoint import load_checkpoint
from tests.cli.scene import environment
from tests.conftest import Command, tiny_settings, write_settings

REPORTED = ("bundle", "training_seed", "settings", "seconds")


def test_reproduce_twice(call: Command, data_dir: Path, tmp_path: Path) -> None:
    config = write_settings(tmp_path / "own.json", tiny_settings())
    words = ["reproduce", config, "--data-dir", data_dir, "--save-dir", tmp_path / "runs", "--json"]
    first = call(*words)
    assert first.code == 0, first.err
    report = json.loads(first.out)  # one object, and nothing else on standard output
    assert report.keys() == {*REPORTED, "test_k2", "test_k4"}
    assert report["training_seed"] == report["settings"]["seed"] == tiny_settings()["seed"]
    folder = tmp_path / "runs" / "tiny-recovery"
    checkpoints = [*folder.rglob("last.safetensors"), *folder.rglob("best.safetensors")]
    assert len(checkpoints) == 6
    stamps = {path: path.stat().st_mtime_ns for path in checkpoints}
    weights = Path(report["bundle"]) / WEIGHTS
    before = weights.read_bytes()
    info = load_bundle(report["bundle"]).info
    assert info.figures["test_k4"] == report["test_k4"]

    second = call(*words)
    assert second.code == 0, second.err
    assert json.loads(second.out) == report
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == stamps
    assert weights.read_bytes() == before
    assert "epoch 1/" not in second.err + second.out


def test_reproduce_goes_on_after_a_kill(call: Command, data_dir: Path, tmp_path: Path) -> None:
    raw = tiny_settings()
    raw["training"]["epochs"] = 4
    config = write_settings(tmp_path / "own.json", raw)
    words = ["reproduce", str(config), "--data-dir", str(data_dir), "--save-dir"]
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    last = broken / raw["name"] / "network" / "last.safetensors"
    start = "import sys; from codedinvnet.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", start, *words, str(broken)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not last.is_file():
            assert process.poll() is None, "it ended before its first checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    reached = load_checkpoint(last)[1]["epoch"]
    assert 1 <= reached < 4
    assert not (last.parent / "network.safetensors").exists()
    resumed = call(*words, broken)
    assert resumed.code == 0, resumed.err
    assert "epoch 4/4" in resumed.err + resumed.out
    assert f"epoch {reached}/4" not in resumed.err + resumed.out
    assert call(*words, unbroken).code == 0
    for name in ("network.safetensors", "best.safetensors", "last.safetensors"):
        expected, _ = load_checkpoint(unbroken / raw["name"] / "network" / name)
        found, _ = load_checkpoint(broken / raw["name"] / "network" / name)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_interrupt_is_not_a_traceback(
    call: Command, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "reproduce", interrupted)
    config = write_settings(tmp_path / "own.json", tiny_settings())
    words = ("reproduce", config, "--data-dir", data_dir, "--save-dir", tmp_path / "runs")
    kept = "finished epochs and rows are kept: the same command goes on"
    assert call(*words) == (130, "", f"interrupted; {kept}\n")
    fresh = "finished epochs are kept: the same command without --fresh goes on"
    assert call(*words, "--fresh").err == f"interrupted; {fresh}\n"
    # What keeps nothing promises nothing.
    monkeypatch.setattr("codedinvnet.evaluation.cost.info_report", interrupted)
    assert call("info", "mnist") == (130, "", "interrupted\n")
