"""Students: as large as the budget allows, and made of the served model's own graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.models import open_model
from codedinvnet.protection import students
from codedinvnet.protection.inputs import Inputs, split
from codedinvnet.protection.students import STUDENTS, SmallerImages, Student, Unfit, kind_of
from codedinvnet.protection.teacher import Teacher, ask
from tests.protection.conftest import PLACE
from tests.protection.factories import FEATURES

GENERATOR = np.random.default_rng(0)


def tinted(*shape: int) -> np.ndarray:
    """Return images (300, *shape) in 0..1, each with a colour of its own."""
    colours = GENERATOR.random((300, 3), np.float32)
    colours = colours[:, :, None, None] if shape[0] == 3 else colours[:, None, None]
    found: np.ndarray = colours * GENERATOR.random((300, *shape), np.float32)
    return found


def bands() -> np.ndarray:
    """Return signals (300, 1000) of three frequencies, each as loud as it likes."""
    waves = np.sin(np.outer([0.3, 0.9, 1.5], np.arange(1000)))
    found: np.ndarray = 9 * GENERATOR.random((300, 3)) ** 4 @ waves
    return found


ARRAYS: dict[str, dict[str, np.ndarray]] = {
    "vectors": {"x": GENERATOR.random((300, FEATURES), np.float32)},
    "gaps": {"x": GENERATOR.random((300, FEATURES), np.float32)},
    "two_inputs": {
        "numbers": GENERATOR.random((300, 5), np.float32),
        "flags": GENERATOR.random((300, 3)) < 0.5,
    },
    "signal": {"x": bands().astype(np.float32)},
    "masked": {
        "ids": GENERATOR.integers(0, 9, (300, 20)),
        "kinds": GENERATOR.integers(0, 2, (300, 20)),
    },
    "tokens": {"ids": GENERATOR.integers(0, 9, (300, 20))},
    "times": {"x": GENERATOR.integers(0, 10**6, (300, 4))},
    "signed": {"x": GENERATOR.integers(-5, 5, (300, 4))},
    "colours": {"x": tinted(3, 32, 32)},
    "residual": {"images": tinted(3, 16, 16)},
    "picture": {"x": 255 * tinted(3, 96, 96)},
    "likely_picture": {"x": 255 * tinted(96, 96, 3)},
}
ARRAYS["gaps"]["x"][::3, 0] = np.nan
ARRAYS["masked"]["mask"] = np.arange(20) < GENERATOR.integers(1, 21, (300, 1))
ARRAYS["masked"]["mask"] = ARRAYS["masked"]["mask"].astype(np.int64)


def teacher_of(name: str, folder: Path) -> Teacher:
    """Return a model of the factories with its scores."""
    model = open_model(f"{PLACE}:{name}")
    specs = model.signature.inputs
    arrays = {spec.name: ARRAYS[name][spec.name] for spec in specs}
    inputs = Inputs(arrays, specs)
    return ask(model, inputs, split(len(inputs), 0), folder, 5.0, task="classify")


def macs(student: Student, teacher: Teacher) -> int:
    """Count a student's multiply-adds."""
    return count_macs(lambda: student.raw(teacher.inputs.batch(np.arange(1))))


def logits(student: Student, teacher: Teacher, count: int = 5) -> np.ndarray:
    """Return a student's logits of the first inputs."""
    found: np.ndarray = student.eval().raw(teacher.inputs.batch(np.arange(count))).numpy()
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vectors", "vectors"),
        ("gaps", "vectors"),
        ("two_inputs", "vectors"),
        ("times", "vectors"),
        ("signed", "vectors"),
        ("tokens", "tokens"),
        ("signal", "signals"),
        ("masked", "tokens"),
        ("colours", "images"),
    ],
)
def test_a_fresh_network_is_as_wide_as_its_size(name: str, kind: str, tmp_path: Path) -> None:
    teacher = teacher_of(name, tmp_path)
    assert kind_of(teacher) == kind
    families = {"vectors": "mlp", "tokens": "convolutions", "images": "fresh", "signals": "signal"}
    family = STUDENTS[families[kind]]
    narrow, wide = (
        family(teacher, family.choose(teacher, size)) for size in family.sizes(teacher)[:2]
    )
    assert macs(narrow.eval(), teacher) < macs(wide.eval(), teacher)
    assert np.isfinite(logits(wide, teacher)).all()


def test_a_graph_that_cannot_be_exported_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no operator for that")

    monkeypatch.setattr(students, "export", fails)
    teacher = teacher_of("picture", tmp_path)
    with pytest.raises(Unfit, match="no operator for that"):
        SmallerImages.choose(teacher, 0.6)


@pytest.mark.parametrize("name", ["picture", "likely_picture"])
def test_the_model_runs_on_smaller_images(name: str, tmp_path: Path) -> None:
    teacher = teacher_of(name, tmp_path)
    size = SmallerImages.sizes(teacher)[0]
    choice = SmallerImages.choose(teacher, size)
    assert 24 <= choice["height"] < 96
    student = SmallerImages(teacher, choice).eval()
    assert np.isfinite(logits(student, teacher)).all()
    whole = SmallerImages(teacher, {"height": 96, "width": 96}).eval()
    answers = logits(whole, teacher, 50).argmax(1)
    np.testing.assert_array_equal(answers, teacher.outputs.argmax(1)[:50])


def test_small_images_do_not_become_smaller(tmp_path: Path) -> None:
    with pytest.raises(Unfit, match="fewer than 24 pixels"):
        SmallerImages.sizes(teacher_of("residual", tmp_path))
