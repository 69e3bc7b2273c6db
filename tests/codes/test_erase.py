"""`erase`: the long frame of answers, and the score that `bench accuracy` makes of it."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.codes.erase import NO_ANSWER, erase, recovered_accuracy, single_losses
from codedinvnet.codes.invnet import own_scheme
from codedinvnet.codes.parm import ParM
from codedinvnet.codes.plain import Plain, Replication
from codedinvnet.data import ImageSet
from codedinvnet.evaluation.accuracy import evaluate
from codedinvnet.evaluation.methods import score
from codedinvnet.models.bundle import Bundle
from codedinvnet.training.network import embed_all
from tests.codes.linear import made

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


def scored(
    method: Scheme, source: ImageSet, k: int, missing: int = 1, seed: int = 0, **more: Any
) -> dict[str, Any]:
    trial = {"k": k, "missing": missing, "groupings": 2, "patterns": 1000, **more}
    data = SimpleNamespace(test=source, majority=1)
    return score(method, data, SimpleNamespace(**trial), seed)  # type: ignore[arg-type]


@given(k=st.integers(2, 6), groupings=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_query_is_erased_once_a_grouping(k: int, groupings: int, seed: int) -> None:
    labels = torch.arange(N) % 4
    images = (labels * 85).to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    queries = ImageSet("levels", CLASSES, images, labels, "test")
    method = made(SmallBackup, Brightness(), k, part=Brightness(shift=0.6))
    frame = erase(method, queries, single_losses(k), k=k, groupings=groupings, seed=seed)
    assert len(frame) == N * groupings
    assert (frame.groupby("grouping")["query"].nunique() == N).all()
    assert (frame["lost"].map(lambda lost: lost[0]).astype(int) == frame["member"]).all()
    assert (frame["label"] == frame["direct"]).all()
    expected = Brightness(shift=0.6)(images).argmax(1)[frame["query"].tolist()]
    assert frame["prediction"].tolist() == expected.tolist()
    assert frame["confidence"].between(0.25, 1).all()


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
        assert (found["recovered"], found["answered"]) == (1.0, 1.0), method.name
        assert found["counts"] == [[N, N]] * 2
    assert capsys.readouterr().err == ""  # a log has a line a minute


@pytest.mark.parametrize("k", [2, 4])
def test_a_missing_answer_counts_as_the_majority_class(source: ImageSet, k: int) -> None:
    method = made(Plain, Brightness(), k)
    found = scored(method, source, k)
    share = float((source.labels == 1).float().mean())
    assert found["recovered"] == pytest.approx(share, abs=1e-6)
    assert found["answered"] == 0.0
    frame = erase(method, source, single_losses(k), k=k)
    assert (frame["prediction"] == NO_ANSWER).all()


def test_an_answer_that_is_not_finite_is_none(source: ImageSet) -> None:
    class Broken(Brightness):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return logits.where(logits.argmax(1, keepdim=True) != 2, torch.nan)

    found = scored(made(SmallBackup, Brightness(), 4, part=Broken()), source, 4)
    share = float((source.labels == 2).float().mean())
    assert found["answered"] == found["recovered"] == pytest.approx(1 - share, abs=1e-6)


def test_it_agrees_with_evaluate_and_with_what_trainings_watch(
    bundle: Bundle, held_out: ImageSet
) -> None:
    """Three ways to the same figure: of a benchmark, of `evaluate`, and of a stage's validation."""
    k = 4
    scheme = scheme_for(bundle, k)
    found = scored(scheme, held_out, k)
    evaluated = evaluate(scheme, held_out, k=k, groupings=2, seed=0, progress=False)
    assert found["recovered"] == pytest.approx(evaluated.recovered_accuracy, abs=1e-6)
    latents = embed_all(bundle.model, held_out.images).flatten(1)
    watched = recovered_accuracy(own_scheme(bundle.model, k), held_out, latents)
    once = scored(scheme, held_out, k, seed=k, groupings=1)
    assert watched == pytest.approx(once["recovered"], abs=1e-6)


@pytest.mark.parametrize("missing", [2, 3])
def test_several_missing(source: ImageSet, missing: int) -> None:
    k = 4
    backup = scored(made(SmallBackup, Brightness(), k, part=Brightness()), source, k, missing)
    # Patterns in which the backup is lost, too, leave their members unanswered.
    lost_backup = sum(missing - 1 for lost in combinations(range(5), missing) if 4 in lost)
    erased = sum(sum(i < 4 for i in lost) for lost in combinations(range(5), missing))
    assert backup["answered"] == pytest.approx(1 - lost_backup / erased, abs=1e-6)
    assert len(backup["patterns"]) == len(list(combinations(range(5), missing)))
    parm = scored(made(ParM, Brightness(), k, part=Brightness(factor=k)), source, k, missing)
    assert parm["answered"] == 0.0  # one parity makes up for one loss
    copies = scored(made(Replication, Brightness(), k), source, k, missing)
    pairs = list(combinations(range(2 * k), missing))
    both = sum({i, k + i} <= set(lost) for lost in pairs for i in range(k))
    expected = 1 - both / sum(i in p for p in pairs for i in range(k))
    assert copies["answered"] == pytest.approx(expected, abs=1e-6)
