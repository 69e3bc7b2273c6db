from __future__ import annotations

from pathlib import Path

import pytest

from codedinvnet.data import load_images
from codedinvnet.errors import UserError
from tests.data.files import COLOUR, GREY, LABELS, write_npz


def test_known_name_brings_its_classes(tmp_path: Path) -> None:
    write_npz(tmp_path, "cifar10", images=COLOUR, labels=LABELS)
    source = load_images("cifar10", "train", data_dir=tmp_path)
    assert len(source.classes) == 10
    assert source.classes[0] == "airplane"


def test_known_name_with_too_many_labels(tmp_path: Path) -> None:
    write_npz(tmp_path, "mnist", images=GREY, labels=LABELS + 10)
    with pytest.raises(UserError, match="outside the 10 classes of 'mnist'"):
        load_images("mnist", "train", data_dir=tmp_path)


@pytest.mark.parametrize("folder", ["fashion", "fashion-mnist"])
@pytest.mark.parametrize("asked", ["fashion", "fashion-mnist"])
def test_both_spellings_of_fashion(tmp_path: Path, folder: str, asked: str) -> None:
    write_npz(tmp_path, folder, images=GREY, labels=LABELS)
    source = load_images(asked, "train", data_dir=tmp_path)
    assert source.name == "fashion"
    assert source.classes[9] == "Ankle boot"


@pytest.mark.parametrize(
    ("asked", "meant"), [("mnits", "mnist"), ("MNIST", "mnist"), ("flower", "flowers")]
)
def test_mistyped_name(tmp_path: Path, asked: str, meant: str) -> None:
    write_npz(tmp_path, "flowers", images=GREY, labels=LABELS)
    (tmp_path / "MNIST").mkdir()
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        load_images(asked, "train", data_dir=tmp_path)
