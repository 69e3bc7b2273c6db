"""Inputs of every kind, as a model takes them; and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codedinvnet.common.errors import UserError
from codedinvnet.models.base import Scores, Signature, TensorSpec
from codedinvnet.protect.inputs import FEWEST, Inputs, read_inputs, split

IMAGE = Signature((TensorSpec("x", "FP32", (3, 4, 6)),), ())
BYTES = Signature((TensorSpec("x", "UINT8", (4, 6, 3)),), ())
VECTOR = Signature((TensorSpec("x", "FP32", (5,)),), ())
SCORED = Signature(VECTOR.inputs, (TensorSpec("y", "FP32", (4,)),), scores=Scores("y", "logits"))
"""A classifier of four classes."""
TOKENS = Signature((TensorSpec("ids", "INT32", (7,)), TensorSpec("mask", "BOOL", (7,))), ())
OWN = "import numpy as np\ndef f(image):\n    return np.asarray(image)[0, :5, 0] * 2.0\n"


def write_images(folder: Path, count: int = 2, size: tuple[int, int] = (6, 4)) -> np.ndarray:
    """Write random images and return their pixels (N, H, W, 3)."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        place = folder / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    (folder / "notes.txt").write_text("no image")
    return pixels


def whole(inputs: Inputs) -> np.ndarray:
    """Return all queries of the only input."""
    (found,) = inputs.batch(np.arange(len(inputs))).values()
    return found


@pytest.mark.parametrize("kind", ["folder", "npz", "npy"])
def test_images_become_floats_in_0_1_or_stay_bytes(kind: str, tmp_path: Path) -> None:
    pixels = write_images(tmp_path / "folder")
    np.savez(tmp_path / "npz.npz", images=pixels, labels=[0, 1])
    np.save(tmp_path / "npy.npy", pixels)
    path = tmp_path / (kind if kind == "folder" else f"{kind}.{kind}")
    floats = whole(read_inputs(path, IMAGE))
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats, pixels.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    np.testing.assert_array_equal(whole(read_inputs(path, BYTES)), pixels)
    labels = read_inputs(path, IMAGE).labels
    assert (labels is not None) == (kind == "npz")


def test_images_are_resized_whole(tmp_path: Path) -> None:
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 8:] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    square = Signature((TensorSpec("x", "FP32", (3, 8, 8)),), ())
    found = whole(read_inputs(tmp_path, square))
    assert found[0, :, :, 0].max() < 0.1
    assert found[0, :, :, -1].min() > 0.9


@pytest.mark.parametrize("kind", ["folder", "npy"])
def test_a_function_of_the_users_own_makes_queries(kind: str, tmp_path: Path) -> None:
    pixels = write_images(tmp_path / "folder")
    np.save(tmp_path / "x.npy", pixels)
    (tmp_path / "mine.py").write_text(OWN)
    path = tmp_path / ("folder" if kind == "folder" else "x.npy")
    found = whole(read_inputs(path, VECTOR, f"{tmp_path / 'mine.py'}:f"))
    np.testing.assert_array_equal(found, pixels[:, 0, :5, 0] * np.float32(2))


def test_labels_may_come_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 5)))
    (tmp_path / "labels.txt").write_text("3\n1\n")
    labels = read_inputs(tmp_path / "x.npy", VECTOR, "", tmp_path / "labels.txt").labels
    assert labels is not None
    assert labels.tolist() == [3, 1]


ARRAYS = {
    "lacks": (VECTOR, {"y": np.zeros((3, 5)), "z": np.zeros(3)}, "lacks an array for .*'x'"),
    "shape": (VECTOR, {"x": np.zeros((3, 4))}, r"queries of shape \(4,\), not \(5,\)"),
    "kind": (TOKENS, {"ids": np.zeros((3, 7)), "mask": np.zeros((3, 7), bool)}, "not INT32"),
    "range": (TOKENS, {"ids": np.full((3, 7), 2**40), "mask": np.ones((3, 7), bool)}, "range"),
    "large": (VECTOR, {"x": np.full((3, 5), 1e300)}, "out of range for FP32"),
    "counts": (TOKENS, {"ids": np.zeros((3, 7), int), "mask": np.ones((2, 7), bool)}, "numbers of"),
    "labels": (SCORED, {"x": np.zeros((3, 5)), "labels": [0, 1, 4]}, "from 0 to 4, .* 0 to 3"),
    "few": (SCORED, {"x": np.zeros((3, 5)), "labels": [0, 1]}, "one integer for each of 3"),
    "objects": (VECTOR, {"x": np.array([None] * 3)}, "cannot read"),
}


@pytest.mark.parametrize("case", list(ARRAYS))
def test_arrays_that_the_model_does_not_take_are_refused(case: str, tmp_path: Path) -> None:
    signature, arrays, why = ARRAYS[case]
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=why):
        read_inputs(tmp_path / "x.npz", signature)


@pytest.mark.parametrize(
    ("name", "content", "signature", "preprocess", "why"),
    [
        ("nothing", None, VECTOR, "", "there is no"),
        ("x.csv", "1", VECTOR, "", "not a folder of images"),
        ("x.npy", "damaged", VECTOR, "", "cannot read"),
        ("empty", "folder", IMAGE, "", "no images"),
        ("deep", "folder", IMAGE, "", r"unsupported image mode I.* \(need 8-bit\): --preprocess"),
        ("broken", "folder", IMAGE, "", r"cannot read .*a\.png"),
        ("good", "folder", TOKENS, "", "one input"),
        ("good", "folder", VECTOR, "", "--preprocess"),
        ("good", "folder", VECTOR, "math:floor", "--preprocess raised"),
        ("good", "folder", VECTOR, "math:pi", "is not a function"),
        ("good", "folder", VECTOR, "nowhere.py:f", "--preprocess nowhere.py:f"),
        ("good", "folder", IMAGE, "numpy:asarray", "returned shape"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    name: str,
    content: str | None,
    signature: Signature,
    preprocess: str,
    why: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
        if name == "deep":
            Image.fromarray(np.zeros((4, 6), np.uint16)).save(path / "a.png")
        elif name == "broken":
            (path / "a.png").write_bytes(b"no")
        elif name == "good":
            write_images(path, size=(7, 7))
    elif content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=why) as caught:
        read_inputs(path, signature, preprocess)
    assert len(str(caught.value).splitlines()) == 1


def test_repetitions_are_dropped_and_parts_share_nothing() -> None:
    specs = (TensorSpec("x", "FP32", (1,)),)
    rows = np.arange(1000, dtype=np.float32)[:, None]
    inputs = Inputs({"x": np.concatenate([rows, rows])}, specs).distinct()
    np.testing.assert_array_equal(inputs.arrays["x"], rows)
    assert inputs.digest() != Inputs({"x": rows[::-1]}, specs).digest()
    parts = split(len(inputs), 0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(1000))
    assert [len(part) for part in parts] == [600, 100, 150, 150]
    assert [len(part) for part in split(100_000, 0)] == [87_500, 2500, 5000, 5000]
    assert not np.array_equal(parts.test, split(1000, 1).test)
    with pytest.raises(UserError, match=f"at least {FEWEST}"):
        split(FEWEST - 1, 0)
