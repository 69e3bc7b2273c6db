"""The code around a frozen model: its arithmetic, its training, and what it is refused for."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import SERVED
from codedinvnet.config import PartSettings
from codedinvnet.models import open_model
from codedinvnet.models.base import DATATYPES, TensorSpec
from codedinvnet.models.scores import ScoresOf
from codedinvnet.protect import codes
from codedinvnet.protect.coding import CodingStage, decoded_logits
from codedinvnet.protect.distil import Lesson
from codedinvnet.protect.folder import CODE, EVIDENCE, PARTS, load_part, load_protection
from codedinvnet.protect.frozen import FrozenCode, FrozenCoder, frozen_scores
from codedinvnet.protect.inputs import Inputs
from codedinvnet.protect.students import Shape
from codedinvnet.protect.teacher import scores_of
from tests.codes.decodings import assert_is_decoded
from tests.conftest import Command
from tests.models.factories import save_onnx
from tests.protect import factories
from tests.protect.conftest import PLACE, arguments, queries
from tests.protect.factories import FEATURES

K = 4


def of_shape(kind: str, *shape: int) -> FrozenCoder:
    specs = (TensorSpec("x", "FP32", shape),)
    return FrozenCoder(Shape(kind, 3, 5, specs), "logits").eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("evidence", EVIDENCE.values())
def test_what_is_served_is_what_was_measured(finished: Path, evidence: str) -> None:
    model = open_model(f"{PLACE}:vectors")
    name = next(key for key, value in EVIDENCE.items() if value == evidence)
    scheme = load_protection(finished, model, name)
    coder = load_part(finished / PARTS[CODE])
    assert isinstance(coder, FrozenCoder)
    x = np.random.default_rng(1).random((K, FEATURES), np.float32)
    served = ScoresOf(model)
    levels = coder.level(served(torch.from_numpy(x)))
    inputs = Inputs({"x": x}, {})
    wanted = decoded_logits(coder, served, inputs, np.arange(K), levels, K, evidence)  # type: ignore[arg-type]
    outputs = {
        number: scheme.compute(number, torch.from_numpy(x[list(task.members)])[None]).output
        for number, task in scheme.rules.tasks(K).items()
    }
    for missing in range(K):
        rest = {number: output for number, output in outputs.items() if number != missing}
        found = scheme.decode(rest, K)
        np.testing.assert_allclose(found[missing][0], wanted[missing], atol=1e-4)
        assert all(torch.equal(found[i], outputs[i]) for i in range(K) if i != missing)


@pytest.mark.parametrize("evidence", ["both", "scores"])
def test_several_missing_members_are_guessed_from_side_features(evidence: str) -> None:
    torch.manual_seed(0)
    coder = of_shape("vectors", 6)
    code = FrozenCode(coder, K, evidence)  # type: ignore[arg-type]
    scheme = Scheme("code", code, {SERVED: nn.Linear(6, 5)}, (6,))
    for size in range(1, K + 1):
        x = torch.randn(2, size, 6)
        outputs = {
            number: scheme.compute(number, x[:, list(task.members)]).output
            for number, task in scheme.rules.tasks(size).items()
        }
        with torch.no_grad():
            guesses = coder.head.from_side(coder.encode(x).side.flatten(0, 1)).unflatten(0, (2, -1))
        for lost in itertools.combinations(outputs, 2):
            rest = {number: output for number, output in outputs.items() if number not in lost}
            found = scheme.decode(rest, size)
            gone = set(lost) & set(range(size))
            guessed = gone if evidence == "both" and K in rest and len(gone) > 1 else set()
            determined = scheme.rules.recoverable(frozenset(rest), size)
            assert set(found) == determined | guessed
            for member in guessed:
                torch.testing.assert_close(found[member], guesses[:, member])


@pytest.mark.parametrize("shape", [(6,), (3, 12, 10), (12, 10, 1)])
def test_an_untrained_encoder_is_the_average_which_a_linear_model_decodes(
    shape: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    coder = of_shape("images" if len(shape) == 3 else "vectors", *shape)
    x = torch.rand(40, 3, *shape)
    served = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 5))
    with torch.no_grad():
        levels = coder.level(served(x.flatten(0, 1)))
        coder.learn_scale({"x": x.flatten(0, 1).numpy()}, levels)
        encoding = coder.encode(x)
        torch.testing.assert_close(encoding.parity, x.mean(1), atol=1e-5, rtol=0)
        parity = coder.level(served(encoding.parity))
    torch.testing.assert_close(3 * parity, levels.unflatten(0, (-1, 3)).sum(1), atol=1e-4, rtol=0)


class Curved(nn.Module):
    """A classifier that is far from linear."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0] ** 2 + x[:, 1] ** 2, 2.0 - x[:, 0] ** 2, 3 * x[:, 1] ** 3], 1)


