from __future__ import annotations

import pytest

from codedinvnet.errors import UserError
from codedinvnet.quantiles import percentile
from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.plan import (
    Candidate,
    Planner,
    Probe,
    Target,
    candidates,
    check_target,
    report,
    table,
)
from tests.simulation.scenarios import ACCURACY, scenario

UNCODED = Candidate("uncoded", 10, 1)
BASE = scenario(
    workers=100, qps=400, queries=6000, service={"distribution": "exponential", "ms": 10}
)
HELD = [{"kind": "hold", "probability": 0.02, "per_request": True, "delay": 100}]


def test_every_policy_with_every_k_and_r_of_known_accuracy() -> None:
    found = candidates(ACCURACY)
    coded = [(c.k, c.r) for c in found if c.policy == "coded"]
    assert coded == [(2, 1), (4, 1), (10, 1), (4, 2)]
    assert [c.k for c in found if c.policy == "hedge"] == [2, 4, 10]
    assert [str(c) for c in found if c.policy in ("uncoded", "replicate")] == [
        "uncoded",
        "replicate",
    ]
    assert [c for c in found if c.policy == "small-backup"] == []  # its accuracy is not known
    backups = [c for c in candidates(ACCURACY, (4, 2)) if c.policy == "small-backup"]
    assert [str(c) for c in backups] == ["small-backup, k = 2", "small-backup, k = 4"]
    assert [c.fewest for c in backups] == [3, 5]
    assert [c for c in found if c.policy == "coded+guess"] == []  # nor is that of guesses
    known = candidates(ACCURACY.model_copy(update={"guessed": 0.9}))
    assert [(c.k, c.r) for c in known if c.policy == "coded+guess"] == coded
    assert str(Candidate("coded", 4, 2)) == "coded, k = 4, r = 2"
    assert str(Candidate("hedge", 4, 1)) == "hedge, at most 25 % copies"


def test_the_fewest_workers_are_those_that_counting_up_finds() -> None:
    """Those of a long run whose draws the search has not seen."""

    def late(workers: int, seed: int) -> float:
        given = BASE.updated(workers=workers, queries=6000, seed=seed)
        records = Simulation(given).run()
        return 1000 * percentile(records.latency[int(0.05 * 6000) :], 0.999)

    for seed in range(4):
        planner = Planner(BASE.updated(seed=seed), ACCURACY, Target(p999_ms=90, accuracy=0.9))
        verdict = planner.judge(UNCODED)
        fewest = next(n for n in range(4, 50) if late(n, seed + 1) <= 90)
        assert verdict.workers == fewest
        assert verdict.figures["p999_ms"] == pytest.approx(late(fewest, seed + 1), abs=1e-3)
        assert verdict.reason.split(",")[0] == "fewer miss the p99.9 target"


def test_a_number_that_may_miss_is_unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict(high: float) -> str:
        figures = {"p999_ms": 50.0, "p999_ms_95": (40.0, high), "accuracy": 1.0}
        planner = Planner(BASE, ACCURACY, Target(p999_ms=60, accuracy=0.9))
        monkeypatch.setattr(planner, "_probe", lambda *_, **__: Probe("", figures))
        return planner.judge(UNCODED).reason

    assert verdict(60.0) == "the load and the stragglers allow no fewer"
    assert verdict(60.5) == "the load and the stragglers allow no fewer, unsure"


