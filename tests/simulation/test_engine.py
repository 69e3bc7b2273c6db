"""The simulated service against queueing theory, and its books."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq

from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.simulation.engine import Records, Simulation
from codedinvnet.simulation.scenario import Scenario
from codedinvnet.simulation.stragglers import stragglers
from tests.simulation.scenarios import Watched, scenario

EXPONENTIAL = {"distribution": "exponential", "ms": 10}


def run(**changes: Any) -> Records:
    return Simulation(scenario(**changes)).run()


def mean_ms(records: Records) -> float:
    return float(1000 * records.latency[len(records.latency) // 20 :].mean())


# Queueing theory: what is simulated must have the sojourn times that are known exactly.


def test_poisson_arrivals_and_exponential_service() -> None:
    """M/M/1: sojourn times are exponential with the rate mu - lambda."""
    found = run(service=EXPONENTIAL, qps=50, queries=12_000)
    assert mean_ms(found) == pytest.approx(1000 / (100 - 50), rel=0.05)
    for share in (0.5, 0.9, 0.99):
        exact = -1000 * math.log(1 - share) / (100 - 50)
        assert 1000 * np.quantile(found.latency, share) == pytest.approx(exact, rel=0.08)
    assert found.busy / found.seconds == pytest.approx(0.5, rel=0.03)


def test_poisson_arrivals_and_any_service() -> None:
    """M/G/1: the mean wait by Pollaczek and Khinchine."""
    service = {"distribution": "lognormal", "ms": 8, "shape": 0.6}
    given = scenario(service=service, qps=60, queries=12_000)
    mean = given.service.mean_ms
    rho = 60 * mean / 1000
    wait = rho * mean * math.exp(0.6**2) / (2 * (1 - rho))
    assert mean_ms(Simulation(given).run()) == pytest.approx(mean + wait, rel=0.05)


def erlang_c_wait(rate: float, mu: float, servers: int) -> float:
    """Return the mean wait of a queue with several servers (M/M/c)."""
    a = rate / mu
    terms = [a**i / math.factorial(i) for i in range(servers)]
    last = a**servers / math.factorial(servers) * servers / (servers - a)
    return last / (sum(terms) + last) / (servers * mu - rate)


def test_calls_of_several_tasks() -> None:
    """A queue served in bulk: that of waiting tasks is geometric (Bailey, 1954)."""
    most, qps = 3, 150
    found = run(service=EXPONENTIAL, qps=qps, queries=12_000, worker_batch=most, batch_fixed=1.0)
    root = brentq(lambda x: 100 * x ** (most + 1) - (qps + 100) * x + qps, 0.0, 1 - 1e-6)
    busy = 1 / (100 / qps + 1 / (1 - root))
    waiting = busy * root / (1 - root) ** 2
    assert mean_ms(found) == pytest.approx(1000 * waiting / qps + 10, rel=0.05)
    assert found.busy / found.seconds == pytest.approx(busy / (1 - root), rel=0.03)


def test_a_call_costs_its_fixed_share_once() -> None:
    found = run(qps=1e6, queries=9, workers=1, worker_batch=4, batch_fixed=0.4, warmup=0.0)
    calls = np.unique(found.latency.round(4))
    assert calls.tolist() == pytest.approx([0.01, 0.038, 0.066])
    assert found.computing == pytest.approx(0.066)


def test_four_workers_wait_as_one_queue_would() -> None:
    """Tasks are bound late (M/M/c)."""
    found = run(service=EXPONENTIAL, workers=4, qps=280, queries=12_000)
    exact = 10 + 1000 * erlang_c_wait(280, 100, 4)
    assert mean_ms(found) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(("cores", "slots", "near"), [(4, 50, 0.05), (4, None, 0.15)])
def test_a_server_behind_the_gateway_queues_what_it_is_given(
    cores: int, slots: int | None, near: float
) -> None:
    """M/M/c at the server; the trip keeps it no longer busy, and long queries are long there."""
    given: dict[str, Any] = {"cores": cores, "slots": slots, "trip": 2, "queries": 8000}
    found = run(service=EXPONENTIAL, qps=70 * cores, **given)
    exact = 12 + 1000 * erlang_c_wait(70 * cores, 100, cores)
    assert mean_ms(found) == pytest.approx(exact, rel=near)
    assert found.busy / found.seconds == pytest.approx(0.7 * cores, rel=0.03)
    long = run(qps=cores, **given, long_share=0.1, long=20)
    assert (long.latency > 0.2).mean() == pytest.approx(0.11, abs=0.015)
    assert long.busy / long.seconds == pytest.approx(0.01 * 2.9 * cores, rel=0.06)


def test_the_first_of_two_copies() -> None:
    """The smaller of two exponential times is exponential with half the mean."""
    found = run(service=EXPONENTIAL, workers=2, policy="replicate", qps=1, queries=4000)
    assert mean_ms(found) == pytest.approx(5, rel=0.03)
    assert 1000 * np.quantile(found.latency, 0.99) == pytest.approx(5 * math.log(100), rel=0.05)
    # now and then a query is answered before its second copy begins, which is then dropped
    assert 1.98 * 4000 < found.tasks < 2 * 4000


def test_a_batch_waits_for_its_last_image() -> None:
    """The largest of ten exponential times: the harmonic number H10."""
    found = run(service=EXPONENTIAL, workers=10, qps=10, batch=10, queries=10_000)
    exact = 10 * sum(1 / i for i in range(1, 11))
    assert mean_ms(found) == pytest.approx(exact, rel=0.03)


def test_uniform_arrivals_do_not_wait() -> None:
    found = run(arrivals={"kind": "uniform", "qps": 99})
    assert 1000 * found.latency == pytest.approx(10, abs=1e-6)


@pytest.mark.parametrize(("probability", "share"), [(0.1, 1 - 0.9**4), (1.0, 1.0)])
def test_a_call_straggles_once_for_any_of_its_queries(probability: float, share: float) -> None:
    hold = {"kind": "hold", "probability": probability, "per_request": True, "delay": 100_000}
    given: dict[str, Any] = {"queries": 4000, "worker_batch": 4, "deadline_ms": 1e9}
    found = run(qps=1e6, max_pending=4000, stragglers=[hold], **given)
    late = found.latency > 100
    assert late.mean() == pytest.approx(share, abs=0.03)
    assert found.latency.max() < 150  # 40 s of computing at most, and one hold


# The code


def test_a_parity_answers_for_the_one_that_is_held() -> None:
    hold = {"kind": "hold", "probability": 0.2, "per_request": True, "delay": 100}
    arrivals = {"kind": "uniform", "qps": 4, "batch": 4}
    settings = {"workers": 5, "k": 4, "queries": 4000, "arrivals": arrivals, "stragglers": [hold]}
    bare = run(**settings)
    coded = run(**settings, policy="coded", encode=0.5, decode=1, front_end=2)
    hit = bare.latency > 0.1
    assert hit.mean() == pytest.approx(0.2, rel=0.1)
    assert 1000 * bare.latency[hit] == pytest.approx(110, abs=1e-6)
    # the same requests are hit; parity: 10 ms + 4 × 0.5, decoding 1, protocol 2
    assert (coded.decoded == hit).all()
    assert 1000 * coded.latency[hit] == pytest.approx(15, abs=1e-6)
    assert 1000 * coded.latency[~hit] == pytest.approx(12, abs=1e-6)
    assert coded.tasks == 5000
    assert coded.computing == pytest.approx(4000 * 0.010 + 1000 * 0.012)


# Stragglers


def test_a_blocked_worker_is_busy_and_a_held_answer_leaves_it_free() -> None:
    settings = {"arrivals": {"kind": "uniform", "qps": 40}, "queries": 2000}
    slow = run(**settings, stragglers=[{"kind": "slow", "delay": 10}])
    held = run(**settings, stragglers=[{"kind": "hold", "delay": 10}])
    assert slow.busy / slow.seconds == pytest.approx(0.8, abs=0.01)
    assert held.busy / held.seconds == pytest.approx(0.4, abs=0.01)
    assert slow.computing == held.computing
    assert slow.latency == pytest.approx(held.latency)


def test_bursts_slow_several_workers_for_a_while() -> None:
    burst = {"kind": "burst", "workers": 2, "factor": 4, "every_s": 1, "delay": 300}
    found = run(workers=4, qps=4, queries=5000, stragglers=[burst])
    late = 1000 * found.latency > 39
    # half of the workers for 0.3 s of every second; bursts may overlap the last one's end
    assert late.mean() == pytest.approx(0.5 * (1 - math.exp(-0.3)), rel=0.15)


def test_a_hung_worker_is_replaced_and_its_query_sent_again() -> None:
    hang = {"kind": "hang", "worker": 0, "from_s": 1.0, "until_s": 1.5}
    found = run(workers=2, qps=20, queries=400, hang_timeout_ms=500, restart=100, stragglers=[hang])
    assert found.replaced == 1
    assert not found.missing.any()
    # as long as the rules wait, then sent again elsewhere
    assert 1000 * found.latency.max() == pytest.approx(510, abs=10.1)


def test_a_crash_is_noticed_at_once() -> None:
    crash = {"kind": "crash", "probability": 0.01}
    found = run(workers=3, qps=20, queries=4000, stragglers=[crash])
    assert found.replaced > 10
    assert not found.missing.any()
    assert 1000 * found.latency.max() < 100


@pytest.mark.parametrize(("kind", "seed"), [("pareto", 13), ("exponential", 4)])
def test_copies_that_pay_on_average_go_on_after_some_that_did_not(kind: str, seed: int) -> None:
    """Times vary by 30 %, so most copies save nothing, and few save much."""
    given = {
        "service": {"distribution": "lognormal", "ms": 40.2, "shape": 0.3},
        "stragglers": [fault.model_dump() for fault in stragglers(kind, 42.0, 1)],
        "policy": "hedge",
    }
    found = run(**given, workers=11, qps=0.4 * 11 / 0.042, queries=20_000, seed=seed)
    assert np.quantile(found.latency, 0.999) < 5 * 0.042


def test_overload_refuses_and_ends() -> None:
    found = run(qps=200, queries=4000, max_pending=20)
    assert found.missing.mean() == pytest.approx(0.5, abs=0.05)
    assert np.isinf(found.latency[found.missing > 0]).all()
    assert found.busy / found.seconds == pytest.approx(1, abs=0.01)
    late = run(qps=200, queries=4000, deadline_ms=50)
    assert late.missing.sum() > 1000


def test_a_request_with_an_image_that_is_missing_has_no_answer() -> None:
    """As at the service: one error is the response to the whole request."""
    found = run(workers=4, qps=200, queries=4000, batch=10, deadline_ms=60)
    lost = found.missing > 0
    assert 0.05 < lost.mean() < 0.95
    assert set(found.missing) == {0, 10}
    assert np.isinf(found.latency[lost]).all()
    assert np.isfinite(found.latency[~lost]).all()


# Books

TROUBLE = [
    {"kind": "slow", "probability": 0.05, "delay": {"distribution": "pareto", "ms": 20}},
    {"kind": "hold", "probability": 0.1, "per_request": True, "delay": 50},
    {"kind": "hang", "probability": 0.002},
    {"kind": "crash", "probability": 0.002},
    {"kind": "burst", "workers": 3, "factor": 5, "every_s": 1, "delay": 200},
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", [1, 7])
def test_every_query_ends_once(policy: str, batch: int) -> None:
    simulation = Watched(
        scenario(
            policy=policy,
            workers=6,
            k=4,
            qps=300,
            batch=batch,
            queries=2800,
            hang_timeout_ms=300,
            deadline_ms=1000,
            max_pending=150,
            service=EXPONENTIAL,
            stragglers=TROUBLE,
        )
    )
    found = simulation.run()
    refused = int((found.missing == batch).sum()) * batch
    assert len(simulation.ended) == len(set(simulation.ended))
    assert 2800 - refused <= len(simulation.ended) <= 2800
    assert found.complete
    assert found.replaced > 0
    assert not simulation.schedulers[0].queries
    assert np.isinf(found.latency[found.missing > 0]).all()
    assert (found.latency[found.missing == 0] > 0).all()
    assert (found.decoded + found.missing <= batch).all()
    if policy != "auto":  # which decides whether there is a code
        assert POLICIES[policy].coded == bool(found.decoded.any())
    assert POLICIES[policy].hedged == (found.hedges > 0)


def busy_scenario(**changes: Any) -> Scenario:
    settings = {
        "policy": "coded+hedge",
        "workers": 6,
        "k": 4,
        "qps": 300,
        "service": EXPONENTIAL,
        "stragglers": TROUBLE,
        **changes,
    }
    return scenario(**settings)


def test_a_seed_repeats_a_run() -> None:
    one, again, other = (Simulation(busy_scenario(seed=seed)).run() for seed in (1, 1, 2))
    for name in ("latency", "decoded", "missing"):
        assert (getattr(one, name) == getattr(again, name)).all()
    assert (one.tasks, one.busy, one.hedges) == (again.tasks, again.busy, again.hedges)
    assert (one.latency != other.latency).any()


def test_a_hopeless_run_is_stopped() -> None:
    given = scenario(service=EXPONENTIAL, qps=80, queries=8000)
    stopped = Simulation(given, limit=(0.03, 20)).run()
    assert not stopped.complete
    assert stopped.seconds < 8000 / 80 / 4
    assert Simulation(given, limit=(10.0, 20)).run().complete
