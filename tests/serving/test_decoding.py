from __future__ import annotations

import numpy as np
import pytest
import torch

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.data import sample_images
from codedinvnet.models.bundle import load_bundle
from codedinvnet.serving.decoder import compute, compute_apart
from codedinvnet.serving.decoding import Job
from codedinvnet.serving.served import PROBABILITIES, Classifier

K = 4
MNIST = Classifier("mnist", (1, 28, 28), tuple("0123456789"))


@pytest.fixture(scope="module")
def method() -> Scheme:
    return scheme_for(load_bundle("mnist"), K)


@pytest.fixture(scope="module")
def outputs(method: Scheme) -> dict[int, np.ndarray]:
    images = sample_images("mnist").images[None, :K]
    return {
        task: method.compute(task, images[:, list(spec.members)]).output[0].numpy()
        for task, spec in method.rules.tasks(K).items()
    }


def test_jobs_of_all_kinds_are_computed_together(
    method: Scheme, outputs: dict[int, np.ndarray]
) -> None:
    def rest(missing: int) -> dict[int, np.ndarray]:
        return {task: output for task, output in outputs.items() if task != missing}

    jobs = [
        Job(K, rest(1), {11: 1}),
        Job(0, {0: outputs[0]}, {10: 0}),
        Job(K, rest(3), {13: 3}),
        Job(0, {0: outputs[2]}, {12: 0}),
        Job(K, rest(1), {21: 1}),
    ]
    found = compute(method, MNIST, jobs)
    assert [set(answers) for answers in found] == [{11}, {10}, {13}, {12}, {21}]
    batch = {task: torch.from_numpy(output)[None] for task, output in outputs.items()}
    for answers, query, member in ((found[1], 10, 0), (found[3], 12, 2)):
        direct = method.direct(batch[member])
        assert direct is not None
        expected = direct.softmax(1)
        np.testing.assert_allclose(answers[query].outputs[PROBABILITIES], expected, atol=1e-5)
        assert answers[query].confidence == pytest.approx(float(expected.max()))
    for answers, query, member in ((found[0], 11, 1), (found[2], 13, 3), (found[4], 21, 1)):
        left = {task: output for task, output in batch.items() if task != member}
        expected = method.decode(left, K)[member].softmax(1)
        np.testing.assert_allclose(answers[query].outputs[PROBABILITIES], expected, atol=1e-5)


def test_a_job_does_not_fail_for_another(method: Scheme, outputs: dict[int, np.ndarray]) -> None:
    rest = {task: output for task, output in outputs.items() if task != 1}
    good = Job(K, rest, {7: 1})
    bad = Job(K, {**rest, K: rest[K][:1]}, {8: 1})
    found = compute_apart(method, MNIST, [good, bad])
    assert isinstance(found[0], dict)
    assert found[0].keys() == {7}
    assert isinstance(found[1], Exception)
