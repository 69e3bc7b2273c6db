"""A protection that is not finished: what goes on, and what does not."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from codedinvnet.checkpoint import load_checkpoint
from codedinvnet.protect import distil, teacher
from codedinvnet.protect.folder import DESCRIPTION, WEIGHTS
from tests.conftest import Command
from tests.models.factories import save_onnx
from tests.models.test_remote import server
from tests.protect import factories
from tests.protect.conftest import COUNT, arguments, description, killed, queries


def test_a_killed_training_goes_on_as_if_it_had_not_been(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = queries(tmp_path)
    more = ("--methods", "small-backup")
    assert call(*arguments("vectors", inputs, tmp_path / "whole", *more)).code == 0
    asked = 0
    validate = distil.DistilStage.validate

    def fourth(stage: distil.DistilStage) -> Any:
        nonlocal asked
        asked += 1
        if asked == 4:  # the first one is of the plan
            raise KeyboardInterrupt
        return validate(stage)

    monkeypatch.setattr(distil.DistilStage, "validate", fourth)
    outcome = call(*arguments("vectors", inputs, tmp_path / "killed", *more))
    assert outcome.code == 130
    assert "the same command goes on" in outcome.err
    assert not (tmp_path / "killed" / DESCRIPTION).exists()
    changed = call(*arguments("vectors", inputs, tmp_path / "killed", *more, "--seed", "1"))
    assert changed.code == 2
    assert "seed 0 -> 1" in changed.err
    monkeypatch.setattr(distil.DistilStage, "validate", validate)
    epochs = []
    start = distil.DistilStage.start_epoch

    def started(stage: distil.DistilStage, epoch: int, generator: torch.Generator) -> None:
        epochs.append(epoch)
        start(stage, epoch, generator)

    monkeypatch.setattr(distil.DistilStage, "start_epoch", started)
    assert call(*arguments("vectors", inputs, tmp_path / "killed", *more)).code == 0
    whole, again = (load_checkpoint(tmp_path / name / WEIGHTS)[0] for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert epochs[0] == 2


def test_what_another_protection_has_left_is_not_taken(
    finished: Path, call: Command, tmp_path: Path
) -> None:
    """Its backup may have learnt from what are test inputs now."""
    (tmp_path / "again").mkdir()
    shutil.copy(finished / WEIGHTS, tmp_path / "again" / WEIGHTS)
    inputs = queries(tmp_path)
    more = ("--methods", "small-backup", "--seed", "1")
    for name in ("clean", "again"):
        outcome = call(*arguments("vectors", inputs, tmp_path / name, *more))
        assert outcome.code == 0, outcome.err
    clean, again = (load_checkpoint(tmp_path / name / WEIGHTS)[0] for name in ("clean", "again"))
    assert all(torch.equal(clean[key], again[key]) for key in clean)


def test_an_unfinished_protection_of_another_output_does_not_go_on(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments("two_answers", queries(tmp_path), tmp_path / "out", "--methods", "approxifer")
    words += ["--backup", str(save_onnx(factories.slower, tmp_path / "slower.onnx")), "--scores"]
    with monkeypatch.context() as changed:
        changed.setattr("codedinvnet.protect.run.check_scores", killed)  # all were asked for
        assert call(*words, "aux").code == 130
    with monkeypatch.context() as changed:
        changed.setattr("codedinvnet.protect.run.draw", killed)
        assert call(*words, "main").code == 130
    refused = call(*words, "aux")
    assert refused.code == 2
    assert "'main:logits' -> 'aux:logits'" in refused.err
    outcome = call(*words, "main")
    assert outcome.code == 0, outcome.err
    rows = {row["method"]: row for row in description(tmp_path / "out")["table"]}
    assert rows["own-backup"]["agreement"][0] == 1.0


def test_a_servers_other_weights_are_noticed_when_it_goes_on(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metadata, which are its digest, are the same."""

    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((COUNT, 3), np.float32))
    words = arguments("", tmp_path / "x.npy", tmp_path / "out", "--methods", "small-backup")
    with server() as (url, kind):
        words[1] = url
        with monkeypatch.context() as changed:
            changed.setattr("codedinvnet.protect.run.check_scores", killed)  # all were asked for
            assert call(*words).code == 130
        kind.weights = kind.weights[::-1].copy()
        refused = call(*words)
        assert refused.code == 2
        (line,) = [line for line in refused.err.splitlines() if line.startswith("error: ")]
        assert str(tmp_path / "out" / "work") in line
        shutil.rmtree(tmp_path / "out" / "work")
        outcome = call(*words)
    assert outcome.code == 0, outcome.err


def test_more_minutes_are_taken_where_there_was_no_time_for_an_epoch(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 1000)
    monkeypatch.setattr("codedinvnet.protect.parts.time", clock)
    words = arguments("vectors", queries(tmp_path), tmp_path / "out", "--methods", "small-backup")
    outcome = call(*words)  # within 300 seconds
    assert outcome.code == 2
    assert "give more" in outcome.err
    outcome = call(*words, "--minutes", "30")
    assert outcome.code == 0, outcome.err
    assert description(tmp_path / "out")["settings"]["minutes"] == 30


def test_a_training_that_goes_on_has_no_other_mirrored_images(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", generator.integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8))
    words = arguments("images", tmp_path / "x.npy", tmp_path / "out", "--methods", "small-backup")
    monkeypatch.setattr("codedinvnet.protect.parts.train_stage", killed)  # it is planned
    with monkeypatch.context() as changed:  # no time for them, it seems
        changed.setattr("codedinvnet.protect.parts.check_teacher", lambda *_: 1000.0)
        assert call(*words).code == 130
    asked = []
    ask = teacher.teacher_scores

    def asking(*given: Any, **named: Any) -> np.ndarray:
        asked.append(named)
        return ask(*given, **named)

    monkeypatch.setattr("codedinvnet.protect.parts.teacher_scores", asking)
    assert call(*words).code == 130
    assert asked == []
    assert call(*words[:5], str(tmp_path / "fast"), *words[6:]).code == 130
    assert len(asked) == 1  # without the slow start there are some


def test_what_was_asked_for_takes_no_minutes_again(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments("vectors", queries(tmp_path), tmp_path / "out", "--methods", "approxifer")
    monkeypatch.setattr("codedinvnet.protect.run.check_teacher", lambda *_: 10.0)
    refused = call(*words)  # 400 inputs, 5 minutes
    assert refused.code == 2
    assert "the model needs about 66.7 minutes for 400 inputs" in refused.err
    with monkeypatch.context() as changed:
        changed.setattr("codedinvnet.protect.run.check_scores", killed)  # all were asked for
        assert call(*words, "--minutes", "100").code == 130
    outcome = call(*words)
    assert outcome.code == 0, outcome.err
