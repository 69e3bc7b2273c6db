from __future__ import annotations

from pathlib import Path

import pytest

from codedinvnet.data import load_images, sample_images
from codedinvnet.errors import UserError
from tests.data.files import GREY, LABELS, everything, write_idx, write_npz


@pytest.mark.parametrize("name", ["", "..", "../mnist", "/etc", "a b"])
def test_names_are_not_paths(tmp_path: Path, name: str) -> None:
    write_npz(tmp_path, "mnist", images=GREY, labels=LABELS)
    with pytest.raises(UserError, match="a name has only letters"):
        load_images(name, "train", data_dir=tmp_path / "mnist")


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'val' is neither"):
        load_images("mnist", "val", data_dir=tmp_path)  # type: ignore[arg-type]


@pytest.mark.usefixtures("cache")
def test_debian_package(tmp_path: Path) -> None:
    write_idx(tmp_path / "debian", packed=True)
    source = load_images("fashion-mnist", "train")
    assert source.source == str(tmp_path / "debian")
    assert len(source) == len(GREY)


@pytest.mark.usefixtures("cache")
def test_name_that_cannot_be_downloaded() -> None:
    with pytest.raises(UserError, match=r"did you mean 'cifar10'.*mnist, fashion, cifar10.*DIR"):
        load_images("cifar100", "train")


def test_a_folder_that_was_given_is_named_though_the_name_cannot_be_downloaded(
    tmp_path: Path,
) -> None:
    (tmp_path / "mnist").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path} holds no train images of 'birds'"):
        load_images("birds", "train", data_dir=tmp_path, download=True)


# --- samples


@pytest.mark.parametrize("name", ["mnist", "fashion", "fashion-mnist"])
def test_samples(name: str) -> None:
    samples = sample_images(name)
    images, labels = everything(samples)
    assert images.shape == (1000, 1, 28, 28)
    assert set(labels) == set(range(10))
    assert len(samples.classes) == 10
    assert images.reshape(1000, -1).std(axis=1).min() > 5  # none is blank
    assert len({image.tobytes() for image in images}) == 1000


def test_samples_of_another_name() -> None:
    with pytest.raises(UserError, match=r"did you mean 'mnist'.*these do: mnist, fashion"):
        sample_images("mnsit")
