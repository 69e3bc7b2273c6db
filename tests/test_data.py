from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import pickle
import re
import socket
import struct
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets

from codedinvnet import data
from codedinvnet.data import (
    ImageFolder,
    ImageSet,
    ImageSource,
    load_images,
    random_groups,
    sample_images,
    split_indices,
)
from codedinvnet.errors import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)


def write_npz(root: Path, name: str = "own", split: str = "train", **arrays: Any) -> Path:
    path = root / name / f"{split}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    magic = bytes((0, 0, 8, array.ndim))
    return magic + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, prefix: str = "train", packed: bool = False) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for stem, array in (("images-idx3-ubyte", GREY), ("labels-idx1-ubyte", LABELS)):
        content = idx_bytes(array)
        path = folder / f"{prefix}-{stem}{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
        paths.append(path)
    return paths[0], paths[1]


def write_folder(folder: Path, size: tuple[int, int] = (12, 9)) -> None:
    for label, (class_name, colour) in enumerate((("cat", (255, 0, 0)), ("dog", (0, 0, 255)))):
        (folder / class_name).mkdir(parents=True)
        for number in range(label + 1):
            Image.new("RGB", size, colour).save(folder / class_name / f"{number}.png")


def everything(source: ImageSource) -> tuple[NDArray[np.uint8], list[int]]:
    images, labels = source.batch(torch.arange(len(source)))
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert tuple(images.shape) == (len(source), *source.shape)
    return images.numpy(), labels.tolist()


# --- .npz files


@pytest.mark.parametrize("split", ["train", "test"])
def test_npz_colour(tmp_path: Path, split: data.Split) -> None:
    path = write_npz(tmp_path, split=split, images=COLOUR, labels=LABELS)
    source = load_images("own", split, data_dir=tmp_path)
    images, labels = everything(source)
    assert np.array_equal(images, COLOUR.transpose(0, 3, 1, 2))
    assert labels == LABELS.tolist()
    assert source.shape == (3, 5, 4)
    assert source.classes == ("0", "1", "2")
    assert source.name == "own"
    assert source.source == str(path)


def test_npz_grey_has_one_channel_and_keeps_its_size(tmp_path: Path) -> None:
    write_npz(tmp_path, images=GREY, labels=LABELS, classes=np.array(["a", "b", "c", "d"]))
    source = load_images("own", "train", data_dir=tmp_path, image_size=32)
    images, _ = everything(source)
    assert np.array_equal(images, GREY[:, None])
    assert source.classes == ("a", "b", "c", "d")


def test_batch_takes_the_images_asked_for(tmp_path: Path) -> None:
    write_npz(tmp_path, images=GREY, labels=LABELS)
    images, labels = load_images("own", "train", data_dir=tmp_path).batch(torch.tensor([4, 2, 4]))
    assert np.array_equal(images[:, 0].numpy(), GREY[[4, 2, 4]])
    assert labels.tolist() == [1, 2, 1]


def test_known_name_brings_its_classes(tmp_path: Path) -> None:
    write_npz(tmp_path, "cifar10", images=COLOUR, labels=LABELS)
    source = load_images("cifar10", "train", data_dir=tmp_path)
    assert len(source.classes) == 10
    assert source.classes[0] == "airplane"


@pytest.mark.parametrize("folder", ["fashion", "fashion-mnist"])
@pytest.mark.parametrize("asked", ["fashion", "fashion-mnist"])
def test_both_spellings_of_fashion(tmp_path: Path, folder: str, asked: str) -> None:
    write_npz(tmp_path, folder, images=GREY, labels=LABELS)
    source = load_images(asked, "train", data_dir=tmp_path)
    assert source.name == "fashion"
    assert source.classes[9] == "Ankle boot"


