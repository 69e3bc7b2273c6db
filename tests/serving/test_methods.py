"""The other codes behind the real front end: those that a bundle's model is enough for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.codes.registry import METHODS
from codedinvnet.common.errors import UserError
from codedinvnet.data import sample_images
from codedinvnet.models.bundle import WEIGHTS, Bundle, bundle_folder, load_bundle
from codedinvnet.models.checkpoint import load_checkpoint, save_checkpoint
from codedinvnet.scheduler.tuning import TUNING
from codedinvnet.serving.answers import Answered
from codedinvnet.serving.app import open_app
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.opened import check, open_served
from codedinvnet.serving.workers.computing import BundleSpec, SchemeComputer
from tests.serving.bundles import probabilities
from tests.serving.front import answered, running

K = 4
SERVABLE = [name for name, method in METHODS.items() if not method.is_policy]
WITH_PARTS = [name for name, method in METHODS.items() if method.part]


def offline(method: Scheme, group: np.ndarray, *lost: int | None) -> np.ndarray:
    """Return the probabilities (k, classes) of a whole group when tasks are missing."""
    queries = torch.from_numpy(group)[None]
    outputs = {
        task: method.compute(task, queries[:, list(spec.members)]).output
        for task, spec in method.rules.tasks(K).items()
        if task not in lost
    }
    answers = method.decode(outputs, K)
    return torch.cat([answers[i].softmax(1) for i in range(K)]).numpy()


async def served(method: Scheme, images: np.ndarray, *hung: int | None) -> list[Answered]:
    async with running(method, workers=len(method.rules.tasks(K))) as (front, pool):
        for worker in filter(lambda worker: worker is not None, hung):
            pool.hang(worker or 0)
        return answered(await front.ask(images))


@pytest.mark.parametrize("hung", [None, 0, 3])
@pytest.mark.parametrize("name", ["approxifer", "nercc", "oracle"])
async def test_answers_are_those_decoded_offline(
    mnist: Bundle, name: str, hung: int | None
) -> None:
    method = scheme_for(mnist, K, name)
    images = sample_images("mnist").images[:K].numpy()
    found = await served(method, images, hung)
    assert len(found) == K
    given = np.stack([probabilities(answer) for answer in found])
    if name == "oracle":  # which is as good as if none were missing
        np.testing.assert_allclose(given, offline(method, images, None), atol=1e-3)
        assert hung is None or found[hung].outcome == "decoded"
        return
    assert all(answer.outcome == "decoded" for answer in found)
    # Answered as soon as enough of the tasks are there: without a hung worker, any but one.
    possible = [hung] if hung is not None else [None, *range(K + 1)]
    distances = [np.abs(offline(method, images, lost) - given).max() for lost in possible]
    assert min(distances) < 1e-4


@pytest.mark.parametrize("name", [n for n in SERVABLE if n not in WITH_PARTS])
def test_front_ends_and_workers_are_made_for_every_one(name: str) -> None:
    options = ServeOptions(source="mnist", k=K, method=name)
    check(options)
    scheme = open_served(options).scheme
    assert scheme is not None
    assert open_app(options).dispatcher.rules.workers == len(scheme.rules.tasks(K))
    loaded = BundleSpec("mnist", K, method=name).load()
    assert isinstance(loaded, SchemeComputer)
    assert loaded.scheme.name == scheme.name == name


def test_workers_refuse_weights_that_the_front_end_does_not_have(tmp_path: Path) -> None:
    """A bundle that is exchanged in place would answer some of the queries, as `direct`."""
    folder = tmp_path / "deployed"
    shutil.copytree(bundle_folder("mnist"), folder)
    spec = open_served(ServeOptions(source=str(folder), k=K)).spec
    spec.load()
    tensors, header = load_checkpoint(folder / WEIGHTS)
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_checkpoint(folder / WEIGHTS, changed, header)
    told = r"deployed has weights \w{16}, the front end has \w{16}: restart the service"
    with pytest.raises(UserError, match=told):
        spec.load()


def test_what_needs_a_trained_part_is_not_made_without_one(mnist: Bundle) -> None:
    for name in WITH_PARTS:
        options = ServeOptions(source="mnist", k=K, method=name)
        check(options)
        with pytest.raises(UserError, match=f"part: {name} needs the part that"):
            open_app(options)
    with pytest.raises(UserError, match="--method: 'none' is not one of coded-invnet"):
        check(ServeOptions(source="mnist", method="none"))  # that is a policy
    for k in (0, -3):
        with pytest.raises(UserError, match=f"k must be at least 2, got {k}"):
            scheme_for(mnist, k, "parm", Path("x"))
    with pytest.raises(UserError, match="part: approxifer needs no trained part"):
        scheme_for(mnist, K, "approxifer", Path("x"))


@pytest.mark.parametrize("policy", ["uncoded", "replicate", "hedge", "coded+hedge"])
def test_codes_without_direct_answers_go_with_the_policy_coded(policy: str) -> None:
    told = re.escape(f"goes with the policy coded only, not with {policy}")
    with pytest.raises(UserError, match=f"--policy: nercc has no direct answers.*{told}"):
        open_app(ServeOptions(source="mnist", k=K, method="nercc", policy=policy))


async def test_a_late_query_is_rescued_by_the_small_backup_of_a_bundle() -> None:
    """Of ten queries one is on a worker that hangs; two workers are enough for that."""
    method = scheme_for(load_bundle("mnist"), 10, "small-backup")
    samples = sample_images("mnist")
    images, labels = samples.images[:10].numpy(), samples.labels[:10].tolist()
    async with running(method, policy="auto", workers=2, extra=1.0) as (front, pool):
        for _ in range(TUNING.times_needed):
            front.scheduler.stats.took(0.0, 1, 0, 0.5)
        pool.hang(0)
        answers = answered(await front.ask(images))
        assert front.scheduler.dispatcher.sent == 11
    assert sorted(answer.outcome for answer in answers) == ["decoded", *["direct"] * 9]
    assert [int(probabilities(answer).argmax()) for answer in answers] == labels
