"""The tests for workers that answer wrongly."""

from __future__ import annotations

import numpy as np
import pytest

from codedinvnet.serving.byzantine import ByzantineDetector, Member

WORKERS, K = 12, 10
EXPECTED = np.array([0.002, 0.01, 0.2])


def groups(
    tests: ByzantineDetector,
    count: int,
    *,
    liar: int = -1,
    changed: float = 0.0,
    roles: str = "both",
    drift: float = 1.0,
    seed: int = 0,
) -> tuple[int | None, int]:
    """Feed random groups; return who was named, and after how many groups."""
    random = np.random.default_rng(seed)
    for number in range(count):
        who = random.permutation(WORKERS)[: K + 1]
        expected = EXPECTED[random.integers(3, size=K)]
        rates = np.minimum(expected * drift, 0.9)
        if roles != "extra":
            rates[who[:K] == liar] += changed
        if roles != "member" and who[K] == liar:
            rates += changed
        agrees = random.random(K) >= rates
        columns = (who[:K].tolist(), expected.tolist(), agrees.tolist())
        members = [Member(*row) for row in zip(*columns, strict=True)]
        found = tests.seen(members, int(who[K]))
        if found is not None:
            assert not tests.sums.any()  # they begin again
            return found, number + 1
    return None, count


@pytest.mark.parametrize(
    ("roles", "changed"),
    [(roles, changed) for roles in ("member", "both") for changed in (0.1, 0.5, 0.9)]
    + [("extra", 0.9)],
)
def test_a_liar_is_named_and_never_a_neighbour(roles: str, changed: float) -> None:
    for seed in range(20):
        liar, tests = seed % WORKERS, ByzantineDetector(WORKERS)
        found, after = groups(tests, 1000, liar=liar, changed=changed, roles=roles, seed=seed)
        assert found == liar
        assert after <= 500


def test_sound_workers_are_not_named() -> None:
    assert groups(ByzantineDetector(WORKERS), 10_000)[0] is None


@pytest.mark.parametrize("drift", [3.0, 30.0])
def test_drift_of_the_inputs_names_no_worker(drift: float) -> None:
    tests = ByzantineDetector(WORKERS)
    groups(tests, 500)
    assert groups(tests, 3000, drift=drift, seed=1)[0] is None


@pytest.mark.parametrize("liar", [1, 3])
def test_groups_of_one_blame_no_neighbour(liar: int) -> None:
    """As of sparse traffic: three workers, and a small backup (3) that does every extra task."""
    tests, named = ByzantineDetector(4), []
    for number in range(3000):
        agrees = liar not in (number % 3, 3) or number % 10 == 0
        named.append(tests.seen([Member(number % 3, 0.01, agrees)], 3))
    assert set(named) == ({1, None} if liar == 1 else {None})


def twice(tests: ByzantineDetector, count: int, wrong: float, liar: int = -1) -> int | None:
    """Feed groups whose workers answer for two members each; return who was named.

    Args:
        tests: the tests.
        count: of the groups.
        wrong: how often the first of a sound worker's two answers disagrees.
        liar: the worker whose first answer always disagrees.
    """
    random = np.random.default_rng(0)
    for _ in range(count):
        *own, extra = random.permutation(WORKERS)[: K // 2 + 1].tolist()
        members = []
        for worker in own:
            agrees = worker != liar and bool(random.random() >= wrong)
            members += [Member(worker, 0.01, agrees), Member(worker, 0.01, True)]
        found = tests.seen(members, extra)
        if found is not None:
            return found
    return None


def test_all_answers_of_a_worker_that_takes_a_second_task_of_a_group_count() -> None:
    assert twice(ByzantineDetector(WORKERS), 200, 0.0, liar=4) == 4
    assert twice(ByzantineDetector(WORKERS), 3000, 0.3) is None  # all disagree as often
