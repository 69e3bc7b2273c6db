"""What `codedinvnet protect` refuses: one line on stderr, exit code 2, and no protection."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from codedinvnet.protection.folder import DESCRIPTION
from tests.conftest import Command
from tests.protection.conftest import arguments, description, queries

IDS = np.zeros((300, 5), np.float32)
FLAGS = np.zeros((300, 3), bool)


def arrays(**named: Any) -> Callable[[Path], Path]:
    """Return what writes arrays."""

    def write(folder: Path) -> Path:
        np.savez(folder / "x.npz", **named)
        return folder / "x.npz"

    return write


def text(name: str, content: str) -> Callable[[Path], Path]:
    """Return what writes a file."""

    def write(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return write


def images(pixels: np.ndarray | None) -> Callable[[Path], Path]:
    """Return what writes a folder with one image, which may be damaged."""

    def write(folder: Path) -> Path:
        place = folder / "images"
        place.mkdir()
        if pixels is None:
            (place / "a.png").write_bytes(b"no")
        elif pixels.size:
            Image.fromarray(pixels).save(place / "a.png")
        return place

    return write


GREY = np.zeros((3, 32, 32), np.uint8)
RGB = np.zeros((32, 32, 3), np.uint8)
CASES: dict[str, tuple[str, Callable[[Path], Path], tuple[str, ...], str]] = {
    # models
    "no factory": ("nothing", queries, (), "nothing"),
    "one score": ("regression", queries, (), r"must be floats \(B, classes\).*output FP32 \(1,\)"),
    "tolerance": ("regression", queries, ("--task", "regress"), "needs --tolerance"),
    "no number": ("regression", queries, ("--task", "regress", "--tolerance", "x"), "'x' is not a"),
    "cosine": ("embedding", queries, ("--task", "embed", "--cosine", "2"), "between 0 and 1"),
    "output": ("vectors", queries, ("--output", "y"), "--output y must be floats"),
    "maps": ("maps", queries, (), r"has the shape \(3, 1, 1\) .* flatten"),
    "random": ("at_random", queries, (), "not deterministic"),
    "bundle": ("mnist", queries, (), "is a bundle"),
    "constant": ("constant", queries, (), "answers class 0 to all inputs"),
    # files
    "no file": ("vectors", lambda folder: folder / "x.npy", (), "cannot read .*No such file"),
    "text": ("vectors", text("x.csv", "1"), (), "as a folder of images, .npz or .npy"),
    "damaged": ("vectors", text("x.npy", "damaged"), (), "cannot read"),
    "objects": ("vectors", arrays(x=np.array([None] * 3)), (), "cannot read"),
    "few": ("vectors", arrays(x=np.zeros((3, 12))), (), "1 different inputs; at least 200"),
    # arrays
    "lacks": ("vectors", arrays(y=IDS, z=IDS), (), "lacks an array for .*'x'"),
    "shape": ("vectors", arrays(x=np.zeros((3, 4))), (), r"shape \(4,\), not \(12,\)"),
    "grey": ("colours", arrays(x=GREY), (), r"shape \(32, 32\), not \(3, 32, 32\)"),
    "kind": ("two_inputs", arrays(numbers=IDS, flags=IDS[:, :3]), (), "not BOOL"),
    "counts": ("two_inputs", arrays(numbers=IDS, flags=FLAGS[:9]), (), "different numbers of"),
    # images
    "empty": ("colours", images(np.zeros(0, np.uint8)), (), "no images"),
    "broken": ("colours", images(None), (), r"a\.png: UnidentifiedImageError"),
    "deep": ("colours", images(np.zeros((4, 6), np.uint16)), (), "mode is I.* --preprocess"),
    "vector": ("vectors", images(RGB), (), "not an image: give --preprocess"),
    "inputs": ("two_inputs", images(RGB), (), "models with one input"),
    "raises": ("vectors", images(RGB), ("--preprocess", "math:floor"), "--preprocess math:floor"),
    "no module": ("vectors", images(RGB), ("--preprocess", "nowhere.py:f"), "no file nowhere.py"),
    "returns": ("colours", images(RGB), ("--preprocess", "numpy:asarray"), r"\(32, 32, 3\), not"),
    "array": ("vectors", queries, ("--preprocess", "numpy:asarray"), "must be a folder"),
    # options
    "work": ("vectors", queries, ("--work", "1.5"), "--work: must be above 0 and at most 0.5"),
    "minutes": ("vectors", queries, ("--minutes", "1e-9"), "--minutes"),
    "k": ("vectors", queries, ("--k", "301"), "--k 301"),
    "threads": ("vectors", queries, ("--threads", "0"), "--threads"),
    "scores": ("vectors", queries, ("--scores", "other"), "scores: "),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_protected_is_refused_in_one_line(
    case: str, call: Command, tmp_path: Path
) -> None:
    model, write, words, why = CASES[case]
    command = arguments(model, write(tmp_path), tmp_path / "out", *words)
    command[1] = model if model == "mnist" else command[1]
    outcome = call(*command)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("error:"))
    assert re.search(why, line), line
    assert not (tmp_path / "out" / DESCRIPTION).exists()


def test_a_finished_protection_is_not_overwritten(
    finished: Path, call: Command, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    before = description(folder)
    outcome = call(*arguments("vectors", queries(tmp_path), folder))
    assert outcome.code == 2
    assert "already holds a protection" in outcome.err
    assert description(folder) == before
