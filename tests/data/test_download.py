from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.data import load_images
from codedinvnet.errors import UserError
from tests.data.files import GREY, everything, write_idx


@pytest.mark.parametrize("name", ["mnist", "fashion", "cifar10"])
def test_failed_download(cache: Path, name: str) -> None:
    before = socket.getdefaulttimeout()
    with pytest.raises(UserError, match=f"could not download '{name}'.*no network") as caught:
        load_images(name, "train")
    message = str(caught.value)
    assert "--data-dir DIR" in message
    assert str(Path("DIR") / name / "train.npz") in message
    assert "\n" not in message
    assert list(cache.iterdir()) == []
    assert socket.getdefaulttimeout() == before


def working_download(url: str, download_root: str, **_: Any) -> None:
    """Stand in for torchvision's: the packed file, and beside it the plain one."""
    print(f"Downloading {url}")  # as older releases do
    folder = Path(download_root)
    write_idx(folder, "train")
    write_idx(folder, "t10k")
    (folder / url.rpartition("/")[2]).write_bytes(b"packed")


def test_download_into_the_cache_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = "torchvision.datasets.mnist.download_and_extract_archive"
    with monkeypatch.context() as patch:
        patch.setattr(target, working_download)
        images, _ = everything(load_images("mnist", "train"))
    printed = capsys.readouterr()
    assert printed.out == ""  # where a command prints its report, with --json one object
    assert "Downloading " in printed.err
    assert np.array_equal(images[:, 0], GREY)
    assert [entry.name for entry in cache.iterdir()] == ["MNIST"]
    assert not list(cache.rglob("*.gz"))
    # From here on the download would fail.
    assert len(load_images("mnist", "test")) == len(GREY)


@pytest.mark.usefixtures("cache")
def test_download_into_data_dir_only_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "torchvision.datasets.mnist.download_and_extract_archive"
    monkeypatch.setattr(target, working_download)
    root = tmp_path / "new"
    with pytest.raises(UserError, match="does not exist"):
        load_images("mnist", "train", data_dir=root)
    assert not root.exists()
    source = load_images("mnist", "train", data_dir=root, download=True)
    assert source.source == str(root / "MNIST" / "raw")


def test_cache_that_cannot_be_made(cache: Path) -> None:
    cache.write_text("a file is in the way")
    with pytest.raises(UserError, match="could not download 'mnist' into"):
        load_images("mnist", "train")


@pytest.mark.parametrize(("age", "kept"), [(3600, True), (200_000, False)])
def test_leftovers_of_a_killed_download(
    cache: Path, monkeypatch: pytest.MonkeyPatch, age: float, kept: bool
) -> None:
    leftover = cache / ".partial-abc"
    leftover.mkdir(parents=True)
    now = leftover.stat().st_mtime
    monkeypatch.setattr("codedinvnet.data.download.time.time", lambda: now + age)
    with pytest.raises(UserError, match="could not download"):
        load_images("mnist", "train")
    assert leftover.exists() == kept
