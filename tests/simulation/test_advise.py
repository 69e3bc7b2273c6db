"""Advice by what a service has seen: predictions against runs that had no part in them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from codedinvnet.codes.registry import METHODS, OURS
from codedinvnet.codes.rules import as_json, from_json
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import load_bundle
from codedinvnet.scheduler.settings import POLICIES
from codedinvnet.serving.opening import known_of
from codedinvnet.simulation import advise as module
from codedinvnet.simulation.advise import AdviseOptions, advise, chosen, lines
from codedinvnet.simulation.arrivals import Arrivals
from codedinvnet.simulation.figures import simulate, summarise
from codedinvnet.simulation.recorded import Took, told_apart
from codedinvnet.simulation.scenario import Scenario, parse_scenario
from codedinvnet.simulation.stragglers import stragglers
from tests.simulation.recording import traffic

QUERIES, WORKERS, K, SERVICE = 6000, 11, 10, 42.0
URL = "http://127.0.0.1:8000"
OPTIONS = AdviseOptions(URL, queries=QUERIES)


RULES = {
    **{"workers": 11, "slots": 1, "k": 10, "max_pending": 2000},
    **{"group_timeout_ms": 20, "hang_timeout_ms": 3000, "deadline_ms": 5000},
    **{"hedge_share": 0.1, "extra": None},
}


def served(policy: str, model: str, seed: int, batch: int = 1) -> Scenario:
    raw = {
        "seed": seed,
        "queries": QUERIES,
        "warmup": 0.0,
        "arrivals": {"qps": 0.4 * 1000 * WORKERS / SERVICE, "batch": batch},
        "workers": WORKERS,
        "k": K,
        "policy": policy,
        "service": {"distribution": "lognormal", "ms": SERVICE, "shape": 0.1},
        "encode": 1.0,
        "group_timeout_ms": 50,
        "accuracy": {"normal": 0.99, "recovered": {1: {K: 0.9}}},
        "stragglers": [s.model_dump() for s in stragglers(model, SERVICE, batch)],
    }
    return parse_scenario(raw, "test")


def row(report: dict[str, Any], policy: str) -> dict[str, Any]:
    (found,) = (row for row in report["simulated"] if row["policy"] == policy)
    return dict(found)


@pytest.mark.parametrize(
    ("model", "now", "other", "queries"),
    [
        ("none", "uncoded", "coded", QUERIES),
        ("slower", "hedge", "coded", QUERIES),
    ],
)
def test_another_policy_is_predicted(model: str, now: str, other: str, queries: int) -> None:
    check_prediction(model, now, other, queries)


def check_prediction(model: str, now: str, other: str, queries: int) -> None:
    """Both policies' figures must be what runs of theirs come to; more of it is tried at night."""
    seen = served(now, model, 5).updated(queries=queries)
    report = advise(traffic(seen, offered=(now, other)), AdviseOptions(URL, queries=queries))
    for policy in (now, other):
        true = simulate(served(policy, model, 77).updated(queries=queries))
        found = row(report, policy)
        assert found["p99_ms"] == pytest.approx(true["p99_ms"], rel=0.15)
        assert found["p50_ms"] == pytest.approx(true["p50_ms"], rel=0.05)
        assert found["work"] == pytest.approx(true["work_per_query"], rel=0.02)


def test_a_slow_worker_that_is_avoided_is_simulated() -> None:
    """What it did lies before all that is remembered of the others, or before --seconds."""
    seen = traffic(served("hedge", "slower", 5), offered=("hedge",))
    slow = [task for task in seen["tasks"] if task[1] == 0 and not task[2]][:5]
    others = [task for task in seen["tasks"] if task[1] != 0]
    for changes, seconds in (
        ({"tasks": others, "earlier": slow}, None),
        ({"tasks": slow + others}, seen["seconds"] - 3),
    ):
        report = advise({**seen, **changes}, replace(OPTIONS, seconds=seconds))
        (factor,) = report["stragglers"]
        assert (factor["kind"], factor["worker"]) == ("factor", 0)
        assert factor["factor"] == pytest.approx(3, rel=0.1)
    assert advise({**seen, "tasks": others}, OPTIONS)["stragglers"] == []


def test_losses_from_before_what_is_remembered_are_no_stragglers() -> None:
    seen = traffic(served("uncoded", "none", 5), offered=("uncoded",))
    begin = min(at for at, *_ in seen["tasks"])
    old = [(begin - 1000 * (i + 1), i % WORKERS, "died", 300.0) for i in range(200)]
    assert advise({**seen, "losses": old}, OPTIONS)["stragglers"] == []
    new = [(begin + 1, 3, "died", 300.0), (begin + 2, 4, "hung", 300.0)]
    found = advise({**seen, "losses": [*old, *new]}, OPTIONS)["stragglers"]
    assert {straggler["kind"]: straggler["probability"] for straggler in found} == {
        "crash": pytest.approx(1 / QUERIES, rel=0.01),
        "hang": pytest.approx(1 / QUERIES, rel=0.01),
    }


