from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from codedinvnet.scheduler.order import Key, WorkerOrder

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
