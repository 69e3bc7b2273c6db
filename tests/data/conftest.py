from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and no network."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CODEDINVNET_CACHE", str(folder))

    def fail(url: str, download_root: str, **_: Any) -> None:
        (Path(download_root) / "half.gz").write_bytes(b"half")
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    return folder
