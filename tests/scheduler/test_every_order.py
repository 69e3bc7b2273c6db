"""Every query ends once, whatever happens in whatever order."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codedinvnet.codes.rules import AnswersAll, CodeRules
from codedinvnet.scheduler.group import Traffic
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.tuning import TUNING, Tuning
from tests.scheduler.model import ErasureCode, Model
from tests.scheduler.situations import know_times

SETUPS: list[tuple[str, int, CodeRules | None]] = [
    ("uncoded", 1, None),
    ("uncoded", 3, None),
    ("replicate", 2, None),
    ("replicate", 4, None),
    ("hedge", 1, None),
    ("hedge", 3, None),
    ("coded", 3, ErasureCode(2)),
    ("coded", 6, ErasureCode(3)),
    ("coded", 5, ErasureCode(3, 2)),
    ("coded", 4, ErasureCode(3, fixed_size=True)),
    ("coded", 4, ErasureCode(2, 2, systematic=False)),
    ("coded", 5, ErasureCode(3, 1, fixed_size=True, systematic=False)),
    ("coded+hedge", 3, ErasureCode(2)),
    ("coded+hedge", 6, ErasureCode(4)),
    ("coded+hedge", 6, ErasureCode(3, 2, fixed_size=True)),
    ("coded+hedge", 4, ErasureCode(3, 1, systematic=False)),
    ("coded", 4, ErasureCode(3, guesses=True)),
    ("coded", 5, ErasureCode(4, fixed_size=True, guesses=True)),
    ("coded+hedge", 5, ErasureCode(4, guesses=True)),
    ("coded", 6, AnswersAll(4, r=2)),
    ("coded+hedge", 7, AnswersAll(4, r=3)),
    ("uncoded", 4, ErasureCode(3)),
    ("hedge", 5, ErasureCode(4, guesses=True)),
    ("auto", 3, None),
    ("auto", 4, ErasureCode(3)),
    ("auto", 6, ErasureCode(3, 2)),
    ("auto", 4, AnswersAll(3)),
    ("auto", 3, AnswersAll(2)),
]


EVENTS = st.tuples(
    st.sampled_from(
        ["submit"] * 3
        + ["result"] * 5
        + ["decoded", "decoded", "fail", "kill", "up", "release", "wait", "oversleep", "late"]
        + ["withheld"] * 2
        + ["called late", "fail for good", "cancel", "change"]
    ),
    st.integers(0, 11),
)


WAITS = (0.001, 0.005, 0.01, 0.03, 0.06, 0.2, 0.5, 1.0, 2.0, 3.1, 4.0, 7.0)


def happen(model: Model, event: str, n: int, bulks: int) -> None:
    """Let something happen, if it can."""
    pending = [*model.at, *model.held]
    if event == "submit":
        timeout = (1e6, 1e6, 0.04, 1.0)[n // 3 % 4]
        model.submit((1, 1, 2, 3)[n % 4], timeout, accept=n % 5 != 4, bulk=n % bulks)
    elif event == "result" and pending:
        model.result(pending[n % len(pending)])
    elif event == "release" and model.at:
        model.release(list(model.at)[n % len(model.at)])
    elif event == "fail" and pending:
        model.fail(pending[n % len(pending)])
    elif event == "fail for good" and pending:
        model.fail(pending[n % len(pending)], final=True)
    elif event == "called late" and model.at:
        model.late(list(model.at)[n % len(model.at)])
    elif event == "kill" and len(model.down) < model.rules.workers:
        up = sorted(set(range(model.rules.workers)) - model.down)
        model.kill(up[n % len(up)])
    elif event == "up" and model.down:
        model.up(sorted(model.down)[n % len(model.down)])
    elif event == "decoded" and model.decoding:
        model.decoded(model.decoding[n % len(model.decoding)])
    elif event == "withheld" and model.decoding:
        model.withheld(model.decoding[n % len(model.decoding)])
    elif event == "cancel":  # one, or a few at once, of which some may be over
        queries = list(model.asked)[-(n + 1) :]
        model.cancel(*queries[: 1 + n % 3])
    elif event == "change":
        model.change(list(POLICIES)[n % len(POLICIES)])
    elif event == "wait":
        model.wait(WAITS[n])
    elif event == "oversleep":
        model.oversleep(WAITS[n])
    elif event == "late" and model.lost:
        attempt = model.lost[n % len(model.lost)]
        model.new()
        (model.fail if n % 3 == 0 else model.result)(attempt)
        assert model.new() == [], "it was given up long ago"


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(
    setup=st.sampled_from(SETUPS),
    timed=st.booleans(),
    fallbacks=st.sampled_from([0, 0, 1, 2]),
    slots=st.sampled_from([1, 1, 2, 3, None]),
    worker_batch=st.sampled_from([1, 1, 2, 3]),
    slow=st.sampled_from([1.0, 1.0, 3.0]),
    bulks=st.sampled_from([1, 1, 3]),
    max_losses=st.sampled_from([1, 3, 5]),
    extra=st.sampled_from([None, None, 0.0, 0.3, 1.0]),
    events=st.lists(EVENTS, min_size=20, max_size=100),
)
def test_every_query_ends_once_whatever_happens(
    setup: tuple[str, int, CodeRules | None],
    timed: bool,
    fallbacks: int,
    slots: int | None,
    worker_batch: int,
    slow: float,
    bulks: int,
    max_losses: int,
    extra: float | None,
    events: list[tuple[str, int]],
) -> None:
    policy, workers, code = setup
    model = Model(
        policy,
        workers + fallbacks,
        code,
        fallbacks=fallbacks,
        max_losses=max_losses,
        hedge_share=0.8,
        extra=extra,
        slots=slots,
        tuning=Tuning(auto_looks=3),
        worker_batch=worker_batch if slots == 1 else 1,
    )
    model.unequal = bulks > 1
    if timed:
        for bulk in range(1, bulks):
            for _ in range(TUNING.times_needed):
                model.scheduler.stats.took(0.0, 0, 0, 0.015 * 10**bulk, Traffic("", bulk))
        know_times(model, slow)
    for event, n in events:
        happen(model, event, n, bulks)
    model.drain()
