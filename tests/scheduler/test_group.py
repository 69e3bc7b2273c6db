from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codedinvnet.codes.build import scheme_for
from codedinvnet.codes.rules import Task, Uncoded, is_systematic
from codedinvnet.models.bundle import Bundle
from codedinvnet.scheduler.group import FILLER, CodingGroup
from tests.scheduler.model import ErasureCode


def group(k: int = 3, r: int = 1, *, members: int = 0, **code: bool) -> CodingGroup:
    made = CodingGroup(7, ErasureCode(k, r, **code))
    for i in range(members):
        made.join(100 + i)
    return made


def arrive(made: CodingGroup, *tasks: int) -> None:
    """Let tasks be sent and answered, by attempt 10 + t."""
    for task in tasks:
        made.sent(task, 10 + task)
        assert made.arrived(task, 10 + task)


def subsets(tasks: list[int]) -> list[frozenset[int]]:
    sizes = range(len(tasks) + 1)
    return [frozenset(s) for s in chain.from_iterable(combinations(tasks, n) for n in sizes)]


def test_queries_join_until_the_group_is_full() -> None:
    made = group(2)
    assert (made.join(5), made.join(6)) == (0, 1)
    assert made.members == [5, 6]
    assert made.is_open
    assert made.is_full
    with pytest.raises(ValueError, match="group 7 takes no more members"):
        made.join(7)


def test_nobody_joins_a_sealed_group() -> None:
    made = group(3, members=1)
    made.seal()
    assert not made.is_full
    with pytest.raises(ValueError, match="group 7 takes no more members"):
        made.join(7)
    with pytest.raises(ValueError, match="group 7 cannot be sealed"):
        made.seal()
    with pytest.raises(ValueError, match="group 7 is sealed"):
        made.keep([100])
    with pytest.raises(ValueError, match="group 7 is sealed"):
        made.leave(100)


def test_an_empty_group_cannot_be_sealed() -> None:
    with pytest.raises(ValueError, match="group 7 cannot be sealed"):
        group().seal()


def test_sealing_returns_the_tasks_that_nobody_has() -> None:
    made = group(3, 2, members=2)
    made.sent(0, 10)
    arrive(made, 1)
    assert made.seal() == (3, 4)
    assert made.size == 2
    assert not made.is_open


def test_a_code_that_is_not_systematic_has_all_its_tasks_to_send() -> None:
    assert group(3, 2, members=2, systematic=False).seal() == (0, 1, 3, 4)


def test_fillers_count_as_arrived_in_a_systematic_code() -> None:
    made = group(4, members=2, fixed_size=True)
    assert made.seal() == (0, 1, 4)
    assert made.size == 4
    assert made.outputs == {2: FILLER, 3: FILLER}
    arrive(made, 4, 1)
    assert made.determined() == {0, 1}  # the fillers are nobody's members
    arrive(made, 0)
    assert made.is_complete


def test_fillers_are_computed_on_in_a_code_that_is_not_systematic() -> None:
    made = group(3, 1, members=1, fixed_size=True, systematic=False)
    assert made.seal() == (0, 1, 2, 3)
    assert made.outputs == {}
    arrive(made, 1, 2, 3)
    assert made.determined() == {0}
    assert not made.is_complete


@pytest.mark.parametrize("guesses", [False, True])
def test_a_parity_alone_is_something_to_guess_from(guesses: bool) -> None:
    made = group(3, members=3, guesses=guesses)
    assert not made.guessable()
    made.seal()
    arrive(made, 0)
    assert not made.guessable()
    arrive(made, 3)
    assert made.guessable() == guesses
    assert made.determined() == {0}


def test_the_first_output_of_a_task_is_used() -> None:
    made = group(2, members=2)
    made.sent(0, 10)
    made.sent(0, 11)
    assert made.arrived(0, 11)
    assert not made.arrived(0, 10)
    assert made.outputs == {0: 11}
    assert made.is_idle


def test_a_task_is_missing_when_all_its_attempts_are_lost() -> None:
    made = group(2, members=2)
    made.sent(0, 10)
    made.sent(0, 11)
    made.sent(1, 12)
    made.seal()
    made.sent(2, 13)
    assert made.missing() == ()
    made.lost(0, 10)
    assert made.missing() == ()
    made.lost(0, 11)
    assert made.missing() == (0,)
    made.lost(0, 99)  # of an attempt that it does not know, nothing follows
    made.lost(5, 99)
    assert made.missing() == (0,)
    assert not made.is_idle


