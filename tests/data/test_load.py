from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.data import cache_dir, load_images, sample_images
from tests.data.files import COLOUR, GREY, LABELS, everything, write_idx, write_npz

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
    assert "test or val" in message
    assert "\n" not in message


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    write_npz(tmp_path, "mnist", "train", images=GREY, labels=LABELS)
    with pytest.raises(UserError, match="holds no test images of 'mnist'; looked for"):
        load_images("mnist", "test", data_dir=tmp_path)
    with pytest.raises(UserError, match="'val' is neither"):
        load_images("mnist", "val", data_dir=tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("folder", ["fashion", "fashion-mnist"])
@pytest.mark.parametrize("asked", ["fashion", "fashion-mnist"])
def test_a_known_name_brings_its_classes_in_any_spelling(
    tmp_path: Path, folder: str, asked: str
) -> None:
    write_npz(tmp_path, folder, images=COLOUR, labels=LABELS)
    source = load_images(asked, "train", data_dir=tmp_path)
    assert (source.name, source.classes[9]) == ("fashion", "Ankle boot")


@pytest.mark.parametrize("name", ["mnist", "fashion", "fashion-mnist"])
def test_samples(name: str) -> None:
    samples = sample_images(name)
    images, labels = everything(samples)
    assert images.shape == (1000, 1, 28, 28)
    assert set(labels) == set(range(10))
    assert len(samples.classes) == 10
    assert len({image.tobytes() for image in images}) == 1000


def test_samples_of_another_name() -> None:
    with pytest.raises(UserError, match=r"did you mean 'mnist'.*these do: mnist, fashion"):
        sample_images("mnsit")


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
def test_debian_package(tmp_path: Path) -> None:
    write_idx(tmp_path / "debian", packed=True)
    source = load_images("fashion-mnist", "train")
    assert source.source == str(tmp_path / "debian")
    assert len(source) == len(GREY)


@pytest.mark.parametrize("name", ["mnist", "fashion", "cifar10"])
def test_a_failed_download_leaves_nothing(cache: Path, name: str) -> None:
    before = socket.getdefaulttimeout()
    with pytest.raises(UserError, match=f"could not download '{name}'.*no network") as caught:
        load_images(name, "train")
    assert str(Path("DIR") / name / "train.npz") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []
    assert socket.getdefaulttimeout() == before
    with pytest.raises(UserError, match=r"did you mean 'cifar10'.*mnist, fashion, cifar10.*DIR"):
        load_images("cifar100", "train")


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
    with monkeypatch.context() as patch:
        patch.setattr(DOWNLOAD, working_download)
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


def test_cache_that_cannot_be_made(cache: Path) -> None:
    cache.write_text("a file is in the way")
    with pytest.raises(UserError, match="could not download 'mnist' into"):
        load_images("mnist", "train")