def test_training_reduces_what_the_average_gets_wrong() -> None:
    x = np.random.default_rng(0).normal(size=(2000, 2)).astype(np.float32)
    served = Curved()
    teacher = served(torch.from_numpy(x)).log_softmax(1).numpy()
    specs = (TensorSpec("x", "FP32", (2,)),)
    torch.manual_seed(0)
    coder = FrozenCoder(Shape("vectors", 32, 3, specs), "logits")
    levels = coder.level(torch.from_numpy(teacher))
    coder.learn_scale({"x": x}, levels)
    rows = np.arange(2000)
    lesson = Lesson(Inputs({"x": x}, {}), rows[:1600], rows[1600:], teacher)
    part = PartSettings(epochs=1, steps_per_epoch=400, batch_size=256)
    stage = CodingStage(coder, served, lesson, K, part, 60.0)

    def agreement(evidence: str) -> float:
        found = decoded_logits(coder, served, lesson.inputs, rows[1600:], levels, K, evidence)  # type: ignore[arg-type]
        return float((found.argmax(1) == teacher[1600:].argmax(1)).mean())

    before = agreement("both")
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    for index in range(400):
        stage.step(0, index)
    assert agreement("both") > before + 0.2
    assert agreement("both") > 0.9
    assert agreement("scores") < agreement("both")


def test_gradients_flow_through_an_onnx_file(tmp_path: Path) -> None:
    model = open_model(save_onnx(factories.vectors, tmp_path / "model.onnx"))
    x = torch.rand(5, factories.FEATURES, requires_grad=True)
    batch = {model.signature.inputs[0].name: x.detach().numpy()}
    scores = frozen_scores(model, batch)(x)
    np.testing.assert_allclose(scores.detach(), scores_of(model, batch), rtol=1e-4, atol=1e-5)
    scores.sum().backward()
    (wanted,) = torch.autograd.grad(factories.vectors()[0](x).sum(), x)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_without_gradients_gets_no_code(call: Command, tmp_path: Path) -> None:
    model = save_onnx(factories.odd, tmp_path / "model.onnx")
    words = arguments("odd", queries(tmp_path), tmp_path / "out", "--methods", "code,approxifer")
    words[1] = str(model)
    outcome = call(*words, "--scores", "logits")
    assert outcome.code == 0, outcome.err
    assert "its operator Selu is not known here" in outcome.out
    outcome = call(*words[:-1], "code", "--out", str(tmp_path / "other"))
    assert outcome.code == 2
    assert "none of these can protect this model: code" in outcome.err


@pytest.mark.parametrize("name", ["half", "double"])
def test_a_model_of_another_precision_gets_a_code(name: str, call: Command, tmp_path: Path) -> None:
    words = arguments(name, queries(tmp_path), tmp_path / "out", "--methods", "code")
    outcome = call(*words)
    assert outcome.code == 0, outcome.err
    model = open_model(f"{PLACE}:{name}")
    x = np.random.default_rng(1).random((K, FEATURES), np.float32)
    scheme = load_protection(tmp_path / "out", model, CODE)
    outputs = {
        number: scheme.compute(number, torch.from_numpy(x[list(task.members)])[None]).output
        for number, task in scheme.rules.tasks(K).items()
        if number != 1
    }
    assert scheme.decode(outputs, K)[1].isfinite().all()


@pytest.mark.parametrize("name", ["vectors", "half", "double"])
def test_a_code_without_training_is_measured_as_it_is_served(name: str) -> None:
    """Workers encode and decode in float32, whatever the model takes and returns."""
    model = open_model(f"{PLACE}:{name}")
    dtype = DATATYPES[model.signature.inputs[0].datatype]
    x = np.random.default_rng(1).random((3 * K, FEATURES), np.float32).astype(dtype)
    scheme = codes.build("approxifer", model, K)
    rows, scores, groups = codes.decoded(scheme, Inputs({"x": x}, {}), np.arange(3 * K), seed=0)
    for group in range(3):
        own = groups == group
        assert_is_decoded(scores[own], model, "approxifer", x[rows[own]].astype(np.float32))


def test_groups_that_fill_no_batch_get_no_code(call: Command, tmp_path: Path) -> None:
    words = arguments("vectors", queries(tmp_path), tmp_path / "out", "--k", "33")
    outcome = call(*words, "--methods", "code,approxifer")
    assert outcome.code == 0, outcome.err
    assert "code is left out: " in outcome.out
