"""Model files, which take seconds to export: once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import factories


@pytest.fixture(scope="session")
def resnet_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.save_onnx(factories.resnet, tmp_path_factory.mktemp("onnx") / "resnet.onnx")
