from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageFolder, ImageRows, Split, load_images
from tests.data.files import GREY, LABELS, everything, write_folder, write_npz

# --- ImageSet


def test_the_digest_of_an_image_goes_by_its_pixels_and_label(tmp_path: Path) -> None:
    digests = []
    pixel, label = (GREY.copy(), LABELS), (GREY, LABELS.copy())
    pixel[0][3, 0, 0] ^= 1
    label[1][4] = 0
    for number, (images, labels) in enumerate(((GREY, LABELS), pixel, label)):
        write_npz(tmp_path, f"own{number}", images=images, labels=labels)
        source = load_images(f"own{number}", "train", data_dir=tmp_path)
        digests.append(source.image_digests())
    assert digests[0].dtype == torch.int64
    assert len(digests[0].unique()) == len(GREY)
    assert [(found != digests[0]).nonzero().tolist() for found in digests[1:]] == [[[3]], [[4]]]


# --- ImageFolder


@pytest.mark.parametrize(
    ("split", "folder"), [("train", "train"), ("test", "val"), ("test", "test")]
)
@pytest.mark.parametrize("below", ["imagenet", "."])
def test_image_folder(tmp_path: Path, split: Split, folder: str, below: str) -> None:
    write_folder(tmp_path / below / folder)
    source = load_images("imagenet", split, data_dir=tmp_path, image_size=8)
    images, labels = everything(source)
    assert source.shape == (3, 8, 8)
    assert source.classes == ("cat", "dog")
    assert labels == [0, 1, 1]
    assert (images[0] == np.array([255, 0, 0])[:, None, None]).all()
    assert (images[1:] == np.array([0, 0, 255])[:, None, None]).all()
    one, label = source.batch(torch.tensor([2]))
    assert np.array_equal(one[0].numpy(), images[2])
    assert label.tolist() == [1]


def test_image_folder_resizes_and_crops_to_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, 12:20] = 255  # a white bar in the middle of a wide black image
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "bar.png")
    images, _ = ImageFolder("own", tmp_path, image_size=14).batch(torch.tensor([0]))
    # 16 * 256/224 of 14 is 16, so nothing is resized: the crop keeps columns 9 to 22, rows 1 to 14.
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), pixels[1:15, 9:23])
    small, _ = ImageFolder("own", tmp_path, image_size=7).batch(torch.tensor([0]))
    assert small.shape == (1, 3, 7, 7)
    assert small[0, :, :, 3].min() > 200
    assert small[0, :, :, 0].max() < 50


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_unreadable_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    write_folder(tmp_path / "own" / "train", size=(64, 64))
    path = tmp_path / "own" / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    source = load_images("own", "train", data_dir=tmp_path, image_size=8)
    source.batch(torch.tensor([0, 1]))
    with pytest.raises(UserError, match=re.escape(str(path)) + ": unreadable image"):
        source.batch(torch.tensor([0, 1, 2]))


# --- ImageRows


def test_rows_of_a_source(tmp_path: Path) -> None:
    write_npz(tmp_path, images=GREY, labels=LABELS)
    whole = load_images("own", "train", data_dir=tmp_path)
    source = ImageRows(whole, torch.tensor([5, 1, 3]), "some of them")
    images, labels = everything(source)
    assert np.array_equal(images[:, 0], GREY[[5, 1, 3]])
    assert labels == source.labels.tolist() == LABELS[[5, 1, 3]].tolist()
    assert (source.name, source.classes, source.shape) == ("own", ("0", "1", "2"), (1, 5, 4))
    assert source.digest() == ImageRows(whole, source.rows, "again").digest()
    assert source.digest() != ImageRows(whole, source.rows.flip(0), "in another order").digest()
    assert torch.equal(source.image_digests(), whole.image_digests()[source.rows])
    with pytest.raises(UserError, match=r"the rest: no images of .*train\.npz"):
        ImageRows(whole, torch.arange(0), "the rest")
