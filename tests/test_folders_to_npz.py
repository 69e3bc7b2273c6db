"""`python tools/folders_to_npz.py`: what it writes is what `--data-dir` reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codedinvnet.data import load_images
from codedinvnet.data.sources import Split
from tools.folders_to_npz import main


def write(path: Path, shape: tuple[int, ...], seed: int) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28)])
def test_pixels_stay_as_they_are(shape: tuple[int, ...], tmp_path: Path) -> None:
    source, expected = tmp_path / "source", []
    for number, (name, file) in enumerate([("dog", "b"), ("cat", "a"), ("dog", "a")]):
        for split in ("train", "test"):
            pixels = write(source / split / name / f"{file}.png", shape, number)
        expected.append(pixels)
    main(str(source), str(tmp_path / "data" / "pets"))
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        found = load_images("pets", split, data_dir=tmp_path / "data")
        assert found.classes == ("cat", "dog")
        images, labels = found.batch(torch.arange(3))
        assert labels.tolist() == [0, 1, 1]
        for image, number in zip(images, (1, 2, 0), strict=True):
            rows = image.permute(1, 2, 0).numpy().reshape(shape)
            np.testing.assert_array_equal(rows, expected[number])


def test_images_of_different_sizes_are_cropped_to_their_centres(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for split in ("train", "test"):
        wide = np.zeros((8, 16, 3), dtype=np.uint8)
        wide[:, 4:12] = 200
        (source / split / "a").mkdir(parents=True)
        Image.fromarray(wide).save(source / split / "a" / "wide.png")
        large = wide[:, 4:12].repeat(2, 0).repeat(2, 1)
        Image.fromarray(large).save(source / split / "a" / "x.png")
    main(str(source), str(tmp_path / "data" / "pets"), "8")
    images, _ = load_images("pets", "train", data_dir=tmp_path / "data").batch(torch.arange(2))
    assert (images == torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)).all()


def test_tiny_imagenet_is_read_as_it_is_published(tmp_path: Path) -> None:
    source, shape = tmp_path / "tiny-imagenet-200", (8, 8, 3)
    for number, name in enumerate(["n02", "n01"]):
        write(source / "train" / name / "images" / f"{name}_0.png", shape, number)
        (source / "train" / name / f"{name}_boxes.txt").write_text("no image\n")
    held = [write(source / "val" / "images" / f"val_{i}.png", shape, 5 + i) for i in range(2)]
    grey = write(source / "train" / "n02" / "images" / "n02_1.png", shape[:2], 8)
    write(source / "test" / "images" / "test_0.png", shape, 9)  # which nobody has labelled
    listed = source / "val" / "val_annotations.txt"
    listed.write_text("val_1.png\tn01\t0\t0\t7\t7\nval_0.png\tn02\t0\t0\t7\t7\n")
    main(str(source), str(tmp_path / "data" / "tiny"))
    train = load_images("tiny", "train", data_dir=tmp_path / "data")
    test = load_images("tiny", "test", data_dir=tmp_path / "data")
    assert train.classes == test.classes == ("n01", "n02")
    pixels, labels = train.batch(torch.arange(3))
    assert labels.tolist() == [0, 1, 1]
    for channel in pixels[2].numpy():
        np.testing.assert_array_equal(channel, grey)
    images, labels = test.batch(torch.arange(2))
    assert labels.tolist() == [0, 1]
    for image, shown in zip(images, reversed(held), strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), shown)
