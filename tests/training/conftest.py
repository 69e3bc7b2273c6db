"""What tests of the training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from codedinvnet.evaluation import stages
from tests.conftest import once
from tests.training.runs import pixel_run


@pytest.fixture(scope="session")
def pixels(data_dir: Path, shared: Path) -> stages.Run:
    """A run of the paper's objective with a trained network; its k = 2 is trained."""
    run = pixel_run(shared / "pixels", data_dir)

    def train() -> None:
        stages.train(run)
        stages.sample(run, 2)
        stages.fuse(run, 2)

    once(shared / "pixels", train)
    return run
