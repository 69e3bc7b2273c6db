from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from torch import Tensor, nn

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.parm import (
    ConcatCode,
    ConcatParM,
    ConvEncoder,
    LearnedParM,
    LinearDecoder,
    ParM,
    check_tiles,
    grid_shape,
)
from codedinvnet.errors import UserError
from tests.codes.linear import (
    CLASSES,
    SHAPE,
    Linear,
    assert_answers,
    computed,
    images,
    made,
    members_of,
    outputs_of,
    without,
)

SIZES = (2, 3, 4, 10)


def exact(k: int) -> Scheme:
    """Return ParM whose parity model is right: k times a linear classifier."""
    return made(ParM, Linear(), k, part=Linear(factor=k))


@pytest.mark.parametrize("k", SIZES)
def test_tasks(k: int) -> None:
    method = exact(k)
    assert (method.rules.k, method.rules.r, method.rules.fixed_size) == (k, 1, True)
    assert members_of(method, k) == {**{i: (i,) for i in range(k)}, k: tuple(range(k))}
    with pytest.raises(ValueError, match=f"a group has {k} members, got {k - 1}"):
        members_of(method, k - 1)


@pytest.mark.parametrize("k", SIZES)
def test_a_linear_model_decodes_every_erasure_pattern_exactly(k: int) -> None:
    method = exact(k)
    group = images(k)
    outputs = outputs_of(method, group)
    tasks = range(k + 1)
    for lost in chain.from_iterable(combinations(tasks, n) for n in range(3)):
        rest = without(outputs, *lost)
        members = {i for i in range(k) if i not in lost}
        if len(lost) == 1:
            members = set(range(k))
        assert method.rules.recoverable(frozenset(rest), k) == members
        assert_answers(method.decode(rest, k), Linear(), group, members)
    residual = method.residual(outputs, k)
    assert residual is not None
    assert float(residual.max()) < 1e-9


def test_the_parity_model_sees_the_average_image_and_is_weighed_by_its_output() -> None:
    k = 4
    parity_model = Linear(factor=k)
    method = made(ParM, Linear(), k, part=parity_model)
    group = torch.randint(0, 256, (2, k, *SHAPE), dtype=torch.uint8)
    computed(method, k, group)
    torch.testing.assert_close(parity_model.seen[-1], (group / 255).mean(1))
    outputs = outputs_of(method, images(k))
    wrong = {**outputs, k: outputs[k] + 1.0}
    answers = method.decode(without(wrong, 1), k)
    torch.testing.assert_close(answers[1], outputs[1] + 1.0)
    residual = method.residual(wrong, k)
    assert residual is not None
    torch.testing.assert_close(residual, torch.ones_like(residual))
    assert method.parameters == 2 * (32 * CLASSES + CLASSES)


@pytest.mark.parametrize(("k", "shape"), [(2, (1, 2)), (4, (2, 2)), (10, (2, 5)), (7, (1, 7))])
def test_grids(k: int, shape: tuple[int, int]) -> None:
    assert grid_shape(k) == shape


def test_concat_puts_averaged_images_in_a_grid() -> None:
    group = images(4)
    parity = ConcatCode.mix(group)
    assert parity.shape == (5, *SHAPE)
    for cell, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        blocks = group[:, cell].unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean(dim=(3, 5))
        found = parity[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        torch.testing.assert_close(found, blocks)


class TakesCells(nn.Module):
    """The right parity model of a classifier that looks at 2×2 averages only."""

    def __init__(self, classifier: nn.Module, k: int) -> None:
        super().__init__()
        self.classifier, self.k = classifier, k

    def forward(self, grid: Tensor) -> Tensor:
        rows, columns = grid_shape(self.k)
        height, width = grid.shape[2] // rows, grid.shape[3] // columns
        cells = [
            grid[:, :, r * height : (r + 1) * height, c * width : (c + 1) * width]
            for r in range(rows)
            for c in range(columns)
        ]
        wide = [c.repeat_interleave(rows, 2).repeat_interleave(columns, 3) for c in cells]
        logits: Tensor = torch.stack([self.classifier(w) for w in wide]).sum(0)
        return logits


@pytest.mark.parametrize("k", [2, 4])
def test_concat_decodes_every_position_of_images_that_survive_the_averaging(k: int) -> None:
    rows, columns = grid_shape(k)
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(5, k, 2, 4 // rows, 4 // columns, dtype=torch.float64, generator=generator)
    group = coarse.repeat_interleave(rows, 3).repeat_interleave(columns, 4)
    classifier = Linear()
    method = made(ConcatParM, classifier, k, part=TakesCells(classifier, k))
    outputs = outputs_of(method, group)
    for lost in range(k):
        answers = method.decode(without(outputs, lost), k)
        assert_answers(answers, classifier, group, set(range(k)))


def test_images_that_do_not_tile_are_the_users_error() -> None:
    check_tiles(4, (1, 28, 28))
    with pytest.raises(UserError, match=r"cannot tile k = 10 images: a grid of 2x5.*28x28"):
        check_tiles(10, (1, 28, 28))
    with pytest.raises(UserError, match=r"cannot tile k = 3 images: a grid of 1x3"):
        ConcatCode.mix(images(3))


@pytest.mark.parametrize("k", [2, 4])
def test_the_learned_code_begins_as_addition_and_subtraction(k: int) -> None:
    """With a linear classifier that is exact, at every position."""
    torch.manual_seed(0)
    classifier = Linear()
    part = {"encoder": ConvEncoder(k), "decoder": LinearDecoder(k, CLASSES)}
    method = made(LearnedParM, classifier, k, part=nn.ModuleDict(part).double())
    assert (method.name, method.rules.fixed_size) == ("parm-learned", True)
    group = images(k)
    outputs = outputs_of(method, group)
    for lost in chain.from_iterable(combinations(range(k + 1), n) for n in range(3)):
        members = set(range(k)) if len(lost) == 1 else {i for i in range(k) if i not in lost}
        answers = method.decode(without(outputs, *lost), k)
        assert_answers(answers, classifier, group, members)


def test_the_learned_decoder_sees_zeros_for_the_missing_and_all_else() -> None:
    k = 2
    torch.manual_seed(0)
    decoder = LinearDecoder(k, CLASSES).double()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    part = nn.ModuleDict({"encoder": ConvEncoder(k).double(), "decoder": decoder})
    method = made(LearnedParM, Linear(), k, part=part)
    outputs = outputs_of(method, images(k))
    for lost, kept in ((0, 1), (1, 0)):
        stacked = torch.stack([outputs[0], outputs[1], outputs[2]], dim=1)
        stacked[:, lost] = 0
        with torch.no_grad():
            expected = decoder(stacked)[:, lost]
        answers = method.decode(without(outputs, lost), k)
        torch.testing.assert_close(answers[lost], expected)
        torch.testing.assert_close(answers[kept], outputs[kept])


def test_the_learned_encoder_treats_colours_alike_and_sees_all_members() -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder(3).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    group = images(3).detach().requires_grad_(True)
    parity = encoder(group)
    assert parity.shape == (5, *SHAPE)
    swapped = encoder(group.flip(2))
    torch.testing.assert_close(swapped, parity.flip(1))
    (gradient,) = torch.autograd.grad(parity[0, 0].sum(), group)
    assert bool((gradient[0, :, 0].abs().sum(dim=(1, 2)) > 0).all())
    assert float(gradient[0, :, 1].abs().max()) == 0.0
