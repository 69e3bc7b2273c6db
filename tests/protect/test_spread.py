"""Inputs that come in an order: what is drawn of them has every class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codedinvnet.codes.nercc import NeRCC
from codedinvnet.models import open_model
from codedinvnet.protect import coding
from codedinvnet.protect.inputs import Inputs
from codedinvnet.protect.students import VectorStudent
from tests.conftest import Command
from tests.protect.conftest import COUNT, PLACE, arguments, queries


def test_inputs_that_come_by_class_are_mixed_and_spread(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a folder of class folders do."""
    x = np.load(queries(tmp_path))
    answers = open_model(f"{PLACE}:vectors").run({"x": x})["output"].argmax(1)
    np.save(tmp_path / "x.npy", x[np.argsort(answers, kind="stable")])
    groups: list[np.ndarray] = []
    samples: list[np.ndarray] = []
    tune, decoded, scale = NeRCC.tune, coding.decoded_logits, VectorStudent.learn_scale

    def tuned(code: NeRCC, given: Any, members: Any, labels: torch.Tensor, tried: Any) -> Any:
        groups.append(labels.numpy())
        return tune(code, given, members, labels, tried)

    def validated(coder: Any, scores: Any, inputs: Inputs, rows: np.ndarray, *more: Any) -> Any:
        (batch,) = inputs.batch(rows).values()
        groups.append(scores(torch.from_numpy(batch)).argmax(1).numpy().reshape(-1, 4))
        return decoded(coder, scores, inputs, rows, *more)

    def scaled(student: VectorStudent, batch: dict[str, np.ndarray]) -> None:
        samples.append(batch["x"])
        scale(student, batch)

    monkeypatch.setattr(NeRCC, "tune", tuned)
    monkeypatch.setattr(coding, "decoded_logits", validated)
    monkeypatch.setattr(VectorStudent, "learn_scale", scaled)
    monkeypatch.setattr("codedinvnet.protect.parts.SAMPLE", 60)
    words = arguments("vectors", tmp_path / "x.npy", tmp_path / "out")
    outcome = call(*words, "--methods", "small-backup,code,nercc")
    assert outcome.code == 0, outcome.err
    assert len(groups) > 2
    for found in groups:
        assert (np.ptp(found, axis=1) > 0).mean() > 0.5
    for sample in samples:
        seen = open_model(f"{PLACE}:vectors").run({"x": sample})["output"].argmax(1)
        assert set(seen) == set(answers)


def test_images_by_which_shifting_is_decided_are_spread(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x[np.argsort(x.mean((1, 2)).argmax(1), kind="stable")])
    seen: list[set[int]] = []

    def agreement(_: Any, model: Any, inputs: Any, rows: np.ndarray, answers: np.ndarray) -> float:
        seen.append(set(answers[rows].tolist()))
        raise KeyboardInterrupt

    monkeypatch.setattr("codedinvnet.protect.run.agreement_when", agreement)
    monkeypatch.setattr("codedinvnet.protect.run.CHANGED", 60)
    call(*arguments("colours", tmp_path / "x.npy", tmp_path / "out"))
    assert seen == [{0, 1, 2}]
