"""Inputs of every kind, as a model takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codedinvnet.common.errors import UserError
from codedinvnet.models.base import Scores, Signature, TensorSpec
from codedinvnet.protection.inputs import FEWEST, Inputs, read_inputs, split

SCORES = (TensorSpec("y", "FP32", (4,)),)
IMAGE = Signature((TensorSpec("x", "FP32", (3, 4, 6)),), SCORES, scores=Scores("y", "logits"))
BYTES = Signature((TensorSpec("x", "UINT8", (4, 6, 3)),), SCORES, scores=Scores("y", "logits"))
VECTOR = Signature((TensorSpec("x", "FP32", (5,)),), SCORES, scores=Scores("y", "logits"))


def write_images(folder: Path) -> np.ndarray:
    """Write random images and return their pixels (N, H, W, 3)."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        place = folder / f"class{number}" / f"{number}.png"
        place.parent.mkdir(parents=True)
        Image.fromarray(image).save(place)
    (folder / "notes.txt").write_text("no image")
    return pixels


def whole(inputs: Inputs) -> np.ndarray:
    """Return all queries of the only input."""
    (found,) = inputs.batch(np.arange(len(inputs))).values()
    return found


@pytest.mark.parametrize("kind", ["folder", "npz", "npy", "unnamed"])
def test_images_become_floats_in_0_1_or_stay_bytes(kind: str, tmp_path: Path) -> None:
    pixels = write_images(tmp_path / "folder")
    np.savez(tmp_path / "npz.npz", images=pixels, other=[0, 1])
    np.save(tmp_path / "npy.npy", pixels)
    np.savez(tmp_path / "unnamed", pixels)
    suffix = {"folder": "", "npy": ".npy"}.get(kind, ".npz")
    path = tmp_path / f"{kind}{suffix}"
    floats = whole(read_inputs(path, IMAGE))
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats, pixels.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    np.testing.assert_array_equal(whole(read_inputs(path, BYTES)), pixels)


def test_images_are_resized_whole(tmp_path: Path) -> None:
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 8:] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    square = Signature((TensorSpec("x", "FP32", (3, 8, 8)),), ())
    found = whole(read_inputs(tmp_path, square))
    assert found[0, :, :, 0].max() < 0.1
    assert found[0, :, :, -1].min() > 0.9


def test_a_function_of_the_users_own_makes_queries(tmp_path: Path) -> None:
    pixels = write_images(tmp_path / "folder")
    text = "import numpy as np\ndef f(image):\n    return np.asarray(image)[0, :5, 0] * 2.0\n"
    (tmp_path / "mine.py").write_text(text)
    found = read_inputs(tmp_path / "folder", VECTOR, f"{tmp_path / 'mine.py'}:f")
    np.testing.assert_array_equal(whole(found), pixels[:, 0, :5, 0] * np.float32(2))


def test_repetitions_are_dropped_and_parts_share_nothing() -> None:
    specs = (TensorSpec("x", "FP32", (1,)),)
    rows = np.arange(1000, dtype=np.float32)[:, None]
    inputs = Inputs({"x": np.concatenate([rows, rows])}, specs).distinct()
    np.testing.assert_array_equal(inputs.arrays["x"], rows)
    assert inputs.digest != Inputs({"x": rows[::-1]}, specs).digest
    parts = split(len(inputs), 0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(1000))
    assert [len(part) for part in parts] == [600, 100, 150, 150]
    assert [len(part) for part in split(100_000, 0)] == [92_000, 2000, 3000, 3000]
    assert not np.array_equal(parts.test, split(1000, 1).test)
    with pytest.raises(UserError, match=f"at least {FEWEST}"):
        split(FEWEST - 1, 0)