def nan_images() -> NDArray[np.float32]:
    images = COLOUR.astype(np.float32)
    images[0, 0, 0, 0] = np.nan
    return images


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "float": ({"images": COLOUR / 255, "labels": LABELS}, "'images' is float64, not uint8"),
    "nan": ({"images": nan_images(), "labels": LABELS}, "'images' is float32 with NaN"),
    "rank 2": ({"images": GREY[0], "labels": LABELS}, r"'images' has shape \(5, 4\)"),
    "rank 5": ({"images": COLOUR[None], "labels": LABELS}, "'images' has shape"),
    "channels first": (
        {"images": COLOUR.transpose(0, 3, 1, 2)[..., [0, 1, 2, 3, 0]], "labels": LABELS},
        "'images' has shape .* last dimension must be the 1 to 4 channels",
    ),
    "no images": ({"images": COLOUR[:0], "labels": LABELS[:0]}, "images is empty"),
    "no pixels": ({"images": COLOUR[:, :0], "labels": LABELS}, "images is empty"),
    "float labels": ({"images": GREY, "labels": LABELS * 1.0}, "'labels' is float64"),
    "labels of rank 2": ({"images": GREY, "labels": LABELS[:, None]}, "'labels' has shape"),
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
    "object labels": ({"images": GREY, "labels": LABELS.astype(object)}, "'labels' is unreadable"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_npz_array_is_named(tmp_path: Path, case: str) -> None:
    arrays, message = BAD_ARRAYS[case]
    path = write_npz(tmp_path, **arrays)
    with pytest.raises(UserError, match=message) as caught:
        load_images("own", "train", data_dir=tmp_path)
    assert str(path) in str(caught.value)


def test_known_name_with_too_many_labels(tmp_path: Path) -> None:
    write_npz(tmp_path, "mnist", images=GREY, labels=LABELS + 10)
    with pytest.raises(UserError, match="outside the 10 classes of 'mnist'"):
        load_images("mnist", "train", data_dir=tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 100, 300, -20])
def test_npz_cut_short(tmp_path: Path, keep: int) -> None:
    path = write_npz(tmp_path, images=COLOUR, labels=LABELS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_images("own", "train", data_dir=tmp_path)


def test_npz_with_flipped_pixels(tmp_path: Path) -> None:
    path = write_npz(tmp_path, images=COLOUR, labels=LABELS)
    content = bytearray(path.read_bytes())
    at = content.index(COLOUR.tobytes()[:32])
    content[at] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match="'images' is unreadable"):
        load_images("own", "train", data_dir=tmp_path)


@pytest.mark.parametrize("pickled", [False, True])
def test_npz_that_is_another_file(tmp_path: Path, pickled: bool) -> None:
    path = write_npz(tmp_path, images=GREY, labels=LABELS)
    with path.open("wb") as stream:
        if pickled:
            pickle.dump({"images": [1]}, stream)
        else:
            np.save(stream, GREY)
    with pytest.raises(UserError, match=re.escape(str(path)) + r": not a"):
        load_images("own", "train", data_dir=tmp_path)


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
        images = data._read_npz(io.BytesIO(content), "own", "file").images
        assert np.array_equal(images[:, 0].numpy(), GREY)


@pytest.mark.parametrize(("offset", "value"), [(6, 200), (8, 1)])  # zip version; encrypted
def test_npz_of_a_kind_that_zipfile_refuses(tmp_path: Path, offset: int, value: int) -> None:
    path = write_npz(tmp_path, images=GREY, labels=LABELS)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] = value  # the archive's list of files
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_images("own", "train", data_dir=tmp_path)


# --- ImageSet


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64), "float32, not uint8"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "3 dimens"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2), "row of int64"),
        (
            torch.zeros(2, 1, 3, 3, dtype=torch.uint8),
            torch.zeros(2, 1, dtype=torch.int64),
            "row of int64",
        ),
    ],
)
def test_image_set_is_checked(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=f"here: .*{message}"):
        ImageSet("own", ("a",), images, labels, "here")


# --- MNIST's idx files


@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_idx(
    tmp_path: Path, name: str, folder: str, packed: bool, split: data.Split, prefix: str
) -> None:
    write_idx(tmp_path / folder / "raw", prefix, packed)
    source = load_images(name, split, data_dir=tmp_path)
    images, labels = everything(source)
    assert np.array_equal(images, GREY[:, None])
    assert labels == LABELS.tolist()
    assert source.source == str(tmp_path / folder / "raw")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("change", [-1, 3])
def test_idx_of_wrong_length(tmp_path: Path, which: int, change: int) -> None:
    path = write_idx(tmp_path / "MNIST" / "raw")[which]
    whole = path.read_bytes()
    path.write_bytes((whole + bytes(3))[: len(whole) + change])
    with pytest.raises(UserError, match=f"{len(whole)} bytes in all, {len(whole) + change}") as e:
        load_images("mnist", "train", data_dir=tmp_path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("cut", [1, 8, 40])  # in the trailer, and in the pixels
def test_idx_gz_cut_short(tmp_path: Path, cut: int) -> None:
    path, _ = write_idx(tmp_path / "MNIST" / "raw", packed=True)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="cut short: its header asks for 136 bytes") as caught:
        load_images("mnist", "train", data_dir=tmp_path)
    assert str(path) in str(caught.value)


