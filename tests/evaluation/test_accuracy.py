"""`evaluate`, on stub codes whose accuracy is known by construction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes import erase
from codedinvnet.codes.base import Code, Scheme
from codedinvnet.codes.rules import SERVED, CodeRules, Parities
from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageSet, random_groups
from codedinvnet.evaluation.accuracy import Evaluation, evaluate

CLASSES = 5


def image_set(count: int) -> ImageSet:
    """Make images of two pixels: the image's index and its label."""
    index = torch.arange(count)
    labels = (index * index + index // 3) % CLASSES
    pixels = torch.stack([index, labels], dim=1).to(torch.uint8).view(count, 1, 1, 2)
    return ImageSet("stub", tuple("abcde"), pixels, labels, "made here")


def one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels.long() % CLASSES, CLASSES).float()


class Pixels(nn.Module):
    """Its output is the pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)


class Exact(Code):
    """Outputs are the pixels, the parity is their sum, and answers are right.

    Args:
        k: the members of a group.
        r: its parities.
        direct: adds to the label of direct answers, by the images' indices.
        decoded: adds to that of decoded ones, by the member.
    """

    def __init__(
        self,
        k: int,
        r: int = 1,
        direct: Callable[[Tensor], Tensor] = torch.zeros_like,
        decoded: Callable[[int], int] = lambda member: 0,
    ) -> None:
        self.rules: CodeRules = Parities(k, r)
        self.off_direct, self.off_decoded = direct, decoded

    def encode(self, task: int, queries: Tensor) -> Tensor:
        assert queries.dtype == torch.uint8
        assert queries.shape[2:] == (1, 1, 2)
        return queries.float().sum(1)

    def direct(self, output: Tensor) -> Tensor | None:
        return one_hot(output[:, 1] + self.off_direct(output[:, 0]))

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        (missing,) = set(range(size)) - set(outputs)
        assert set(outputs) == {*range(size), self.rules.k} - {missing}
        others = sum(outputs[i] for i in range(size) if i != missing)
        return {
            missing: one_hot((outputs[self.rules.k] - others)[:, 1] + self.off_decoded(missing))
        }


def wrong_at(position: int) -> Exact:
    return Exact(4, decoded=lambda member: int(member == position))


class ParityTells(Exact):
    """The last parity holds the members' labels side by side, and is believed."""

    def encode(self, task: int, queries: Tensor) -> Tensor:
        last = task == self.rules.k + self.rules.r - 1
        return queries[:, :, 0, 0, 1].float() if last else torch.zeros(len(queries), 1)

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        (missing,) = set(range(size)) - set(outputs)
        return {missing: one_hot(outputs[max(outputs)][:, missing])}


class Undecodable(Exact):
    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        return {} if 1 not in outputs else super().decode(outputs, size)


def run(method: Code, count: int = 24, groupings: int = 2, **how: Any) -> Evaluation:
    how = {"k": method.rules.k, **how}
    scheme = Scheme("exact", method, {SERVED: Pixels()}, (1, 1, 2))
    return evaluate(scheme, image_set(count), groupings=groupings, progress=False, **how)


@pytest.fixture(params=[250, 7, 1], ids=lambda size: f"batch-{size}")
def any_batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erase, "BATCH", request.param)
    monkeypatch.setattr(erase, "GROUPS", max(1, request.param // 4))


@pytest.mark.usefixtures("any_batch")
@pytest.mark.parametrize("count", [24, 25, 27])
def test_a_perfect_method_is_perfect(count: int) -> None:
    ones = {"normal_accuracy": 1.0, "recovered_accuracy": 1.0, "agreement": 1.0}
    expected = Evaluation(count, 4, 3, **ones, position_accuracies=(1.0,) * 4)
    assert run(Exact(4), count, groupings=3) == expected


@pytest.mark.usefixtures("any_batch")
@pytest.mark.parametrize("count", [24, 25, 27])
def test_direct_answers_set_only_normal_accuracy_and_agreement(count: int) -> None:
    found = run(Exact(4, direct=lambda index: (index % 2 == 0).float()), count)
    assert found.normal_accuracy == found.agreement == pytest.approx((count // 2) / count)
    assert found.recovered_accuracy == found.worst_position_accuracy == 1.0


@pytest.mark.usefixtures("any_batch")
@pytest.mark.parametrize("position", range(4))
def test_a_position_that_decodes_wrongly_is_seen(position: int) -> None:
    found = run(wrong_at(position))
    assert found.position_accuracies == tuple(float(i != position) for i in range(4))
    assert found.worst_position_accuracy == 0.0
    assert found.recovered_accuracy == found.agreement == pytest.approx(0.75)
    assert found.normal_accuracy == 1.0


@pytest.mark.usefixtures("any_batch")
@pytest.mark.parametrize("method", [ParityTells(4), ParityTells(4, 2)], ids=["one", "two"])
@pytest.mark.parametrize("count", [24, 26])
def test_shuffling_gives_every_group_the_parity_of_another(method: Code, count: int) -> None:
    assert run(method, count).recovered_accuracy == 1.0
    found = run(method, count, groupings=3, shuffle_parity=True)
    labels = image_set(count).labels
    generator, hits = torch.Generator().manual_seed(0), 0
    for groups in (random_groups(count, 4, generator) for _ in range(3)):
        taken = labels[groups.members.roll(1, 0)] == labels[groups.members]
        hits += int((taken & groups.counted).sum())
    assert found.recovered_accuracy == pytest.approx(hits / (3 * count))
    assert found.recovered_accuracy < 0.5
    assert found.normal_accuracy == 1.0


@pytest.mark.parametrize(
    ("method", "count", "how", "why"),
    [
        (Exact(4), 24, {"groupings": 0}, "groupings must be at least 1, got 0"),
        (Exact(4), 3, {}, "groups of k=4 cannot be made of 3 images"),
        (Exact(4), 8, {"k": 1}, "k is 2 to"),
        (Exact(4), 7, {"shuffle_parity": True}, "two groups: 8 images, got 7"),
        (Exact(3), 8, {"k": 4}, "groups of up to 3, got k = 4"),
        (Undecodable(4), 8, {}, "exact cannot decode member 1 of a group of 4"),
    ],
)
def test_what_cannot_be_evaluated_is_the_users_error(
    method: Code, count: int, how: dict[str, int], why: str
) -> None:
    with pytest.raises(UserError, match=why):
        run(method, count, **how)
