"""Which models are protected as classifiers, and which are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from codedinvnet.protect.folder import DESCRIPTION
from tests.conftest import Command
from tests.protect.conftest import arguments, queries


@pytest.mark.parametrize(
    ("model", "message"),
    [("regression", "a regression is hedged, and not protected; with one column of a sigmoid ")],
)
def test_what_is_no_classifier_is_refused(
    model: str, message: str, call: Command, tmp_path: Path
) -> None:
    outcome = call(*arguments(model, queries(tmp_path), tmp_path / "out"))
    assert outcome.code == 2
    line = next(line for line in outcome.err.splitlines() if line.startswith("error: "))
    assert message in line
    assert not (tmp_path / "out" / DESCRIPTION).exists()