def test_of_requests_at_one_time_one_may_have_no_answer() -> None:
    seen = traffic(served("uncoded", "none", 5), offered=("uncoded",))
    at, *_ = seen["requests"][0]
    twins = [(at, 1, latency, 0.0, 0) for latency in (40.0, None)]
    report = advise({**seen, "requests": [*twins, *seen["requests"]]}, OPTIONS)
    assert row(report, "uncoded")["p50_ms"] > SERVICE / 2


def test_requests_that_were_refused_or_cancelled_are_told_of() -> None:
    seen = traffic(served("uncoded", "none", 5), offered=("uncoded",))
    times = [at for at, *_ in seen["requests"]]
    lost = [(at, "refused" if i % 3 else "cancelled") for i, at in enumerate(times[::2])]
    (note,) = advise({**seen, "unserved": lost}, OPTIONS)["notes"]
    assert "2000 of 9000 requests were refused, and 1000 were cancelled" in note
    late = times[QUERIES // 2]
    early = [row for row in lost if row[0] < late]
    lately = replace(OPTIONS, seconds=seen["seconds"] - late / 1000)
    for few, options in ((early, lately), (lost[:50], OPTIONS)):
        assert advise({**seen, "unserved": few}, options)["notes"] == []


def test_bursts_are_told_from_single_delays() -> None:
    found = {}
    for model in ("bursts", "exponential"):
        seen = traffic(served("hedge", model, 5, 10), offered=("uncoded",))
        found[model] = [s["kind"] for s in advise(seen, OPTIONS)["stragglers"]]
    assert "burst" in found["bursts"]
    assert found["exponential"] == ["slow"]


def test_an_episode_ends_where_tasks_are_as_usual_again() -> None:
    plain = [Took(100.0 * i, 40.0) for i in range(300)]
    slow = [Took(t.at, 200.0) if 100 <= i < 106 else t for i, t in enumerate(plain)]
    late = [Took(t.at, 200.0) if i in (40, 200) else t for i, t in enumerate(plain)]
    episodes, rest = told_apart({0: plain, 1: slow, 2: late})
    assert [(e.worker, e.begin, e.end, e.factor) for e in episodes] == [(1, 10000, 10700, 5.0)]
    assert [len(row) for row in rest.values()] == [300, 294, 300]


def test_what_to_switch_to_and_how() -> None:
    seen = traffic(served("uncoded", "exponential", 5), offered=("uncoded", "hedge", "coded"))
    report = advise(seen, OPTIONS)
    lowest = min(report["simulated"], key=lambda found: found["p99_ms"])
    best = row(report, report["advice"])
    assert best["p99_ms"] <= 1.05 * lowest["p99_ms"] < row(report, "uncoded")["p99_ms"]
    told = "\n".join(lines(report, OPTIONS))
    assert f"codedinvnet policy {URL} {report['advice']}" in told
    assert json.loads(json.dumps(report))["measured"]["requests"] == QUERIES
    stay = traffic(served("hedge", "none", 5), offered=("uncoded", "hedge"))
    assert advise(stay, OPTIONS)["advice"] == "hedge"


def test_a_policy_under_which_requests_wait_ever_longer_is_not_advised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drifting = {"hedge"}

    def drifts(records: Any, given: Scenario) -> dict[str, Any]:
        return {**summarise(records, given), "drifting": given.policy in drifting}

    monkeypatch.setattr(module, "summarise", drifts)
    seen = traffic(served("uncoded", "exponential", 5), offered=("uncoded", "hedge"))
    report = advise(seen, OPTIONS)
    assert [found["drifting"] for found in report["simulated"]] == [False, True]
    assert report["advice"] == "uncoded"
    assert any("ever longer under hedge" in note for note in report["notes"])
    drifting.add("uncoded")
    report = advise(seen, OPTIONS)
    assert report["advice"] is None
    assert lines(report, OPTIONS)[-1].startswith("No policy has a p99")


def test_of_policies_as_late_as_each_other_those_that_lose_more_are_left() -> None:
    def found(policy: str, lost: tuple[float, float, float], work: float) -> dict[str, Any]:
        share, *interval = lost
        told = {"policy": policy, "p99_ms": 100.0, "work": work, "drifting": False}
        return {**told, "missing_share": share, "missing_share_95": interval}

    none, chance, many = (0.0, 0.0, 1e-4), (1e-4, 0.0, 3e-4), (0.008, 0.007, 0.009)
    rows = [found("uncoded", many, 1.0), found("hedge", chance, 1.01), found("coded", none, 1.1)]
    for now in ("uncoded", "hedge"):
        best = chosen(rows, now, "p99")
        assert best is not None
        assert best["policy"] == "hedge"
    told: dict[str, Any] = {"notes": [], "right_by": None, "not_simulated": {}, "measured": {}}
    switch = {**told, "policy": "uncoded", "simulated": rows, "advice": "hedge"}
    assert "0.80%" in "\n".join(lines(switch, OPTIONS))  # the one reason to leave it
    alone = chosen([{**rows[0], "missing_share_95": None}], "hedge", "p99")
    assert alone is not None


def test_answers_that_are_made_up_cost_accuracy() -> None:
    report = advise(traffic(served("coded", "exponential", 5), offered=("hedge", "coded")), OPTIONS)
    hedge, coded = row(report, "hedge"), row(report, "coded")
    assert hedge["right"] == 0.99
    assert 0.99 - 0.09 * coded["made_up_share"] <= coded["right"] < 0.99


def test_the_budget_is_the_services_own_or_another_that_is_asked_for() -> None:
    seen = traffic(served("uncoded", "exponential", 5), offered=("uncoded", "hedge"))
    seen["rules"]["extra"] = 0.01
    report = advise(seen, OPTIONS)
    assert 1 < row(report, "hedge")["work"] < 1.015
    assert report["notes"] == []
    more = advise(seen, replace(OPTIONS, extra=0.1))
    assert row(more, "hedge")["work"] > 1.015
    (note,) = more["notes"]
    assert "--extra 0.1" in note
    seen["rules"]["upstream_hang_timeout_ms"] = 3000.0
    assert advise(seen, OPTIONS)["advice"] == report["advice"]
    with pytest.raises(UserError, match="--extra: a gateway has none"):
        advise(seen, replace(OPTIONS, extra=0.1))


def test_advice_needs_no_word_of_what_encoding_takes() -> None:
    seen = traffic(served("coded", "none", 5), offered=("uncoded", "coded"), encode_share=None)
    found = [found["policy"] for found in advise(seen, OPTIONS)["simulated"]]
    assert found == ["uncoded", "coded"]


def test_copies_are_as_many_as_the_service_sends_where_it_has_no_code() -> None:
    seen = traffic(served("uncoded", "exponential", 5), offered=("uncoded", "hedge"), code=None)
    seen["rules"] |= {"k": 1, "hedge_share": 0.01}
    assert 1 < row(advise(seen, OPTIONS), "hedge")["work"] < 1.015


@pytest.mark.parametrize(("workers", "model"), [(4, "none"), (11, "pareto")])
def test_without_a_code_auto_is_simulated_without_one(workers: int, model: str) -> None:
    given = served("uncoded", model, 5).updated(k=2, workers=workers, qps=9 * workers)
    seen = traffic(given, code=None, method=None, offered=("hedge", "auto"))
    seen["rules"]["k"] = 1
    seen["rules"]["hedge_share"] = 0.1
    report = advise(seen, OPTIONS)
    assert [found["policy"] for found in report["simulated"]] == ["hedge", "auto"]
    assert row(report, "auto")["made_up_share"] == 0


def test_a_policy_that_cannot_be_simulated_is_named_and_the_others_are_told() -> None:
    given = served("uncoded", "exponential", 5).updated(k=2, workers=4, qps=36)
    code = as_json(METHODS["small-backup"].rules(K))
    right = {"by": "labels", "normal": 0.99, "made_up": {str(K): 0.9}}
    offered = ("hedge", "coded", "auto")
    seen = traffic(given, code=code, method="small-backup", right=right, offered=offered)
    seen["rules"]["k"] = K
    report = advise(seen, OPTIONS)
    assert [found["policy"] for found in report["simulated"]] == ["hedge", "auto"]
    assert row(report, "auto")["made_up_share"] > 0
    assert "needs 11" in report["not_simulated"]["coded"]
    seen["right"] = {**right, "made_up": {"2": 0.9}}
    report = advise(seen, OPTIONS)
    assert [found["policy"] for found in report["simulated"]] == ["hedge"]
    assert "no accuracy is known" in report["not_simulated"]["auto"]


def test_policies_are_not_compared_with_one_of_now_that_cannot_be_simulated() -> None:
    right = {"by": "labels", "normal": 0.99, "made_up": {"2": 0.9}}
    seen = traffic(served("coded", "exponential", 5), offered=("uncoded", "hedge", "coded"))
    seen["right"] = right
    for options, notes in ((OPTIONS, 1), (replace(OPTIONS, extra=0.1), 2)):
        report = advise(seen, options)
        assert [found["policy"] for found in report["simulated"]] == ["uncoded", "hedge"]
        assert report["advice"] is None
        assert report["not_simulated"]["coded"] in report["notes"][0]
        assert len(report["notes"]) == notes
        assert "codedinvnet policy" not in "\n".join(lines(report, options))
    report = advise({**seen, "offered": ("hedge",)}, OPTIONS)
    assert (report["advice"], len(report["notes"])) == (None, 1)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_a_bundles_code_is_simulated_at_sizes_that_were_not_measured(k: int) -> None:
    bundle = load_bundle("mnist")
    known = known_of(bundle, OURS, k)
    made_up = {str(size): share for size, share in known.made_up.items()}
    right = {"by": "labels", "normal": known.normal, "made_up": made_up}
    offered = ("uncoded", "coded", "coded+hedge", "auto")
    seen = traffic(served("coded", "exponential", 5).updated(k=k), offered=offered, right=right)
    report = advise(seen, AdviseOptions(URL, queries=2000))
    assert [found["policy"] for found in report["simulated"]] == list(offered)
    least = bundle.info.figures["test_k10"]["recovered_accuracy"]
    assert known.normal is not None
    assert least < row(report, "coded")["right"] < known.normal


def test_a_simulation_that_does_not_fit_says_so() -> None:
    seen = traffic(served("uncoded", "none", 5), offered=("uncoded",))
    assert advise(seen, OPTIONS)["notes"] == []
    slower = [(at, n, 2 * late, b, m) for at, n, late, b, m in seen["requests"]]
    (note,) = advise({**seen, "requests": slower}, OPTIONS)["notes"]
    assert "measured" in note


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kind": "other"}, "no answer of GET /traffic"),
        ({"schema_version": 0}, "another release"),
        ({"policy": 7}, "policy"),
        ({"code": {"kind": "Magic"}}, "another release"),
        ({"requests": []}, "0 requests are too few"),
        ({"tasks": []}, "0 tasks are too few"),
        ({"rules": {**RULES, "worker_batch": 2}}, "no advice with --worker-batch 2"),
        ({"rules": {**RULES, "backups": 1}}, "no advice where a small backup has workers"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], told: str) -> None:
    seen = traffic(served("uncoded", "none", 5))
    with pytest.raises(UserError, match=told):
        advise({**seen, **changes}, OPTIONS)
    others: list[Any] = [None, [], "text", {}]
    for wrong in others:
        with pytest.raises(UserError, match="no answer of GET /traffic"):
            advise(wrong, OPTIONS)


