"""The state of a coding group."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codedinvnet.codes.build import scheme_for
from codedinvnet.models.bundle import Bundle
from codedinvnet.scheduler.group import CodingGroup
from tests.scheduler.model import ErasureCode


def group(k: int = 3, r: int = 1, *, members: int = 0, **code: bool) -> CodingGroup:
    made = CodingGroup(7, ErasureCode(k, r, **code))
    for i in range(members):
        made.join(100 + i)
    return made


def subsets(tasks: list[int]) -> list[frozenset[int]]:
    sizes = range(len(tasks) + 1)
    return [frozenset(s) for s in chain.from_iterable(combinations(tasks, n) for n in sizes)]


@given(
    k=st.integers(1, 4),
    r=st.integers(1, 2),
    fixed_size=st.booleans(),
    systematic=st.booleans(),
    events=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["sent", "arrived", "lost"]))),
    data=st.data(),
)
def test_what_is_determined_and_what_may_be(
    k: int,
    r: int,
    fixed_size: bool,
    systematic: bool,
    events: list[tuple[int, str]],
    data: st.DataObject,
) -> None:
    members = data.draw(st.integers(1, k))
    made = group(k, r, members=members, fixed_size=fixed_size, systematic=systematic)
    made.seal()
    tasks = list(made.code.tasks(made.size))
    live: dict[int, list[int]] = {task: [] for task in tasks}
    first: dict[int, int] = dict(made.outputs)
    for attempt, (number, event) in enumerate(events):
        task = tasks[number % len(tasks)]
        if event == "sent":
            made.sent(task, attempt)
            live[task].append(attempt)
        elif live[task]:
            old = live[task].pop(0)
            if event == "lost":
                made.lost(task, old)
            else:
                assert made.arrived(task, old) == (task not in first)
                first.setdefault(task, old)
        assert made.outputs == first
        assert made.is_idle == (not any(live.values()))
        on_the_way = {t for t in tasks if t in first or live[t]}
        assert set(made.missing()) == set(tasks) - on_the_way
        for known, found in ((set(first), made.determined()), (on_the_way, made.hopeful())):
            answers = made.code.recoverable(frozenset(known), made.size)
            assert found == {member for member in answers if member < members}
        assert made.is_complete == (set(first) == set(tasks))
        if made.is_complete:
            assert made.determined() == set(range(members))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_recoverable_says_what_decode_answers(bundle: Bundle, size: int) -> None:
    """For every subset of the tasks, and so at every erasure position."""
    method = scheme_for(bundle, 4)
    generator = torch.Generator().manual_seed(size)
    shape = (2, size, *bundle.info.input.shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    rules = method.rules
    tasks = rules.tasks(size)
    outputs = {
        t: method.compute(t, images[:, list(spec.members)]).output for t, spec in tasks.items()
    }
    for available in subsets(list(tasks)):
        answers = method.decode({t: outputs[t] for t in available}, size)
        determined = rules.recoverable(available, size)
        assert set(answers) == determined
        for member, logits in answers.items():
            assert logits.shape == (2, len(bundle.info.classes))
            assert bool(logits.isfinite().all())
            if member in available:
                direct = method.direct(outputs[member])
                assert direct is not None
                torch.testing.assert_close(logits, direct)
