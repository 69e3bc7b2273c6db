"""Inputs of every kind, as a model takes them; and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codedinvnet.errors import UserError
from codedinvnet.models.base import Scores, Signature, TensorSpec
from codedinvnet.protect.images import Preprocessing
from codedinvnet.protect.inputs import FEWEST, Inputs, read_inputs, split

IMAGE = Signature((TensorSpec("x", "FP32", (3, 4, 6)),), ())
VECTOR = Signature((TensorSpec("x", "FP32", (5,)),), ())
SCORED = Signature(VECTOR.inputs, (TensorSpec("y", "FP32", (4,)),), scores=Scores("y", "logits"))
"""A classifier of four classes."""
TOKENS = Signature((TensorSpec("ids", "INT32", (7,)), TensorSpec("mask", "BOOL", (7,))), ())


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
    (found,) = inputs.batch(np.arange(len(inputs))).values()
    return found


def test_images_are_scaled_and_laid_out_as_told(tmp_path: Path) -> None:
    pixels = write_images(tmp_path)
    how = Preprocessing(scale=0.5, mean=(1.0, 2.0, 3.0), std=(2.0,))
    wanted = (pixels.transpose(0, 3, 1, 2) * 0.5 - np.array([1, 2, 3])[:, None, None]) / 2
    found = whole(read_inputs(tmp_path, IMAGE, how))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted)
    last = Signature((TensorSpec("x", "UINT8", (4, 6, 3)),), ())
    np.testing.assert_array_equal(whole(read_inputs(tmp_path, last, Preprocessing())), pixels)


def test_the_middle_of_resized_images_is_cut_out(tmp_path: Path) -> None:
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12] = 255  # the middle square
    Image.fromarray(image).save(tmp_path / "a.png")
    square = Signature((TensorSpec("x", "FP32", (3, 8, 8)),), ())
    found = whole(read_inputs(tmp_path, square, Preprocessing(resize=8, crop=8)))
    np.testing.assert_allclose(found, 1.0)
    squeezed = whole(read_inputs(tmp_path, square, Preprocessing()))
    assert 0.4 < squeezed.mean() < 0.6


def test_a_function_of_the_users_own_makes_queries(tmp_path: Path) -> None:
    pixels = write_images(tmp_path / "images")
    code = "import numpy as np\ndef f(image):\n    return np.asarray(image)[0, :5, 0] * 2.0\n"
    (tmp_path / "mine.py").write_text(code)
    how = Preprocessing(function=f"{tmp_path / 'mine.py'}:f")
    found = whole(read_inputs(tmp_path / "images", VECTOR, how))
    np.testing.assert_array_equal(found, pixels[:, 0, :5, 0] * np.float32(2))


def test_arrays_of_images_are_turned_and_scaled(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    path = tmp_path / "images.npz"
    np.savez(path, images=pixels, labels=np.arange(3), classes=np.array(["a", "b", "c"]))
    inputs = read_inputs(path, IMAGE, Preprocessing())
    np.testing.assert_allclose(whole(inputs), pixels.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    assert inputs.labels is not None
    assert inputs.labels.tolist() == [0, 1, 2]


def test_logged_requests_are_read(tmp_path: Path) -> None:
    lines = []
    for number in (0, 1):
        ids = {"name": "ids", "shape": [2, 7], "datatype": "INT32", "data": [number] * 14}
        mask = {"name": "mask", "shape": [2, 7], "datatype": "BOOL", "data": [[True] * 7] * 2}
        lines.append(json.dumps({"id": "a", "inputs": [mask, ids]}))
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines) + "\n")
    batch = read_inputs(path, TOKENS, Preprocessing()).batch(np.arange(4))
    assert batch["ids"].dtype == np.int32
    assert batch["ids"][:, 0].tolist() == [0, 0, 1, 1]
    assert batch["mask"].all()


def test_a_logged_request_of_another_length_is_named(tmp_path: Path) -> None:
    lines = [
        json.dumps({"inputs": [{"name": "x", "shape": [1, n], "data": [0.5] * n}]}) for n in (5, 3)
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"log\.jsonl, line 2 has .*\(3,\).* pad or cut it, do so"):
        read_inputs(path, VECTOR, Preprocessing())


def test_labels_may_come_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 5)))
    (tmp_path / "labels.txt").write_text("3\n1\n")
    inputs = read_inputs(tmp_path / "x.npy", VECTOR, Preprocessing(), tmp_path / "labels.txt")
    assert inputs.labels is not None
    assert inputs.labels.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([1, 2, 3, 4], "from 1 to 4, .* from 0 to 3: do they begin at 1"),
        ([2, 2, 3, 4], "from 2 to 4, .* from 0 to 3: do they begin at 1"),
        ([0, 1, 2, 99], "from 0 to 99, .* from 0 to 3$"),
        ([0, 1, 2, -1], "from -1 to 2, .* from 0 to 3$"),
    ],
)
def test_labels_of_other_classes_than_the_models_are_refused(
    labels: list[int], told: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 5)))
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 5)), labels=np.array(labels))
    (tmp_path / "labels.txt").write_text("\n".join(map(str, labels)))
    with pytest.raises(UserError, match=rf"^--labels: .*labels\.txt: .*{told}"):
        read_inputs(tmp_path / "x.npy", SCORED, Preprocessing(), tmp_path / "labels.txt")
    with pytest.raises(UserError, match=rf"^--inputs: .*x\.npz: .*{told}"):
        read_inputs(tmp_path / "x.npz", SCORED, Preprocessing())


def test_all_classes_of_the_model_are_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 5)), labels=np.arange(4, dtype=np.uint8))
    inputs = read_inputs(tmp_path / "x.npz", SCORED, Preprocessing())
    assert inputs.labels is not None
    assert inputs.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("labels", ["0", "0\n1\n1", "", "0.5\n1", "a"])
def test_labels_are_refused_before_images_are_read(labels: str, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "images" / "class0" / "0.png").write_bytes(b"damaged")
    (tmp_path / "labels.txt").write_text(labels)
    with pytest.raises(UserError, match=r"^--labels: .*labels\.txt"):
        read_inputs(tmp_path / "images", IMAGE, Preprocessing(), tmp_path / "labels.txt")


def test_labels_are_in_the_order_of_the_images_paths(tmp_path: Path) -> None:
    places = ["a/1.png", "a/10.png", "a/2.png", "a-b/0.png", "b.png"]
    for value, place in enumerate(places):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), (value, value, value)).save(tmp_path / place)
    np.save(tmp_path / "labels.npy", np.arange(5))
    how = Preprocessing(scale=1.0)
    inputs = read_inputs(tmp_path, IMAGE, how, tmp_path / "labels.npy")
    assert inputs.labels is not None
    assert whole(inputs)[:, 0, 0, 0].tolist() == inputs.labels.tolist()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.png"))] == places


def test_repeated_inputs_are_left_out() -> None:
    inputs = Inputs({"x": np.array([[1.0], [2.0], [1.0]])}, {}, np.array([5, 6, 7])).distinct()
    assert inputs.arrays["x"].tolist() == [[1.0], [2.0]]
    assert inputs.labels is not None
    assert inputs.labels.tolist() == [5, 6]


def test_the_digest_sees_how_images_are_scaled(tmp_path: Path) -> None:
    write_images(tmp_path)
    hows = (Preprocessing(), Preprocessing(), Preprocessing(scale=1.0))
    one, same, other = (read_inputs(tmp_path, IMAGE, how).digest() for how in hows)
    assert one == same != other


def test_a_split_has_every_input_once() -> None:
    parts = split(1000, seed=3)
    assert sorted(np.concatenate(parts)) == list(range(1000))
    assert [len(part) for part in parts] == [600, 100, 150, 150]
    assert all((np.diff(part) > 0).all() for part in parts)
    again, other = split(1000, seed=3), split(1000, seed=4)
    assert (again.test == parts.test).all()
    assert (other.test != parts.test).any()
    assert len(split(100_000, seed=0).test) == 5000
    users = np.random.default_rng(3).permutation(1000)[:400]  # how a user may have split them
    assert 0.2 < np.isin(parts.test, users).mean() < 0.6
    with pytest.raises(UserError, match=f"{FEWEST}"):
        split(FEWEST - 1, seed=0)


def test_no_inputs_are_too_few() -> None:
    nothing = Inputs({"x": np.zeros((0, 5))}, {}, np.zeros(0, int)).distinct()
    with pytest.raises(UserError, match="--inputs: 0 different inputs are too few"):
        split(len(nothing), seed=0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 6))}, r"shape \(6,\)"),
        ({"y": np.zeros((3, 5))}, "'x'"),
        ({"x": np.array([["a"] * 5])}, "FP32"),
        ({"x": np.zeros((3, 5)), "labels": np.zeros(2, int)}, "labels"),
        ({"x": np.zeros((3, 5)), "labels": np.zeros(3)}, "labels"),
    ],
)
def test_other_arrays_are_refused(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        read_inputs(tmp_path / "x.npz", VECTOR, Preprocessing())


@pytest.mark.parametrize(
    ("datatype", "values", "message"),
    [
        ("INT8", [300, -1], "'x'.* from -1 to 300, and INT8 .* -128 to 127"),
        ("UINT8", [0, -1], "from -1 to 0, and UINT8"),
        ("FP16", [1e6, 1.0], "'x'.* 65504, the largest of FP16"),
        ("FP16", [100_000, 1], "65504"),
    ],
)
@pytest.mark.parametrize("ending", ["npy", "jsonl"])
def test_numbers_that_the_models_datatype_has_not_are_refused(
    ending: str, datatype: str, values: list[float], message: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x.{ending}"
    if ending == "npy":
        np.save(path, np.array([values]))
    else:
        tensor = {"name": "x", "datatype": datatype, "shape": [1, 2], "data": values}
        path.write_text(json.dumps({"inputs": [tensor]}) + "\n")
    signature = Signature((TensorSpec("x", datatype, (2,)),), ())
    with pytest.raises(UserError, match=message):
        read_inputs(path, signature, Preprocessing())


@pytest.mark.parametrize(
    ("datatype", "how", "message"),
    [
        ("INT8", Preprocessing(), "'x', made of images in bytes, .* 0.* to 200.*, and INT8"),
        ("UINT8", Preprocessing(mean=(0.0, 0.0, 100.0)), "from -100.* to 200.*, and UINT8"),
        ("UINT8", Preprocessing(scale=math.nan), "UINT8"),
        ("FP16", Preprocessing(scale=1e6), "65504"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "npy"])
def test_pixels_that_the_models_datatype_has_not_are_refused(
    kind: str, datatype: str, how: Preprocessing, message: str, tmp_path: Path
) -> None:
    pixels = np.zeros((1, 4, 6, 3), np.uint8)
    pixels[0, 0, 0] = 200
    np.save(tmp_path / "x.npy", pixels)
    Image.fromarray(pixels[0]).save(tmp_path / "x.png")
    signature = Signature((TensorSpec("x", datatype, (3, 4, 6)),), ())
    with pytest.raises(UserError, match=message):
        read_inputs(tmp_path if kind == "folder" else tmp_path / "x.npy", signature, how)


def test_pixels_become_the_nearest_whole_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((1, 4, 6, 3), [3, 100, 127], np.uint8))
    signature = Signature((TensorSpec("x", "INT8", (4, 6, 3)),), ())
    found = whole(read_inputs(tmp_path / "x.npy", signature, Preprocessing(std=(0.9, 3.0, 1.01))))
    assert found.dtype == np.int8
    assert found[0, 0, 0].tolist() == [3, 33, 126]
    found = whole(read_inputs(tmp_path / "x.npy", signature, Preprocessing(mean=(3.7, 2.0, 0.0))))
    assert found[0, 0, 0].tolist() == [-1, 98, 127]


@pytest.mark.parametrize(
    ("datatype", "made", "message"),
    [
        ("INT8", "[300, -1]", "it made of .*x.png has values from -1 to 300, and INT8"),
        ("INT8", "[0.5, 1.0]", "it made of .*x.png is float64, not INT8"),
        ("FP16", "[1e6, 1.0]", "it made of .*x.png .* 65504"),
        ("FP32", "['a', 'b']", "it made of .*x.png is <U1, not FP32"),
    ],
)
def test_what_a_users_own_function_makes_is_checked(
    datatype: str, made: str, message: str, tmp_path: Path
) -> None:
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "x.png")
    (tmp_path / "mine.py").write_text(f"def f(image):\n    return {made}\n")
    signature = Signature((TensorSpec("x", datatype, (2,)),), ())
    with pytest.raises(UserError, match=f"^--preprocess: what {message}"):
        read_inputs(tmp_path, signature, Preprocessing(function=f"{tmp_path / 'mine.py'}:f"))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_users_own_function_may_make_a_text(shape: tuple[int, ...], tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "x.png")
    text = "'\u00e4'" if not shape else "['\u00e4']"
    (tmp_path / "mine.py").write_text(f"def f(image):\n    return {text}\n")
    signature = Signature((TensorSpec("x", "BYTES", shape),), ())
    how = Preprocessing(function=f"{tmp_path / 'mine.py'}:f")
    assert whole(read_inputs(tmp_path, signature, how)).ravel().tolist() == ["\u00e4".encode()]


def test_numbers_that_are_infinite_already_stay(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[np.inf, np.nan]]))
    signature = Signature((TensorSpec("x", "FP16", (2,)),), ())
    found = read_inputs(tmp_path / "x.npy", signature, Preprocessing())
    np.testing.assert_array_equal(found.arrays["x"], np.array([[np.inf, np.nan]], np.float16))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npz", b"PK damaged", "damaged"),
        ("x.npy", b"", "damaged"),
        ("x.jsonl", b"{}\n", "line 1"),
        ("x.jsonl", b"\n", "no request"),
        ("x.csv", b"1,2", "x.csv"),
        ("folder/x.png", b"no image", "x.png"),
        ("folder/x.txt", b"no image", "no image"),
    ],
)
def test_damaged_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    given = path.parent if path.parent != tmp_path else path
    with pytest.raises(UserError, match=message):
        read_inputs(given, IMAGE, Preprocessing())


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    """Its first block of pixels is sound, and its second one is not."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png", compress_level=0)
    content = (tmp_path / "x.png").read_bytes()
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    (tmp_path / "x.png").write_bytes(content[:second] + b"\0\0\0\0" + content[second + 4 :])
    with pytest.raises(UserError, match=r"x\.png cannot be read"):
        read_inputs(tmp_path, IMAGE, Preprocessing())