@pytest.mark.parametrize("enough", [76, 77, 91, 100, 101, 103, 250])
def test_steps_of_several_workers_end_with_the_right_reason(
    enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BASE.updated(qps=7550, workers=10_000)  # 76 workers do the work
    figures = {"p999_ms": 50.0, "p999_ms_95": None, "accuracy": 1.0}
    asked: list[int] = []

    def probe(_: Candidate, workers: int, *__: int, **___: int) -> Probe:
        asked.append(workers)
        return Probe("" if workers >= enough else "p99.9", figures)

    planner = Planner(base, ACCURACY, Target(p999_ms=60, accuracy=0.9))
    monkeypatch.setattr(planner, "_probe", probe)
    verdict = planner.judge(UNCODED)
    assert verdict.workers is not None
    assert enough <= verdict.workers <= 1.02 * enough + 1
    missed = verdict.reason == "fewer miss the p99.9 target"
    assert missed == (min(asked) < enough)
    assert missed or verdict.reason == "the load and the stragglers allow no fewer"


def test_what_misses_after_all_is_told_of_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search was lucky with its draws, the confirming runs are not, whatever the workers."""
    planner = Planner(BASE, ACCURACY, Target(p999_ms=60, accuracy=0.9))
    asked: list[int] = []

    def probe(_: Candidate, workers: int, *__: int, **more: int) -> Probe:
        asked.append(workers)
        late = 70.0 if more.get("seed") == BASE.seed + 1 else 50.0
        figures = {"p999_ms": late, "p999_ms_95": None, "accuracy": 1.0}
        return Probe("p99.9" if late > 60 else "", figures)

    monkeypatch.setattr(planner, "_probe", probe)
    verdict = planner.judge(UNCODED)
    assert verdict.workers is None
    assert verdict.reason.startswith("p99.9 is 70 ms with")
    assert len(asked) < 12


def test_what_no_number_of_workers_mends() -> None:
    base = scenario(workers=100, qps=200, queries=6000, stragglers=HELD)
    planner = Planner(base, ACCURACY, Target(p999_ms=60, accuracy=0.9))
    verdict = planner.judge(UNCODED)
    assert verdict.workers is None
    assert "p99.9 is 110 ms with 32 workers, the most tried" in verdict.reason
    assert planner.judge(Candidate("replicate", 10, 1)).workers is not None


def test_the_ranking_is_by_workers_then_by_work() -> None:
    base = scenario(workers=100, qps=400, batch=4, queries=12_000, stragglers=HELD)
    steps: list[str] = []
    planner = Planner(base, ACCURACY, Target(p999_ms=60, accuracy=0.9), steps.append)
    ways = [UNCODED, Candidate("replicate", 10, 1), Candidate("coded", 4, 1)]
    found = planner.rank(ways)
    assert [v.candidate.policy for v in found] == ["coded", "replicate", "uncoded"]
    assert found[0].workers is not None
    assert found[1].workers is not None
    assert found[0].workers < found[1].workers
    assert len(steps) >= 8
    plan = report(found, base, planner.target)
    assert [row["workers"] for row in plan["ranking"]] == [v.workers for v in found]
    assert plan["ranking"][0]["method"] == "coded, k = 4, r = 1"
    lines = table(plan)
    assert lines[1].startswith("coded, k = 4, r = 1")
    assert lines[3].split()[:2] == ["uncoded", "-"]


def test_accuracy_rules_out_what_is_fast_enough() -> None:
    base = scenario(
        workers=100,
        qps=100,
        batch=10,
        queries=10_000,
        stragglers=[{"kind": "hold", "probability": 0.5, "per_request": True, "delay": 100}],
    )
    coded = Candidate("coded", 10, 1)
    share = 0.5 / 10  # of the answers is decoded
    exact = ACCURACY.normal - share * (ACCURACY.normal - ACCURACY.decoded(1, 10))
    lenient = Planner(base, ACCURACY, Target(60, exact - 0.001)).judge(coded)
    assert lenient.workers is not None
    strict = Planner(base, ACCURACY, Target(60, exact + 0.001)).judge(coded)
    assert strict.workers is None
    assert "accuracy is 0.97" in strict.reason
    hopeless = Planner(base, ACCURACY, Target(60, 0.99)).judge(UNCODED)
    assert hopeless.workers is None
    assert "even its best answers are right in 0.9800" in hopeless.reason


def test_a_parity_that_keeps_members_apart_makes_up_for_several_of_a_group() -> None:
    held = [{"kind": "hold", "probability": 0.3, "delay": 100}]
    base = scenario(workers=100, qps=200, queries=6000, stragglers=held)
    target, way = Target(p999_ms=60, accuracy=0.5), Candidate("coded", 10, 1)
    mean = Planner(base, ACCURACY, target).judge(way)
    kept = base.updated(apart=True)
    apart = Planner(kept, ACCURACY, target).judge(way)
    assert apart.figures["decoded_share"] > 1.5 * mean.figures["decoded_share"] > 0
    assert apart.figures["accuracy"] < mean.figures["accuracy"]
    uncoded = Planner(kept, ACCURACY, target).judge(UNCODED)
    assert uncoded.figures["decoded_share"] == 0


def test_a_small_backup_makes_up_for_several_at_no_cost_of_encoding() -> None:
    held = [{"kind": "hold", "probability": 0.3, "delay": 100}]
    base = scenario(workers=100, qps=200, queries=6000, stragglers=held, encode=5)
    base = base.updated(backup_accuracy={10: 0.5})
    planner = Planner(base, ACCURACY, Target(p999_ms=150, accuracy=0.5))
    backup = planner.judge(Candidate("small-backup", 10, 1)).figures
    coded = planner.judge(Candidate("coded", 10, 1)).figures
    assert backup["decoded_share"] > 1.5 * coded["decoded_share"] > 0
    assert backup["work_per_query"] < coded["work_per_query"]
    share = backup["decoded_share"]
    assert backup["accuracy"] == pytest.approx(0.98 - share * (0.98 - 0.5), abs=0.01)


def test_answers_that_are_better_than_direct_ones_count() -> None:
    held = [{"kind": "hold", "probability": 0.3, "delay": 100}]
    base = scenario(workers=100, qps=200, queries=6000, stragglers=held)
    base = base.updated(backup_accuracy={10: 1.0})
    planner = Planner(base, ACCURACY, Target(p999_ms=150, accuracy=0.981))
    backup = planner.judge(Candidate("small-backup", 10, 1))
    assert backup.workers is not None
    assert backup.figures["accuracy"] > 0.981 > ACCURACY.normal
    assert "even its best answers" in planner.judge(UNCODED).reason
    better = ACCURACY.model_copy(update={"recovered": {1: {10: 1.0}, 2: {10: 0.5}}})
    planner = Planner(base, better, Target(p999_ms=150, accuracy=0.981))
    assert "even its best answers" not in planner.judge(Candidate("coded", 10, 1)).reason
    assert "even its best answers" in planner.judge(Candidate("coded", 10, 2)).reason


def test_targets_that_mean_nothing() -> None:
    with pytest.raises(UserError, match="--p999-ms: must be above 0"):
        check_target(Target(0, 0.5))
    with pytest.raises(UserError, match=r"--min-accuracy: must lie in 0..1, got 97"):
        check_target(Target(100, 97))