def test_policies_that_cannot_be_simulated_are_named() -> None:
    seen = traffic(served("uncoded", "none", 5), code=None, offered=("uncoded", "coded", "other"))
    report = advise(seen, OPTIONS)
    assert [found["policy"] for found in report["simulated"]] == ["uncoded"]
    assert set(report["not_simulated"]) == {"coded", "other"}


def test_every_code_is_the_same_after_a_trip() -> None:
    for method in METHODS.values():
        rules = method.rules(4)
        raw = as_json(rules)
        assert raw is not None, method.name
        found = from_json(json.loads(json.dumps(raw)))
        sizes = (4,) if rules.fixed_size else range(1, 5)
        for size in sizes:
            assert found.tasks(size) == rules.tasks(size)
        for available in ((0, 1, 2), (0, 1, 4), (4,), ()):
            tasks = frozenset(available) & set(rules.tasks(4))
            assert found.recoverable(tasks, 4) == rules.recoverable(tasks, 4)
        assert found.guesses == rules.guesses


@pytest.mark.parametrize(("count", "share"), [(200, 0.97), (2000, 0.99)])
def test_recorded_arrivals_come_in_stretches(count: int, share: float) -> None:
    """So long that a rush is not torn apart."""
    gaps, sizes = [float(i + 1) for i in range(count)], [i + 1 for i in range(count)]
    raw = {"kind": "recorded", "qps": 1000, "gaps_ms": gaps, "sizes": sizes}
    times, images = Arrivals.model_validate(raw).draw(np.random.default_rng(0), 1000)
    assert (np.diff(times) * 1000).round(6).tolist() == images[1:].tolist()
    following = np.diff(images)
    assert ((following == 1) | (following == 1 - count)).mean() > share
    for wrong in ({"sizes": ()}, {"kind": "poisson"}):
        with pytest.raises(ValueError, match="recorded"):
            Arrivals.model_validate({**raw, **wrong})


def test_policies_are_those_of_this_release() -> None:
    offered = tuple(POLICIES)
    seen = traffic(served("uncoded", "none", 5), offered=offered)
    names = [
        found["policy"] for found in advise(seen, AdviseOptions(URL, queries=2000))["simulated"]
    ]
    assert names == list(offered)
