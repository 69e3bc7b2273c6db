"""Which models are protected as classifiers, by which scores, and which are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from codedinvnet.errors import UserError
from codedinvnet.models import open_model
from codedinvnet.protect.folder import DESCRIPTION, check_fingerprint
from codedinvnet.protect.teacher import check_classes
from tests.conftest import Command
from tests.protect.conftest import COUNT, PLACE, arguments, description, queries
from tests.protect.factories import FEATURES


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("regression", "a regression is hedged, and not protected; with one column of a sigmoid "),
        ("tags", "looks like independent labels (all lie in 0..1, and rows do not sum to 1)"),
        ("embedding", "if they are class scores, say --scores output:logits"),
    ],
)
def test_what_is_no_classifier_is_refused(
    model: str, message: str, call: Command, tmp_path: Path
) -> None:
    outcome = call(*arguments(model, queries(tmp_path), tmp_path / "out"))
    assert outcome.code == 2
    line = next(line for line in outcome.err.splitlines() if line.startswith("error: "))
    assert message in line
    assert not (tmp_path / "out" / DESCRIPTION).exists()


def test_what_the_user_calls_scores_is_protected(call: Command, tmp_path: Path) -> None:
    more = ("--methods", "approxifer", "--scores", "output:logits")
    outcome = call(*arguments("tags", queries(tmp_path), tmp_path / "out", *more))
    assert outcome.code == 0, outcome.err
    assert description(tmp_path / "out")["model"]["kind"] == "logits"


def test_scores_of_classes_look_like_nothing_else() -> None:
    """Logits, their logarithms as probabilities, these themselves, and those of one class."""
    logits = np.random.default_rng(0).normal(0, 3, (300, 7))
    likely = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for scores in (logits, np.log(likely), likely, np.eye(7)[logits.argmax(1)], 30 * likely):
        check_classes(scores.astype(np.float32), "y")
    unit = logits / np.linalg.norm(logits, axis=1, keepdims=True)
    for scores in (unit, 20 * unit, 1 / (1 + np.exp(-logits))):
        with pytest.raises(UserError, match="say --scores y:logits"):
            check_classes(scores.astype(np.float32), "y")


@pytest.mark.parametrize("model", ["beyond_the_probe", "partly_beyond"])
def test_a_model_may_have_no_scores_of_the_inputs_of_a_probe(
    model: str, call: Command, tmp_path: Path
) -> None:
    """What they are is learnt from those of real inputs, and no model is known by what is not."""
    x = 1 + 4 * np.random.default_rng(0).random((COUNT, FEATURES), np.float32)
    np.save(tmp_path / "x.npy", x)
    more = ("--methods", "approxifer")
    outcome = call(*arguments(model, tmp_path / "x.npy", tmp_path / "out", *more))
    assert outcome.code == 0, outcome.err
    found = description(tmp_path / "out")
    assert found["model"]["kind"] == "probabilities"
    served = open_model(f"{PLACE}:{model}", scores="output:probabilities")
    if model == "beyond_the_probe":
        assert any("no gateway takes this protection" in note for note in found["notes"])
        with pytest.raises(UserError, match="nothing tells whether m is the model"):
            check_fingerprint(tmp_path / "out", found, served, "m")
        return
    assert not any("gateway" in note for note in found["notes"])
    check_fingerprint(tmp_path / "out", found, served, "m")
    found["model"]["probe"] = [row[::-1] for row in found["model"]["probe"]]
    with pytest.raises(UserError, match="m is another model"):
        check_fingerprint(tmp_path / "out", found, served, "m")
