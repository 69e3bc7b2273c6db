from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes.base import Code, Encoded, Scheme
from codedinvnet.codes.rules import SERVED, AnyOf, CodeRules, Parities
from codedinvnet.data import Groups, ImageSet, random_groups
from codedinvnet.errors import UserError
from codedinvnet.evaluation import accuracy
from codedinvnet.evaluation.accuracy import Evaluation, evaluate, figures

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
    """Outputs are the pixels, the parity is their sum, and every answer is right."""

    def __init__(self, k: int, r: int = 1) -> None:
        self.rules: CodeRules = Parities(k, r)

    def encode(self, task: int, queries: Tensor) -> Encoded:
        assert queries.dtype == torch.uint8
        assert queries.shape[2:] == (1, 1, 2)
        return Encoded(queries.float().sum(1))

    def direct(self, output: Tensor) -> Tensor | None:
        return one_hot(output[:, 1])

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        (missing,) = set(range(size)) - set(outputs)
        assert set(outputs) == {*range(size), self.rules.k} - {missing}
        others = sum(outputs[i] for i in range(size) if i != missing)
        return {missing: self.answer(missing, outputs[self.rules.k] - others)}

    def answer(self, member: int, pixels: Tensor) -> Tensor:
        return one_hot(pixels[:, 1])


class DirectWrongOnEven(Exact):
    def direct(self, output: Tensor) -> Tensor | None:
        return one_hot(output[:, 1] + (output[:, 0] % 2 == 0))


class PositionWrong(Exact):
    def __init__(self, k: int, position: int) -> None:
        super().__init__(k)
        self.position = position

    def answer(self, member: int, pixels: Tensor) -> Tensor:
        return one_hot(pixels[:, 1] + (member == self.position))


class RightOnOneImage(Exact):
    def __init__(self, k: int, index: int) -> None:
        super().__init__(k)
        self.index = index

    def answer(self, member: int, pixels: Tensor) -> Tensor:
        return one_hot(pixels[:, 1] + (pixels[:, 0] != self.index))


class ParityTells(Exact):
    """The last parity holds the members' labels side by side, and is believed."""

    def encode(self, task: int, queries: Tensor) -> Encoded:
        last = task == self.rules.k + self.rules.r - 1
        return Encoded(queries[:, :, 0, 0, 1].float() if last else torch.zeros(len(queries), 1))

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        (missing,) = set(range(size)) - set(outputs)
        return {missing: one_hot(outputs[max(outputs)][:, missing])}


class ParityIgnored(Exact):
    """Answers what a neighbour in the group is."""

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        (missing,) = set(range(size)) - set(outputs)
        return {missing: one_hot(outputs[(missing + 1) % size][:, 1])}


class NotSystematic(Exact):
    def __init__(self, k: int) -> None:
        self.rules = AnyOf(k, k + 1, k)


class Undecodable(Exact):
    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        return {} if 1 not in outputs else super().decode(outputs, size)


def scheme_of(code: Code, model: nn.Module | None = None) -> Scheme:
    return Scheme("exact", code, {SERVED: model or Pixels()}, (1, 1, 2))


def run(
    method: Code,
    count: int = 24,
    *,
    groupings: int = 2,
    seed: int = 0,
    shuffle_parity: bool = False,
    model: nn.Module | None = None,
) -> Evaluation:
    return evaluate(
        scheme_of(method, model),
        image_set(count),
        k=method.rules.k,
        groupings=groupings,
        seed=seed,
        shuffle_parity=shuffle_parity,
        progress=False,
    )


def drawn(count: int, k: int, groupings: int, seed: int = 0) -> list[Groups]:
    generator = torch.Generator().manual_seed(seed)
    return [random_groups(count, k, generator) for _ in range(groupings)]


@pytest.fixture(params=[250, 7, 1], ids=lambda size: f"batch-{size}")
def any_batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "BATCH", request.param)


@pytest.mark.usefixtures("any_batch")
@pytest.mark.parametrize("count", [24, 25, 27])
def test_a_perfect_method_is_perfect(count: int) -> None:
    assert run(Exact(4), count, groupings=3) == Evaluation(
        images=count,
        k=4,
        groupings=3,
        normal_accuracy=1.0,
        recovered_accuracy=1.0,
        position_accuracies=(1.0,) * 4,
        agreement=1.0,
    )


