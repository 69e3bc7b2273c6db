"""Several parities of different mixtures."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from codedinvnet.codes.coefficients import coefficients, solving, worst_minor
from codedinvnet.codes.method import Given, given_by
from codedinvnet.codes.registry import find_method
from codedinvnet.codes.weighted import WeightedCode
from codedinvnet.config import PartSettings
from codedinvnet.data import sample_images
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import load_bundle
from codedinvnet.models.coded import empty_latent
from codedinvnet.nn.head import DoubtingHead, RecoveryHead
from codedinvnet.training.parities import ParitiesStage
from tests.codes.linear import tiny_model, without

K = 4
METHOD = find_method("coded-invnet-r2")


def code(r: int) -> WeightedCode:
    return WeightedCode(tiny_model(head_hidden=0), K, r)


def exact(made: WeightedCode, latents: Tensor) -> dict[int, Tensor]:
    """Return the outputs of a group of latents (B, size, n) whose parities are exact mixtures."""
    size = latents.shape[1]
    empty = empty_latent(made.model).flatten()
    outputs = {i: latents[:, i] for i in range(size)}
    for j, row in enumerate(made.weights(size)):
        mixed = torch.einsum("m,bmn->bn", torch.from_numpy(row), latents)
        side = torch.zeros(len(latents), 4 * size, dtype=torch.float64)
        outputs[K + j] = torch.cat([mixed + (1 - row.sum()) * empty, side], 1)
    return outputs


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_every_minor_of_the_coefficients_can_be_solved(rows: int) -> None:
    for size in range(1, 11):
        found = coefficients(size, rows)
        np.testing.assert_allclose(np.abs(found).sum(1), 1)
        assert worst_minor(size * found[None])[0] > 0.02
    np.testing.assert_allclose(coefficients(7, 1), np.full((1, 7), 1 / 7))
    np.testing.assert_allclose(solving(coefficients(7, 1), [0], [3]), [[7.0]])


@pytest.mark.parametrize("r", [1, 2, 3])
def test_every_erasure_pattern_is_decoded_as_the_rules_say(r: int) -> None:
    made = code(r)
    for size in range(1, K + 1):
        generator = torch.Generator().manual_seed(size)
        latents = torch.randn(2, size, made.latent_size, dtype=torch.float64, generator=generator)
        outputs = exact(made, latents)
        assert set(outputs) == set(made.rules.tasks(size))
        direct = [made.direct(latents[:, i]) for i in range(size)]
        for count in range(len(outputs) + 1):
            for lost in combinations(outputs, count):
                rest = without(outputs, *lost)
                determined = made.rules.recoverable(frozenset(rest), size)
                with torch.inference_mode():
                    answers = made.decode(rest, size)
                assert set(answers) == determined
                for member in determined:
                    torch.testing.assert_close(answers[member], direct[member])


@pytest.mark.parametrize("r", [1, 2, 3])
def test_one_wrong_task_shows_in_the_residual(r: int) -> None:
    made = code(r)
    latents = torch.randn(5, K, made.latent_size, dtype=torch.float64)
    outputs = exact(made, latents)
    assert float(made.residual(outputs, K).max()) < 1e-9  # type: ignore[union-attr]
    for task in outputs:
        wrong = {**outputs, task: outputs[task] + torch.randn_like(outputs[task])}
        assert float(made.residual(wrong, K).min()) > 1e-3  # type: ignore[union-attr]
        assert made.residual(without(wrong, task), K) is None


def test_growing_errors_leave_the_answer_to_the_side_features() -> None:
    torch.manual_seed(0)
    plain = RecoveryHead((4, 2, 2), 3, hidden=8, side_features=5)
    head = DoubtingHead(plain)
    z, side, direct = torch.randn(6, 4, 2, 2), torch.randn(6, 5), torch.randn(6, 3)
    torch.testing.assert_close(head(z, side, direct, 1e6), head.from_side(side))
    torch.testing.assert_close(head.from_side(side), plain.from_side(side))
    both = head(z, side, direct, torch.tensor([1.0, 2.0, 5.0, 1e6, 1e6, 9.0]))
    torch.testing.assert_close(both[2], head(z, side, direct, 5.0)[2])
    torch.testing.assert_close(both[3], head.from_side(side)[3])


@pytest.fixture(scope="module")
def given() -> Given:
    return given_by(load_bundle("mnist"), K)


def test_training_lowers_the_loss_and_leaves_f_and_g_alone(given: Given) -> None:
    torch.manual_seed(0)
    before = {name: p.clone() for name, p in given.coded.named_parameters()}
    part = METHOD.untrained(given, {})
    images = sample_images("mnist")
    rows = torch.arange(200)
    settings = PartSettings(epochs=2, steps_per_epoch=10, batch_size=10, learning_rate=5e-4)
    made = METHOD._model(given, part)  # type: ignore[attr-defined]
    stage = ParitiesStage(part, made, images, rows, rows, K, 2, settings)
    error = stage.validate()[1]["validation_error"]
    for epoch in range(2):
        stage.start_epoch(epoch, torch.Generator().manual_seed(epoch))
        for index in range(10):
            assert np.isfinite(stage.step(epoch, index)["loss"])
    assert stage.validate()[1]["validation_error"] < error
    for name, parameter in given.coded.named_parameters():
        torch.testing.assert_close(parameter, before[name])


def test_a_mosaic_has_no_mixtures() -> None:
    bundle = load_bundle("cifar10")
    assert bundle.info.model.encoder.kind == "mosaic"
    with pytest.raises(UserError, match="coded-invnet-r2 needs an encoder that averages"):
        METHOD.check(K, (3, 32, 32), bundle.info)