def test_idx_gz_that_is_not_gz(tmp_path: Path) -> None:
    path, _ = write_idx(tmp_path / "MNIST" / "raw", packed=True)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_images("mnist", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, too short"),
        (b"<html>not found</html>", "starts with 3c68746d, not 00000803"),
        (idx_bytes(LABELS) + bytes(20), "starts with 00000801, not 00000803"),
    ],
)
def test_idx_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    path, _ = write_idx(tmp_path / "MNIST" / "raw")
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_images("mnist", "train", data_dir=tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("which", [0, 1])
def test_idx_with_one_file_missing(tmp_path: Path, which: int) -> None:
    path = write_idx(tmp_path / "MNIST" / "raw")[which]
    path.unlink()
    with pytest.raises(UserError, match=re.escape(str(path)) + " is missing"):
        load_images("mnist", "train", data_dir=tmp_path)


# --- CIFAR-10's batches


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: data.Split, batches: int
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


# --- image folders


@pytest.mark.parametrize(
    ("split", "folder"), [("train", "train"), ("test", "val"), ("test", "test")]
)
@pytest.mark.parametrize("below", ["imagenet", "."])
def test_image_folder(tmp_path: Path, split: data.Split, folder: str, below: str) -> None:
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


def test_image_folder_of_grey_images_is_rgb(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("L", (9, 9), 77).save(tmp_path / "a" / "grey.png")
    images, _ = ImageFolder("own", tmp_path, image_size=8).batch(torch.tensor([0]))
    assert images.shape == (1, 3, 8, 8)
    assert images.unique().tolist() == [77]


def test_image_folder_default_size_and_empty_batch(tmp_path: Path) -> None:
    write_folder(tmp_path / "own" / "train")
    source = load_images("own", "train", data_dir=tmp_path)
    assert source.batch(torch.tensor([], dtype=torch.int64))[0].shape == (0, 3, 224, 224)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_unreadable_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    write_folder(tmp_path / "own" / "train", size=(64, 64))
    path = tmp_path / "own" / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    source = load_images("own", "train", data_dir=tmp_path, image_size=8)
    source.batch(torch.tensor([0, 1]))
    with pytest.raises(UserError, match=re.escape(str(path)) + ": unreadable image"):
        source.batch(torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("class_folder", [False, True])
def test_image_folder_without_images(tmp_path: Path, class_folder: bool) -> None:
    folder = tmp_path / "own" / "train"
    (folder / "cat" if class_folder else folder).mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(str(folder)) + ": not an image folder"):
        load_images("own", "train", data_dir=tmp_path)


def test_image_size_below_one(tmp_path: Path) -> None:
    write_folder(tmp_path / "own" / "train")
    with pytest.raises(UserError, match="image size 0"):
        load_images("own", "train", data_dir=tmp_path, image_size=0)


# --- nothing found


@pytest.mark.parametrize("state", ["does not exist", "is empty", "is not a folder"])
def test_no_data_dir(tmp_path: Path, state: str) -> None:
    root = tmp_path / "there"
    if state == "is empty":
        root.mkdir()
    elif state == "is not a folder":
        root.write_text("")
    with pytest.raises(UserError, match=state) as caught:
        load_images("cifar10", "test", data_dir=root)
    message = str(caught.value)
    assert str(root / "cifar10" / "test.npz") in message
    assert str(root / "cifar-10-batches-py") in message
    assert "val or test" in message
    assert "leave --data-dir out" in message
    assert "\n" not in message


def test_other_split_only(tmp_path: Path) -> None:
    write_npz(tmp_path, "mnist", "train", images=GREY, labels=LABELS)
    with pytest.raises(UserError, match="holds no test images of 'mnist'; looked for"):
        load_images("mnist", "test", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("asked", "meant"), [("mnits", "mnist"), ("MNIST", "mnist"), ("flower", "flowers")]
)
def test_mistyped_name(tmp_path: Path, asked: str, meant: str) -> None:
    write_npz(tmp_path, "flowers", images=GREY, labels=LABELS)
    (tmp_path / "MNIST").mkdir()
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        load_images(asked, "train", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["", "..", "../mnist", "/etc", "a b"])
def test_names_are_not_paths(tmp_path: Path, name: str) -> None:
    write_npz(tmp_path, "mnist", images=GREY, labels=LABELS)
    with pytest.raises(UserError, match="a name has only letters"):
        load_images(name, "train", data_dir=tmp_path / "mnist")


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'val' is neither"):
        load_images("mnist", "val", data_dir=tmp_path)  # type: ignore[arg-type]


# --- cache and download


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, no Debian package, and no network."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CODEDINVNET_CACHE", str(folder))
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "debian")

    def fail(url: str, download_root: str, **_: Any) -> None:
        (Path(download_root) / "half.gz").write_bytes(b"half")
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    return folder


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
    folder = Path(download_root)
    write_idx(folder, "train")
    write_idx(folder, "t10k")
    (folder / url.rpartition("/")[2]).write_bytes(b"packed")