class Counting(Pixels):
    """Counts the images of data tasks, which are bytes."""

    computed = 0

    def forward(self, images: Tensor) -> Tensor:
        self.computed += len(images) * (images.dtype == torch.uint8)
        return super().forward(images)


@pytest.mark.usefixtures("any_batch")
@pytest.mark.parametrize("shuffle", [False, True])
def test_outputs_that_do_not_fit_are_computed_again(
    shuffle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, groupings = 26, 3
    kept, again = Counting(), Counting()
    size = count * 2 * 4  # bytes: two floats an image
    monkeypatch.setattr(accuracy, "KEPT_BYTES", size)
    found = run(ParityIgnored(4), count, model=kept, groupings=groupings, shuffle_parity=shuffle)
    monkeypatch.setattr(accuracy, "KEPT_BYTES", size - 1)
    assert (
        run(ParityIgnored(4), count, model=again, groupings=groupings, shuffle_parity=shuffle)
        == found
    )
    assert kept.computed == count
    assert again.computed == count + groupings * 28  # two images fill the last group up


@pytest.mark.usefixtures("any_batch")
@pytest.mark.parametrize("count", [24, 25, 27])
def test_direct_answers_set_normal_accuracy_and_agreement_alone(count: int) -> None:
    found = run(DirectWrongOnEven(4), count)
    odd = (count // 2) / count
    assert found.normal_accuracy == pytest.approx(odd)
    assert found.agreement == pytest.approx(odd)
    assert found.recovered_accuracy == 1.0
    assert found.worst_position_accuracy == 1.0


@pytest.mark.usefixtures("any_batch")
@pytest.mark.parametrize("position", range(4))
def test_a_position_that_decodes_wrongly_is_seen(position: int) -> None:
    found = run(PositionWrong(4, position))
    assert found.position_accuracies == tuple(float(i != position) for i in range(4))
    assert found.worst_position_accuracy == 0.0
    assert found.recovered_accuracy == pytest.approx(0.75)
    assert found.agreement == pytest.approx(0.75)
    assert found.normal_accuracy == 1.0


def test_answers_that_only_fill_a_group_up_do_not_count() -> None:
    # Of seven groups of 25 images the last has one member that counts, in position 0.
    assert run(PositionWrong(4, 0), 25).recovered_accuracy == pytest.approx(1 - 7 / 25)
    last = run(PositionWrong(4, 3), 25)
    assert last.recovered_accuracy == pytest.approx(1 - 6 / 25)
    assert last.agreement == pytest.approx(1 - 6 / 25)
    assert last.position_accuracies == (1.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize(("count", "k"), [(12, 4), (11, 4), (9, 2), (5, 5), (7, 5)])
def test_every_image_counts_once_per_grouping(count: int, k: int) -> None:
    for index in range(count):
        for groupings in (1, 3):
            found = run(RightOnOneImage(k, index), count, groupings=groupings)
            assert found.recovered_accuracy == pytest.approx(1 / count)
            assert found.agreement == pytest.approx(1 / count)
            where = [
                ((g.members == index) & g.counted).double().sum(0)
                for g in drawn(count, k, groupings)
            ]
            slots = sum(g.counted.sum(0) for g in drawn(count, k, groupings))
            expected = torch.stack(where).sum(0) / slots
            assert found.position_accuracies == pytest.approx(expected.tolist())


@pytest.mark.usefixtures("any_batch")
@pytest.mark.parametrize("method", [ParityTells(4), ParityTells(4, 2)], ids=["one", "two"])
@pytest.mark.parametrize("count", [24, 26])
def test_shuffling_gives_every_group_the_parity_of_another(method: Code, count: int) -> None:
    assert run(method, count).recovered_accuracy == 1.0
    found = run(method, count, groupings=3, shuffle_parity=True)
    labels = image_set(count).labels
    hits = 0
    for g in drawn(count, 4, 3):
        told, true = labels[g.members.roll(1, 0)], labels[g.members]
        hits += int(((told == true) & g.counted).sum())
    assert found.recovered_accuracy == pytest.approx(hits / (3 * count))
    assert found.recovered_accuracy < 0.5
    assert found.normal_accuracy == 1.0


def test_shuffling_changes_nothing_for_a_method_that_ignores_its_parity() -> None:
    method = ParityIgnored(4)
    found = run(method, 26, groupings=3)
    labels = image_set(26).labels
    hits = sum(
        int(((labels[g.members.roll(-1, 1)] == labels[g.members]) & g.counted).sum())
        for g in drawn(26, 4, 3)
    )
    assert found.recovered_accuracy == pytest.approx(hits / (3 * 26))
    assert 0 < found.recovered_accuracy < 0.5
    assert run(method, 26, groupings=3, shuffle_parity=True) == found


def test_seeds_repeat() -> None:
    first = run(ParityIgnored(4), 50, seed=3)
    assert run(ParityIgnored(4), 50, seed=3) == first
    assert run(ParityIgnored(4), 50, seed=4) != first
    torch.manual_seed(99)
    assert run(ParityIgnored(4), 50, seed=3) == first


def test_groupings_differ_and_are_averaged() -> None:
    counts = []
    for groupings in (1, 2, 3):
        found = run(ParityIgnored(4), 50, groupings=groupings)
        assert found.groupings == groupings
        counts.append(found.recovered_accuracy * groupings * 50)
    singles = [counts[0], counts[1] - counts[0], counts[2] - counts[1]]
    labels = image_set(50).labels
    assert singles == pytest.approx(
        [
            int(((labels[g.members.roll(-1, 1)] == labels[g.members]) & g.counted).sum())
            for g in drawn(50, 4, 3)
        ],
        abs=1e-3,
    )
    assert len({round(single) for single in singles}) > 1


def test_smaller_groups_than_k_are_evaluated() -> None:
    found = evaluate(scheme_of(ParityTells(10)), image_set(20), k=3, progress=False)
    assert (found.k, found.groupings, found.images) == (3, 5, 20)
    assert found.position_accuracies == (1.0, 1.0, 1.0)


def test_worst_position_is_the_lowest() -> None:
    found = replace(run(Exact(3)), position_accuracies=(0.7, 0.2, 0.9))
    assert found.worst_position_accuracy == 0.2


@pytest.mark.parametrize("groupings", [0, -1])
def test_groupings_below_one_are_the_users_error(groupings: int) -> None:
    with pytest.raises(UserError, match=f"groupings must be at least 1, got {groupings}"):
        run(Exact(4), groupings=groupings)


def test_too_few_images_are_the_users_error() -> None:
    assert run(Exact(4), 4).recovered_accuracy == 1.0
    with pytest.raises(UserError, match="groups of k=4 cannot be made of 3 images"):
        run(Exact(4), 3)
    with pytest.raises(UserError, match=r"k is 2 to"):
        evaluate(scheme_of(Exact(4)), image_set(8), k=1, progress=False)


def test_shuffling_needs_two_groups() -> None:
    run(Exact(4), 8, shuffle_parity=True)
    with pytest.raises(UserError, match="two groups: 8 images, got 7"):
        run(Exact(4), 7, shuffle_parity=True)


def test_k_above_the_methods_own_is_the_users_error() -> None:
    with pytest.raises(UserError, match="groups of up to 3, got k = 4"):
        evaluate(scheme_of(Exact(3)), image_set(8), k=4, progress=False)


def test_a_method_that_cannot_be_compared_or_decoded_is_the_users_error() -> None:
    with pytest.raises(UserError, match="exact has no direct answers"):
        run(NotSystematic(4))
    with pytest.raises(UserError, match="exact cannot decode member 1 of a group of 4"):
        run(Undecodable(4))


def test_report_of_evaluation_needs_every_field() -> None:
    result = Evaluation(10, 2, 5, 0.9, 0.8, (0.7, 0.9), 0.85)
    assert figures(result) == {
        "images": 10,
        "k": 2,
        "groupings": 5,
        "normal_accuracy": 0.9,
        "recovered_accuracy": 0.8,
        "worst_position_accuracy": 0.7,
        "agreement": 0.85,
    }
