from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.berrut import ApproxIFER, RobustApproxIFER
from codedinvnet.codes.build import scheme_for
from codedinvnet.codes.method import ONE, Tolerance
from codedinvnet.codes.nercc import NeRCC
from codedinvnet.codes.parm import ParM
from codedinvnet.codes.plain import Plain, Replication
from codedinvnet.codes.rules import BACKUP, AnswersAll, CodeRules
from codedinvnet.data import Groups, ImageSet, random_groups
from codedinvnet.evaluation import erasures
from codedinvnet.evaluation.accuracy import evaluate
from codedinvnet.evaluation.erasures import (
    CORRUPTION,
    Score,
    corrupt_some,
    score,
)
from codedinvnet.evaluation.outputs import group_outputs, task_outputs
from codedinvnet.models.bundle import Bundle, BundleInfo
from codedinvnet.training.recovered import embed_all, recovered_accuracy
from tests.codes.linear import made, outputs_of
from tests.data.files import Unread

CLASSES = ("a", "b", "c", "d")
N = 41
"""No multiple of any k: the last group is filled up."""


class Brightness(nn.Module):
    """Logits of 4 classes by the images' brightness, linear; shifted, it is wrong for some."""

    classes = len(CLASSES)

    def __init__(self, shift: float = 0.0, factor: float = 1.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        x = images if images.is_floating_point() else images.float() / 255
        level = 3 * x.mean(dim=(1, 2, 3)) + self.shift
        slopes = torch.arange(4, dtype=torch.float32)
        # argmax of 2·l·c − c² is the class nearest to the level, and linear in it.
        logits: Tensor = self.factor * (2 * level[:, None] * slopes - slopes**2)
        return logits


@pytest.fixture(scope="module")
def source() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (N,), generator=generator)
    images = (labels * 85).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    return ImageSet("levels", CLASSES, images, labels, "test")


def scored(method: Scheme, source: ImageSet, k: int, missing: int = 1, **more: int) -> Score:
    settings: dict[str, Any] = {"groupings": 2, "seed": 0, "patterns": 1000, "majority": 1, **more}
    return score(method, source, k=k, missing=missing, **settings)