def test_files_that_are_no_images_are_left_out(tmp_path: Path) -> None:
    pixels = write_images(tmp_path)
    for name in ("a.pdf", "b.h5", "c.mpg", "D.PDF"):
        (tmp_path / name).write_bytes(b"no image")
    assert len(read_inputs(tmp_path, IMAGE, Preprocessing())) == len(pixels)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_more_than_a_byte_are_not_cut_off(
    channels: int, dtype: type[np.generic], tmp_path: Path
) -> None:
    pixels = np.arange(24).reshape(4, 6).astype(dtype) * 1000
    Image.fromarray(pixels).save(tmp_path / "deep.tiff")
    image = Signature((TensorSpec("x", "FP32", (channels, 4, 6)),), ())
    with pytest.raises(UserError, match=r"deep\.tiff: .*--preprocess"):
        read_inputs(tmp_path, image, Preprocessing())
    code = "import numpy as np\ndef f(image):\n    return np.asarray(image, 'f4')[0, :5]\n"
    (tmp_path / "mine.py").write_text(code)
    how = Preprocessing(function=f"{tmp_path / 'mine.py'}:f")
    np.testing.assert_array_equal(whole(read_inputs(tmp_path, VECTOR, how))[0], pixels[0, :5])


def test_an_archive_and_an_array_are_told_by_their_content(tmp_path: Path) -> None:
    for name, save in (("x.npz", np.save), ("x.npy", np.savez)):
        with (tmp_path / name).open("wb") as file:
            save(file, np.zeros((2, 5)))
    assert len(read_inputs(tmp_path / "x.npz", VECTOR, Preprocessing())) == 2
    with pytest.raises(UserError, match="no array 'x'"):
        read_inputs(tmp_path / "x.npy", VECTOR, Preprocessing())


