"""What tests of the training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from codedinvnet import stages
from tests.training.runs import pixel_run


@pytest.fixture(scope="session")
def pixels(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> stages.Run:
    """A run of the paper's objective with a trained network; its k = 2 is trained."""
    run = pixel_run(tmp_path_factory.mktemp("pixels"), data_dir)
    stages.train(run)
    stages.sample(run, 2)
    stages.fuse(run, 2)
    return run
