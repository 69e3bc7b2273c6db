from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision import datasets

from codedinvnet.common.errors import UserError
from codedinvnet.data import Split, load_images
from codedinvnet.data.load import read_npz
from tests.data.files import COLOUR, GREY, LABELS, RNG, everything, write_idx, write_npz

# --- .npz files


@pytest.mark.parametrize("split", ["train", "test"])
def test_arrays_are_read_at_the_size_that_they_have(tmp_path: Path, split: Split) -> None:
    path = write_npz(tmp_path, split=split, images=COLOUR, labels=LABELS)
    classes = np.array(["a", "b", "c", "d"])
    write_npz(tmp_path, "grey", split, images=GREY, labels=LABELS, classes=classes)
    colour = COLOUR.transpose(0, 3, 1, 2)
    for name, pixels, named in (("own", colour, "012"), ("grey", GREY[:, None], "abcd")):
        source = load_images(name, split, data_dir=tmp_path)
        images, labels = everything(source)
        assert np.array_equal(images, pixels)
        assert labels == LABELS.tolist()
        assert (source.name, source.shape, source.classes) == (name, pixels.shape[1:], tuple(named))
        assert source.source == str(path.parents[1] / name / f"{split}.npz")
        some, chosen = source.batch(torch.tensor([4, 2, 4]))
        assert np.array_equal(some.numpy(), pixels[[4, 2, 4]])
        assert chosen.tolist() == [1, 2, 1]


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "float": ({"images": COLOUR / 255, "labels": LABELS}, "'images' is float64, not uint8"),
    "rank 2": ({"images": GREY[0], "labels": LABELS}, r"'images' has shape \(5, 4\)"),
    "channels first": (
        {"images": COLOUR.transpose(0, 3, 1, 2)[..., [0, 1, 2, 3, 0]], "labels": LABELS},
        "'images' has shape .* with 1 to 4 channels",
    ),
    "no images": ({"images": COLOUR[:0], "labels": LABELS[:0]}, "images is empty"),
    "float labels": ({"images": GREY, "labels": LABELS * 1.0}, "'labels' is float64"),
    "labels of rank 2": ({"images": GREY, "labels": LABELS[:, None]}, "'labels' is uint8 of shape"),
    "too few labels": ({"images": GREY, "labels": LABELS[:5]}, "6 images but 5 labels"),
    "negative label": (
        {"images": GREY, "labels": LABELS.astype(int) - 1},
        "labels run from -1 to 1, outside",
    ),
    "huge label": ({"images": GREY, "labels": LABELS.astype(int) * 10**12}, "'labels' holds 20+"),
    "label beyond classes": (
        {"images": GREY, "labels": LABELS, "classes": np.array(["a", "b"])},
        "labels run from 0 to 2, outside the 2 classes",
    ),
    "classes not strings": (
        {"images": GREY, "labels": LABELS, "classes": np.arange(3)},
        "'classes' must be one row of strings",
    ),
    "missing": ({"image": GREY, "labels": LABELS}, "'images' is missing.*'image'.*image, labels"),
    "missing labels": ({"images": GREY}, "'labels' is missing"),
    "objects": ({"images": GREY.astype(object), "labels": LABELS}, "'images' is unreadable"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_npz_array_is_named(tmp_path: Path, case: str) -> None:
    arrays, message = BAD_ARRAYS[case]
    path = write_npz(tmp_path, **arrays)
    with pytest.raises(UserError, match=message) as caught:
        load_images("own", "train", data_dir=tmp_path)
    assert str(path) in str(caught.value)


def packed_npz() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, images=GREY, labels=LABELS, classes=np.array(["a", "b", "c"]))
    return stream.getvalue()


@given(st.integers(0, len(packed_npz()) - 1), st.integers(0, 255))
@settings(deadline=None, max_examples=300)
def test_npz_with_any_byte_changed_is_read_or_refused(at: int, value: int) -> None:
    content = bytearray(packed_npz())
    content[at] = value
    with contextlib.suppress(UserError):
        images = read_npz(io.BytesIO(content), "own", "file").images
        assert np.array_equal(images[:, 0].numpy(), GREY)


# --- torchvision's files


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_idx(tmp_path: Path, name: str, folder: str, split: Split) -> None:
    write_idx(tmp_path / folder / "raw")
    source = load_images(name, split, data_dir=tmp_path)
    images, labels = everything(source)
    assert np.array_equal(images, GREY[:, None])
    assert labels == LABELS.tolist()
    assert (source.name, source.source) == (name, str(tmp_path / folder / "raw"))


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("size", [None, 3, -1])
def test_damaged_idx(tmp_path: Path, file: str, size: int | None) -> None:
    folder = tmp_path / "MNIST" / "raw"
    write_idx(folder)
    path = folder / file
    whole = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(whole[:size])
    with pytest.raises(UserError, match=re.escape(str(folder)) + ": a file is missing or damaged"):
        load_images("mnist", "train", data_dir=tmp_path)


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.uint8]:
    """Write tiny batches and make torchvision expect their md5."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = RNG.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)

    def put(name: str, content: dict[str, Any]) -> str:
        packed = pickle.dumps(content)
        (folder / name).write_bytes(packed)
        return hashlib.md5(packed).hexdigest()

    batch = {"data": pixels.reshape(2, -1), "labels": [3, 9]}
    names = [f"data_batch_{number}" for number in range(1, 6)]
    train = [[name, put(name, batch)] for name in names]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", put("test_batch", batch)]])
    meta = {"filename": "batches.meta", "key": "label_names"}
    meta["md5"] = put("batches.meta", {"label_names": [str(label) for label in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return pixels


@pytest.mark.parametrize(("split", "batches"), [("train", 5), ("test", 1)])
def test_cifar10_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: Split, batches: int
) -> None:
    pixels = write_cifar10(tmp_path, monkeypatch)
    source = load_images("cifar10", split, data_dir=tmp_path)
    images, labels = everything(source)
    assert np.array_equal(images, np.concatenate([pixels] * batches))
    assert labels == [3, 9] * batches
    assert source.classes[3] == "cat"


def test_damaged_cifar10_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "data_batch_3").write_bytes(b"short")
    with pytest.raises(UserError, match=re.escape(str(folder)) + ".*damaged"):
        load_images("cifar10", "train", data_dir=tmp_path)
