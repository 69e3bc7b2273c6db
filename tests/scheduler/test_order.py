from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from codedinvnet.scheduler.order import SLACK, Key, WorkerOrder

WORKERS = 6
KEYS = st.one_of(
    st.none(), st.tuples(st.sampled_from([1.0, 2.5]), st.integers(0, 3), st.integers(0, 5))
)
STEPS = st.lists(
    st.tuples(st.integers(0, WORKERS - 1), KEYS, st.frozensets(st.integers(0, WORKERS - 1)))
)


@settings(derandomize=True, deadline=None)
@given(steps=STEPS)
def test_the_first_is_the_one_that_a_look_at_all_finds(
    steps: list[tuple[int, Key | None, frozenset[int]]],
) -> None:
    order = WorkerOrder(WORKERS)
    keys: list[Key | None] = [None] * WORKERS
    for worker, key, excluded in steps:
        order.update(worker, key)
        keys[worker] = key
        found = [(k, i) for i, k in enumerate(keys) if k is not None and i not in excluded]
        expected = min(found)[1] if found else None
        assert order.first(excluded) == expected
        assert order.first(excluded) == expected  # to look changes nothing


def test_outdated_entries_do_not_pile_up() -> None:
    order = WorkerOrder(3)
    order.update(0, (1.0, 0, 0))
    for turn in range(1000):  # these never come to the top
        order.update(1, (1.0, turn % 7 + 1, turn))
        order.update(2, (1.0, turn % 5 + 1, turn))
        assert order.first() == 0
        assert len(order._heap) <= SLACK * 3 + SLACK + 1