def test_determined_and_hopeful() -> None:
    made = group(3, members=3)
    for task in range(3):
        made.sent(task, 10 + task)
    made.seal()
    made.sent(3, 13)
    assert made.determined() == set()
    assert made.hopeful() == {0, 1, 2}
    made.lost(1, 11)
    assert made.hopeful() == {0, 1, 2}
    made.arrived(0, 10)
    assert made.determined() == {0}
    made.arrived(3, 13)
    assert made.determined() == {0}
    made.lost(2, 12)
    assert made.hopeful() == {0}
    assert made.is_idle
    made.sent(2, 14)
    assert made.hopeful() == {0, 1, 2}
    made.arrived(2, 14)
    assert made.determined() == {0, 1, 2}


def test_an_open_group_knows_what_its_data_tasks_say() -> None:
    made = group(3, members=2)
    made.sent(0, 10)
    arrive(made, 1)
    assert made.determined() == {1}
    assert made.hopeful() == {0, 1}
    assert not made.is_complete


def test_complete_when_every_task_has_arrived() -> None:
    made = group(2, 2, members=2)
    arrive(made, 0, 1)
    made.seal()
    arrive(made, 2)
    assert not made.is_complete
    arrive(made, 3)
    assert made.is_complete


def test_one_that_leaves_makes_room_and_those_behind_it_move_up() -> None:
    made = group(4, members=4)
    arrive(made, 0, 3)
    made.sent(1, 11)
    made.sent(2, 12)
    made.lost(1, 11)
    made.leave(101)
    assert made.members == [100, 102, 103]
    assert made.outputs == {0: 10, 2: 13}
    assert {member: a for member, a in made.live.items() if a} == {1: {12}}
    assert made.join(104) == 3


def test_those_who_are_kept_are_renumbered() -> None:
    made = group(4, members=3)
    for task in range(3):
        made.sent(task, 10 + task)
    made.sent(2, 20)
    assert made.arrived(1, 11)
    made.keep([100, 102])
    assert made.members == [100, 102]
    assert made.outputs == {}
    assert made.live == {0: {10}, 1: {12, 20}}
    assert made.seal() == (4,)
    assert made.arrived(1, 20)
    assert made.determined() == {1}


def test_a_group_of_one_without_a_code() -> None:
    made = group(3, members=1)
    made.sent(0, 10)
    made.uncode()
    assert not made.is_open
    assert made.is_full
    assert made.missing() == ()
    made.arrived(0, 10)
    assert made.determined() == {0}
    assert made.is_complete


def test_an_empty_group_without_a_code() -> None:
    made = group(3)
    made.keep([])
    made.uncode()
    assert not made.is_open
    assert made.is_idle
    assert made.determined() == made.hopeful() == set()


def test_uncoded() -> None:
    code = Uncoded()
    assert code.tasks(1) == {0: Task((0,))}
    assert code.recoverable(frozenset(), 1) == set()
    assert code.recoverable(frozenset({0}), 1) == {0}
    assert is_systematic(code)


def test_which_codes_are_systematic() -> None:
    assert is_systematic(ErasureCode(3, 2))
    assert is_systematic(ErasureCode(3, 2, fixed_size=True))
    assert not is_systematic(ErasureCode(3, 2, systematic=False))


@given(
    k=st.integers(1, 4),
    r=st.integers(1, 2),
    fixed_size=st.booleans(),
    systematic=st.booleans(),
    events=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["sent", "arrived", "lost"]))),
    data=st.data(),
)
def test_hope_never_falls_short_of_what_is_determined(
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
        before = made.determined()
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
        assert set(made.missing()) == {t for t in tasks if t not in first and not live[t]}
        assert before <= made.determined() <= made.hopeful() <= set(range(members))
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
        assert set(answers) == (set(range(size)) if rules.k in available else determined)
        for member, logits in answers.items():
            assert logits.shape == (2, len(bundle.info.classes))
            assert bool(logits.isfinite().all())
            if member in available:
                direct = method.direct(outputs[member])
                assert direct is not None
                torch.testing.assert_close(logits, direct)
