"""Latency logs, and what is fitted to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codedinvnet.common.distributions import Distribution
from codedinvnet.common.errors import UserError
from codedinvnet.simulation.recording import Fitted, WorkerTasks, fit, fit_delays, read_log

DELAYS = {
    "exponential": Distribution(distribution="exponential", ms=200, plus_ms=60),
    "pareto": Distribution(distribution="pareto", ms=80, shape=1.5),
    "constant": Distribution(ms=100),
}


def workers(
    count: int = 4,
    tasks: int = 10_000,
    *,
    share: float = 0.02,
    delay: Distribution | None = None,
    factor: float = 1.0,
    seed: int = 3,
) -> list[WorkerTasks]:
    """Return tasks of around 40 ms as the simulator has them.

    Args:
        count: of workers.
        tasks: of each.
        share: of the tasks that are delayed.
        delay: None: none are.
        factor: of the last worker.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    found = []
    for worker in range(count):
        last = worker == count - 1
        times = 40 * np.exp(0.1 * generator.standard_normal(tasks)) * (factor if last else 1.0)
        hit = generator.random(tasks) < share
        if delay is not None:
            times[hit] += 1000 * delay.draw(generator, int(hit.sum()))
        found.append(WorkerTasks(f"w{worker}", times))
    return found


def agree(fitted: Fitted, of: Sequence[WorkerTasks], within: float = 0.15) -> None:
    """Compare draws with many more tasks of the same service, far into the tail.

    Of a Pareto tail of exponent 1.5, fitted to 800 delays, p99.9 has a standard error of 7 %.
    """
    drawn, law = fitted.draw(400_000), np.concatenate([worker.times for worker in of])
    for share in (0.5, 0.9, 0.99, 0.995, 0.999):
        assert np.quantile(drawn, share) == pytest.approx(np.quantile(law, share), rel=within)


@pytest.mark.parametrize("kind", DELAYS)
def test_delays_are_found_again(kind: str) -> None:
    fitted = fit(workers(delay=DELAYS[kind]))
    (straggler,) = fitted.stragglers
    assert (straggler.kind, straggler.worker) == ("slow", None)
    assert straggler.probability == pytest.approx(0.02, rel=0.1)
    found = straggler.delay
    assert found is not None
    assert found.distribution == kind
    assert found.ms == pytest.approx(DELAYS[kind].ms, rel=0.2)
    assert fitted.service.mean_ms == pytest.approx(40.2, rel=0.01)
    agree(fitted, workers(4, 100_000, delay=DELAYS[kind], seed=4))
    assert fitted.draw(400_000).max() > fitted.times.max() or kind == "constant"


def test_slow_and_fast_workers_are_told_from_delays() -> None:
    """A delay is as long on a slow worker as on another."""
    slow = fit(workers(4, 40_000, factor=3.0, delay=DELAYS["pareto"]))
    assert [(s.kind, s.worker) for s in slow.stragglers] == [("factor", 0), ("slow", None)]
    assert slow.workers == ("w3", "w0", "w1", "w2")
    factor, delayed = slow.stragglers
    assert factor.factor == pytest.approx(3, rel=0.02)
    assert delayed.probability == pytest.approx(0.02, rel=0.15)
    agree(slow, workers(4, 100_000, factor=3.0, delay=DELAYS["pareto"], seed=4))
    (fast,) = fit(workers(factor=0.5)).stragglers
    assert (fast.kind, fast.worker) == ("factor", 0)
    assert fast.factor == pytest.approx(0.5, rel=0.02)
    assert fit(workers(factor=1.2)).stragglers == ()


@pytest.mark.parametrize("share", [0.0, 0.02])
def test_a_slow_worker_is_known_by_few_tasks(share: float) -> None:
    """A service avoids it, so that more never come."""
    log = workers(share=share, delay=DELAYS["pareto"])
    fitted = fit([*log, WorkerTasks("slow", np.array([120.0, 121.0, 119.0, 122.0]))])
    (factor, *others) = fitted.stragglers
    assert (factor.kind, factor.worker, fitted.workers[0]) == ("factor", 0, "slow")
    assert [s.worker for s in others] == [None] * bool(share)
    late = [*workers(delay=DELAYS["constant"]), WorkerTasks("new", np.array([40.0, 140.0, 140.0]))]
    assert not any(s.worker is not None for s in fit(late).stragglers)


def test_no_stragglers() -> None:
    assert fit(workers()).stragglers == ()
    alike = fit([WorkerTasks("w", np.full(200, 7.0))])
    assert alike.service.mean_ms == pytest.approx(7)
    assert not alike.stragglers


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=60)
    | st.lists(st.floats(100, 100.001) | st.sampled_from([3.0, 7.0]), min_size=30, max_size=60)
)
def test_any_delays_are_fitted(values: list[float]) -> None:
    found, shown = fit_delays(np.array(values))
    assert 0 < shown < math.inf
    drawn = found.draw(np.random.default_rng(0), 1000)
    assert drawn.min() >= 0
    assert np.isfinite(drawn).all()


def test_a_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "TIMES.CSV"
    lines = [f"{worker}, {ms}" for worker in (10, 2, "gpu a") for ms in range(50)]
    path.write_text("\n".join(["worker,ms", *lines, ""]), encoding="utf-8-sig")
    found = read_log(path)
    assert [(w.name, len(w.times)) for w in found] == [("10", 50), ("2", 50), ("gpu a", 50)]
    assert found[2].times.tolist() == list(range(50))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,0\n" * 60 + "1,5\n" * 50, "more than half of the tasks took 0 ms"),
        ("1,5\n" * 99 + "1,1e307\n", "line 100: '1,1e307' is not worker,ms"),
        ("1,5\n" * 99, "99 tasks are too few to fit: 100 at least"),
        ("1,5\nworker,ms\n", "line 2: 'worker,ms' is not worker,ms"),
        ("1,5\n2;5\n", "line 2: '2;5' is not worker,ms"),
        ("1,-5\n", "line 1"),
        ("1,nan\n", "line 1"),
        (None, "cannot read"),
    ],
)
def test_what_is_no_log(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_log(path)
    assert "\n" not in str(caught.value)
