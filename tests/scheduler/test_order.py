from __future__ import annotations

from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from codedinvnet.scheduler.order import Key, WorkerOrder

WORKERS = 6
KEYS = st.one_of(
    st.none(), st.tuples(st.sampled_from([1.0, 2.5]), st.integers(0, 3), st.integers(0, 5))
)
STEPS = st.lists(st.tuples(st.integers(0, WORKERS - 1), KEYS, st.integers(0, WORKERS)))


@settings(derandomize=True, deadline=None)
@given(steps=STEPS)
def test_workers_come_in_the_order_of_their_keys(steps: list[tuple[int, Key | None, int]]) -> None:
    order = WorkerOrder(WORKERS)
    keys: list[Key | None] = [None] * WORKERS
    for worker, key, wanted in steps:
        order.update(worker, key)
        keys[worker] = key
        expected = [i for _, i in sorted((k, i) for i, k in enumerate(keys) if k is not None)]
        assert [*islice(order, wanted)] == expected[:wanted]  # who stops midway
        assert [*order] == expected  # changes nothing