def test_download_into_the_cache_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = "torchvision.datasets.mnist.download_and_extract_archive"
    with monkeypatch.context() as patch:
        patch.setattr(target, working_download)
        images, _ = everything(load_images("mnist", "train"))
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
    monkeypatch.setattr("codedinvnet.data.time.time", lambda: now + age)
    with pytest.raises(UserError, match="could not download"):
        load_images("mnist", "train")
    assert leftover.exists() == kept


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


@pytest.mark.parametrize(
    ("own", "base", "expected"),
    [("/a", "/b", "/a"), ("", "/b", "/b/codedinvnet"), ("", "", "/home/u/.cache/codedinvnet")],
)
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, own: str, base: str, expected: str) -> None:
    monkeypatch.setenv("CODEDINVNET_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/u"))
    assert data._cache_dir() == Path(expected)


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


# --- splits and groups


@given(st.data(), st.integers(1, 300), st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_split_indices(draw: st.DataObject, count: int, seed: int) -> None:
    validation = draw.draw(st.integers(0, count - 1))
    train, held = split_indices(count, validation, seed)
    assert len(held) == validation
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(count))
    again = split_indices(count, validation, seed)
    assert torch.equal(train, again[0])
    assert torch.equal(held, again[1])


def test_split_indices_differ_by_seed_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = (split_indices(1000, 100, seed)[1] for seed in (0, 1))
    assert not torch.equal(first, second)
    assert first.tolist() != list(range(100))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("count", "validation"), [(5, 5), (5, 6), (5, -1), (0, 0)])
def test_split_indices_refuses(count: int, validation: int) -> None:
    with pytest.raises(UserError, match=f"cannot set {validation} of {count} images"):
        split_indices(count, validation, 0)


@given(st.data(), st.integers(2, 200), st.integers(0, 1000))
@settings(deadline=None)
def test_random_groups(draw: st.DataObject, count: int, seed: int) -> None:
    k = draw.draw(st.integers(2, count))
    groups = random_groups(count, k, torch.Generator().manual_seed(seed))
    assert groups.members.shape == groups.counted.shape == (-(-count // k), k)
    assert groups.members.dtype == torch.int64
    assert groups.counted.dtype == torch.bool
    assert sorted(groups.members[groups.counted].tolist()) == list(range(count))
    assert all(len(set(group)) == k for group in groups.members.tolist())
    assert groups.counted[:-1].all()
    again = random_groups(count, k, torch.Generator().manual_seed(seed))
    assert torch.equal(groups.members, again.members)


def test_random_groups_are_random_filling_included() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [random_groups(1001, 4, generator) for _ in range(20)]
    assert len({tuple(groups.members[0].tolist()) for groups in draws}) == 20
    assert all(not groups.members[:-1].diff(dim=1).eq(1).all() for groups in draws)
    # What fills the last group up comes from anywhere, not from the first groups.
    rows = [
        int((groups.members[:-1] == filler).nonzero()[0, 0])
        for groups in draws
        for filler in groups.members[-1][~groups.counted[-1]]
    ]
    assert max(rows) > 150
    assert len(set(rows)) > 30


@pytest.mark.parametrize(("count", "k"), [(10, 1), (10, 0), (10, 11), (1, 2), (0, 2)])
def test_random_groups_refuses(count: int, k: int) -> None:
    with pytest.raises(UserError, match=f"k={k} cannot be made of {count} images"):
        random_groups(count, k, torch.Generator())
