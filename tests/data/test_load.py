from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.data import cache_dir, load_images, sample_images
from tests.data.files import GREY, LABELS, everything, write_idx, write_npz

DOWNLOAD = "torchvision.datasets.mnist.download_and_extract_archive"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        *((name, "a name has only letters") for name in ("", "..", "../mnist", "/etc", "a b")),
        *(("mnits", "did you mean 'mnist'"), ("MNIST", "did you mean 'mnist'")),
        *(("flower", "did you mean 'flowers'"), ("birds", "holds no train images of 'birds'")),
        ("mnist", "labels run from 10 to 12, outside the 10 classes of 'mnist'"),
    ],
)
def test_wrong_names_and_labels_are_told(tmp_path: Path, asked: str, told: str) -> None:
    write_npz(tmp_path, "flowers", images=GREY, labels=LABELS)
    write_npz(tmp_path, "mnist", images=GREY, labels=LABELS + 10)
    (tmp_path / "MNIST").mkdir()
    with pytest.raises(UserError, match=told):
        load_images(asked, "train", data_dir=tmp_path)


@pytest.mark.parametrize("state", ["does not exist", "holds no test images"])
def test_a_folder_without_images_tells_what_was_looked_for(tmp_path: Path, state: str) -> None:
    root = tmp_path / "there"
    if state == "holds no test images":
        root.mkdir()
    with pytest.raises(UserError, match=state) as caught:
        load_images("cifar10", "test", data_dir=root)
    message = str(caught.value)
    assert str(root / "cifar10" / "test.npz") in message
    assert str(root / "cifar-10-batches-py") in message
    assert "\n" not in message
    with pytest.raises(UserError, match="'val' is neither"):
        load_images("cifar10", "val", data_dir=root)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_samples(name: str) -> None:
    samples = sample_images(name)
    images, labels = everything(samples)
    assert images.shape == (1000, 1, 28, 28)
    assert set(labels) == set(range(10))
    assert len(samples.classes) == 10
    assert len({image.tobytes() for image in images}) == 1000
    with pytest.raises(UserError, match=f"did you mean {name!r}"):
        sample_images(f"{name}s")


@pytest.mark.parametrize(
    ("own", "base", "expected"),
    [("/a", "/b", "/a"), ("", "/b", "/b/codedinvnet"), ("", "", "/home/u/.cache/codedinvnet")],
)
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, own: str, base: str, expected: str) -> None:
    monkeypatch.setenv("CODEDINVNET_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/u"))
    assert cache_dir() == Path(expected)


@pytest.mark.usefixtures("cache")
def test_what_cannot_be_downloaded_is_told() -> None:
    for name in ("mnist", "fashion", "cifar10"):
        with pytest.raises(UserError, match=f"could not download '{name}'.*no network") as caught:
            load_images(name, "train")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        load_images("cifar100", "train")


def working_download(url: str, download_root: str, **_: Any) -> None:
    """Stand in for torchvision's."""
    print(f"Downloading {url}")  # as older releases do
    write_idx(Path(download_root))


def test_download_into_the_cache_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DOWNLOAD, working_download)
        images, _ = everything(load_images("mnist", "train"))
    printed = capsys.readouterr()
    assert printed.out == ""  # where a command prints its report, with --json one object
    assert "Downloading " in printed.err
    assert np.array_equal(images[:, 0], GREY)
    assert [entry.name for entry in cache.iterdir()] == ["MNIST"]
    # From here on the download would fail.
    assert len(load_images("mnist", "test")) == len(GREY)


@pytest.mark.usefixtures("cache")
def test_download_into_data_dir_only_when_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DOWNLOAD, working_download)
    root = tmp_path / "new"
    with pytest.raises(UserError, match="does not exist"):
        load_images("mnist", "train", data_dir=root)
    assert not root.exists()
    source = load_images("mnist", "train", data_dir=root, download=True)
    assert source.source == str(root / "MNIST" / "raw")