def test_a_damaged_part_of_an_archive_is_told(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.random.default_rng(0).random((40, 5)))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_inputs(tmp_path / "x.npz", VECTOR, Preprocessing())


@pytest.mark.parametrize("name", ["labels.npy", "labels.txt"])
def test_damaged_labels_are_told(name: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 5)))
    (tmp_path / name).write_bytes(b"" if name.endswith("npy") else b"\xff\xfe")
    with pytest.raises(UserError, match="--labels"):
        read_inputs(tmp_path / "x.npy", VECTOR, Preprocessing(), tmp_path / name)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Preprocessing(crop=5), "--crop"),
        (Preprocessing(resize=5), "--resize"),
        (Preprocessing(mean=(1.0, 2.0)), "--mean"),
        (Preprocessing(std=(0.0,)), "--std"),
        (Preprocessing(function="no.such.module:f"), "--preprocess"),
        (Preprocessing(function="builtins:repr"), "--preprocess"),
    ],
)
def test_preprocessing_that_does_not_fit_is_refused(
    how: Preprocessing, message: str, tmp_path: Path
) -> None:
    write_images(tmp_path)
    with pytest.raises(UserError, match=message):
        read_inputs(tmp_path, IMAGE, how)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.jsonl"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize(
    ("how", "option"),
    [
        (Preprocessing(resize=6), "--resize"),
        (Preprocessing(crop=6), "--crop"),
        (Preprocessing(function="mine.py:f"), "--preprocess"),
        (Preprocessing(scale=2.0), "--scale"),
        (Preprocessing(mean=(0.5,)), "--mean"),
        (Preprocessing(std=(0.5,)), "--std"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    how: Preprocessing, option: str, dtype: str, name: str, tmp_path: Path
) -> None:
    """Arrays have no whole images, and only pixels in bytes have a scale."""
    path = tmp_path / name
    array = np.zeros((2, 6, 6, 3) if dtype == "uint8" else (2, 3, 6, 6), dtype)
    if name == "x.jsonl":
        tensor = {"name": "x", "shape": [1, 3, 6, 6], "data": [0.5] * 108}
        path.write_text(json.dumps({"inputs": [tensor]}))
    else:
        np.save(path, array) if name == "x.npy" else np.savez(path, x=array)
    square = Signature((TensorSpec("x", "FP32", (3, 6, 6)),), ())
    assert len(read_inputs(path, square, Preprocessing())) > 0
    if name.startswith("x.np") and dtype == "uint8" and option in ("--scale", "--mean", "--std"):
        assert len(read_inputs(path, square, how)) == 2
        return
    with pytest.raises(UserError, match=rf"^{option}: goes with"):
        read_inputs(path, square, how)


def test_texts_of_an_array_are_what_they_were(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    texts = Signature((TensorSpec("x", "BYTES", ()),), ())
    for array in (np.array([b"abc", b"\xff"]), np.array(["abc", "\u00e4"])):
        np.savez(path, x=array)
        found = read_inputs(path, texts, Preprocessing()).batch(np.arange(2))["x"]
        wanted = [text if isinstance(text, bytes) else text.encode() for text in array.tolist()]
        assert found.tolist() == wanted


def test_what_a_users_own_function_does_is_asked_of_nobody_else(tmp_path: Path) -> None:
    write_images(tmp_path)
    how = Preprocessing(resize=6, std=(2.0,), function="mine.py:f")
    with pytest.raises(UserError, match=r"^--resize, --std: goes without --preprocess"):
        read_inputs(tmp_path, IMAGE, how)


def test_a_folder_needs_a_model_of_one_image(tmp_path: Path) -> None:
    write_images(tmp_path)
    for signature in (VECTOR, TOKENS):
        with pytest.raises(UserError, match="--inputs"):
            read_inputs(tmp_path, signature, Preprocessing())