@pytest.mark.parametrize("k", [2, 4, 10])
def test_exact_codes_lose_nothing(
    source: ImageSet, k: int, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = Brightness()
    for method in (
        made(ParM, classifier, k, part=Brightness(factor=k)),
        made(Replication, classifier, k),
        made(SmallBackup, classifier, k, part=Brightness()),
    ):
        found = scored(method, source, k)
        assert (found.complete, found.recovered, found.answered) == (1.0, 1.0, 1.0), method.name
        assert set(found.counts) == {(N, N)}
    assert capsys.readouterr().err == ""  # a log has a line a minute


@pytest.mark.parametrize("k", [2, 4])
def test_a_missing_answer_counts_as_the_majority_class(source: ImageSet, k: int) -> None:
    found = scored(made(Plain, Brightness(), k), source, k)
    share = float((source.labels == 1).float().mean())
    assert found.recovered == pytest.approx(share)
    assert found.answered == 0.0
    assert found.complete == 1.0


def test_an_answer_that_is_not_finite_is_none(source: ImageSet) -> None:
    class Broken(Brightness):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return logits.where(logits.argmax(1, keepdim=True) != 2, torch.nan)

    found = scored(made(SmallBackup, Brightness(), 4, part=Broken()), source, 4)
    share = float((source.labels == 2).float().mean())
    assert found.answered == pytest.approx(1 - share)
    assert found.recovered == pytest.approx(1 - share)  # the majority's class is another


class Shared(SmallBackup):
    """Two backups of half of the group each: of pairs each has one member."""

    def rules(
        self, k: int, tolerance: Tolerance = ONE, bundle: BundleInfo | None = None
    ) -> CodeRules:
        return AnswersAll(k, BACKUP, r=2)


@pytest.mark.parametrize(("kind", "k"), [(SmallBackup, 4), (Shared, 4), (Shared, 2)])
def test_the_backups_own_accuracy_is_what_is_recovered(
    kind: type[SmallBackup], k: int, source: ImageSet
) -> None:
    backup = Brightness(shift=0.6)
    right = (backup(source.images).argmax(1) == source.labels).float().mean()
    found = scored(made(kind, Brightness(), k, part=backup), source, k)
    assert 0 < float(right) < 1
    assert found.recovered == pytest.approx(float(right))


def test_a_worse_base_model_shows_in_complete(source: ImageSet) -> None:
    wrong = Brightness(shift=0.6)
    right = float((wrong(source.images).argmax(1) == source.labels).float().mean())
    assert scored(made(Plain, wrong, 4), source, 4).complete == pytest.approx(right)


def test_it_agrees_with_evaluate_and_with_what_trainings_watch(
    bundle: Bundle, held_out: ImageSet
) -> None:
    """Three ways to the same figure: of a benchmark, of `evaluate`, and of a stage's validation."""
    k = 4
    found = scored(scheme_for(bundle, k), held_out, k)
    evaluated = evaluate(scheme_for(bundle, k), held_out, k=k, groupings=2, seed=0, progress=False)
    assert found.complete == pytest.approx(evaluated.normal_accuracy)
    assert found.recovered == pytest.approx(evaluated.recovered_accuracy)
    latents = embed_all(bundle.model, held_out.images)
    watched = recovered_accuracy(bundle.model, held_out.images, held_out.labels, latents, k)
    once = scored(scheme_for(bundle, k), held_out, k, seed=k, groupings=1)
    assert watched == pytest.approx(once.recovered)


@pytest.mark.parametrize("missing", [2, 3])
def test_several_missing(source: ImageSet, missing: int) -> None:
    k = 4
    backup = scored(made(SmallBackup, Brightness(), k, part=Brightness()), source, k, missing)
    # Patterns in which the backup is lost, too, leave their members unanswered.
    lost_backup = sum(missing - 1 for lost in combinations(range(5), missing) if 4 in lost)
    erased = sum(sum(i < 4 for i in lost) for lost in combinations(range(5), missing))
    assert backup.answered == pytest.approx(1 - lost_backup / erased)
    assert len(backup.patterns) == len(list(combinations(range(5), missing)))
    parm = scored(made(ParM, Brightness(), k, part=Brightness(factor=k)), source, k, missing)
    assert parm.answered == 0.0  # one parity makes up for one loss
    copies = scored(made(Replication, Brightness(), k), source, k, missing)
    pairs = list(combinations(range(2 * k), missing))
    both = sum({i, k + i} <= set(lost) for lost in pairs for i in range(k))
    assert copies.answered == pytest.approx(1 - both / sum(i in p for p in pairs for i in range(k)))


@pytest.mark.parametrize("missing", [2, 3])
def test_a_sample_of_patterns_loses_the_backup_as_often_as_all(
    source: ImageSet, missing: int
) -> None:
    """Any 30 patterns of 55 or 165 lose it in 2 to 9, or 2 to 15, where 5.5 and 8.2 are due."""
    full = ImageSet("levels", CLASSES, source.images[:40], source.labels[:40], "test")
    method = made(SmallBackup, Brightness(), 10, part=Brightness())
    every = scored(method, full, 10, missing)
    assert every.answered is not None
    for seed in range(5):
        sample = scored(method, full, 10, missing, patterns=30, seed=seed)
        assert len(sample.patterns) == 30
        assert sample.answered == pytest.approx(every.answered, abs=0.01)


@pytest.mark.parametrize("kind", [ApproxIFER, NeRCC])
def test_codes_without_direct_answers_are_scored_on_everybody(
    source: ImageSet, kind: type[ApproxIFER | NeRCC]
) -> None:
    k = 4
    method = made(kind, Brightness(), k)
    found = scored(method, source, k)
    assert found.counts[0][1] == N * (k + 1)
    nobody = scored(method, source, k, missing=0)
    assert nobody.recovered == nobody.complete == found.complete
    assert nobody.counts[0][1] == N
    none = scored(made(Plain, Brightness(), k), source, k, missing=0)
    assert none.recovered is None
    assert none.answered is None
    more = scored(made(kind, Brightness(), k, stragglers=1), source, k, missing=2)
    assert more.answered == 0.0


@pytest.mark.parametrize("kind", [ApproxIFER, NeRCC])
def test_each_pattern_is_scored_by_what_is_decoded_without_it(
    source: ImageSet, kind: type[ApproxIFER | NeRCC]
) -> None:
    k, count = 4, 40
    full = ImageSet("levels", CLASSES, source.images[:count], source.labels[:count], "test")
    method = made(kind, Brightness(shift=0.3), k)
    groups = random_groups(count, k, torch.Generator().manual_seed(0)).members
    images, labels = full.images[groups], full.labels[groups]
    tasks = method.rules.tasks(k)
    outputs = outputs_of(method, images)
    expected = {}
    for lost in tasks:
        decoded = method.decode({t: o for t, o in outputs.items() if t != lost}, k)
        right = [(decoded[i].argmax(1) == labels[:, i]).double().mean() for i in range(k)]
        expected[(lost,)] = float(sum(right) / k)
    found = scored(method, full, k, groupings=1)
    assert found.patterns == pytest.approx(expected)
    assert found.recovered == pytest.approx(sum(expected.values()) / len(expected))
    assert len(set(expected.values())) > 1


def test_corrupt_workers_are_told_apart_by_the_byzantine_variant_alone(source: ImageSet) -> None:
    k = 4
    robust, plain = made(RobustApproxIFER, Brightness(), k), made(ApproxIFER, Brightness(), k)
    honest = scored(robust, source, k)
    noisy = scored(robust, source, k, corrupt=1)
    assert honest.recovered is not None
    assert noisy.recovered is not None
    assert noisy.recovered > honest.recovered - 0.1
    assert noisy.complete == honest.complete
    harmed, whole = scored(plain, source, k, corrupt=1), scored(plain, source, k)
    assert harmed.recovered is not None
    assert whole.recovered is not None
    assert harmed.recovered < whole.recovered - 0.1
    copied = scored(made(Replication, Brightness(), k), source, k, corrupt=1)
    assert copied.counts[0][1] == N * 2 * k  # everybody's answers


def test_noise_hits_so_many_tasks_of_every_group() -> None:
    outputs = {t: torch.randn(50, 3, generator=torch.Generator().manual_seed(t)) for t in (0, 2, 5)}
    for count in range(4):
        found = corrupt_some(outputs, count, torch.Generator().manual_seed(0))
        hits = torch.stack([(found[t] != outputs[t]).any(1) for t in outputs])
        assert hits.sum(0).tolist() == [count] * 50
        assert bool((hits.float().mean(1) < 1).all()) == (count < 3)
        larger = {task: 4 * output for task, output in outputs.items()}
        scaled = corrupt_some(larger, count, torch.Generator().manual_seed(0))
        for task, output in found.items():
            torch.testing.assert_close(scaled[task], 4 * output)
    for task, output in found.items():  # everybody's
        spread = float((output - outputs[task]).std() / outputs[task].std())
        assert spread == pytest.approx(CORRUPTION, rel=0.2)


def test_positions_are_scored_by_pattern(source: ImageSet) -> None:
    """A parity model that is wrong makes every position wrong; a direct answer is not touched."""
    k = 4
    method = made(ParM, Brightness(), k, part=Brightness(shift=9.0, factor=k))
    found = scored(method, source, k)
    assert found.complete == 1.0
    assert found.recovered is not None
    assert found.recovered < 0.6
    assert set(found.patterns) == {(0,), (1,), (2,), (3,)}
    total = sum(right for right, _ in found.counts)
    assert found.recovered == pytest.approx(total / (2 * N))


def test_groupings_are_the_same_for_every_method_and_a_prefix_of_more(
    source: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[int]] = []

    def groups(count: int, k: int, generator: torch.Generator) -> Groups:
        found = random_groups(count, k, generator)
        drawn.append(found.members.flatten().tolist())
        return found

    monkeypatch.setattr(erasures, "random_groups", groups)
    backup = made(SmallBackup, Brightness(), 4, part=Brightness(shift=0.6))
    for method, more in ((backup, {"groupings": 3}), (made(Plain, Brightness(), 4), {"seed": 5})):
        scored(method, source, 4, **more)
    scored(made(Plain, Brightness(), 4), source, 4, groupings=1)
    first, second, third, other, again = (drawn[i] for i in (0, 1, 2, 3, -1))
    assert first == again
    assert len({tuple(one) for one in (first, second, third, other)}) == 4


def test_known_outputs_are_used(source: ImageSet) -> None:
    """And no image is read again, not even for its label."""
    method = made(Plain, Brightness(), 4)
    own = task_outputs(method, source)
    assert own.shape == (N, 4)
    flipped = scored(method, source, 4)
    unread = Unread(source.name, CLASSES, source.images, source.labels, source.source)
    other = score(
        method,
        unread,
        k=4,
        missing=1,
        groupings=1,
        seed=0,
        patterns=10,
        majority=1,
        own=own.flip(1),
    )
    assert flipped.complete == 1.0
    assert other.complete < 0.5


def test_outputs_of_single_images_are_not_held_once_more_for_groups(source: ImageSet) -> None:
    """Of large images they fill the memory: these would take more than a process can address."""
    method = made(Plain, Brightness(), 4)
    own = torch.arange(N, dtype=torch.float32)[:, None].expand(N, 2**24)
    members = (torch.arange(4 * 2_500_000) % N).view(-1, 4)
    outputs = group_outputs(method, source, members, own)
    last = torch.tensor([len(members) - 1])
    assert set(outputs) == {0, 1, 2, 3}
    for place, output in outputs.items():
        assert len(output) == len(members)
        assert output[last][:, -1].tolist() == members[-1, place : place + 1].tolist()
