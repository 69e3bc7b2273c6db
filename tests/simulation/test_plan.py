from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from codedinvnet.errors import UserError
from codedinvnet.evaluation.quantiles import percentile
from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.figures import summarise
from codedinvnet.simulation.plan import (
    STAGES,
    Candidate,
    Draws,
    Planner,
    Probe,
    Target,
    Verdict,
    candidates,
    check_target,
    fewest_workers,
    report,
    table,
)
from codedinvnet.simulation.scenario import Scenario
from tests.simulation.scenarios import ACCURACY, scenario

UNCODED = Candidate("uncoded", 10, 1)
BASE = scenario(
    workers=100, qps=400, queries=6000, service={"distribution": "exponential", "ms": 10}
)
EXPONENTIAL = {"distribution": "exponential", "ms": 120}
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
    backups = [
        c for c in candidates(ACCURACY, {"small-backup": (4, 2)}) if c.policy == "small-backup"
    ]
    assert [str(c) for c in backups] == ["small-backup, k = 2", "small-backup, k = 4"]
    assert [c.fewest for c in backups] == [3, 5]
    assert [c for c in found if c.policy == "coded+guess"] == []  # nor is that of guesses
    known = candidates(ACCURACY.model_copy(update={"guessed": 0.9}))
    assert [(c.k, c.r) for c in known if c.policy == "coded+guess"] == coded
    assert str(Candidate("coded", 4, 2)) == "coded, k = 4, r = 2"
    assert str(Candidate("hedge", 4, 1)) == "hedge, at most 25 % copies"
    (hedge,) = candidates(ACCURACY, policies=["hedge"], extra=0.05)
    assert str(hedge) == "hedge, at most 5 % copies"


def test_the_fewest_workers_are_those_that_counting_up_finds() -> None:
    """They meet the target with draws that chose them, and at once with draws that did not."""

    base = BASE.updated(qps=450)  # nearly what five workers can do

    def late(workers: int, seed: int) -> float:
        given = base.updated(workers=workers, queries=6000, seed=seed)
        records = Simulation(given).run()
        return 1000 * percentile(records.latency[int(0.05 * 6000) :], 0.999)

    for seed in range(2):
        planner = Planner(base.updated(seed=seed), ACCURACY, Target(p999_ms=82, accuracy=0.9))
        verdict = planner.judge(UNCODED)
        choosing, fresh = STAGES * seed + 1, STAGES * seed + 2
        fewest = next(n for n in range(5, 50) if late(n, choosing) <= 82)
        while late(fewest, fresh) > 82:
            fewest = next(n for n in range(fewest, 50) if late(n, fresh) <= 82)
            fresh += 1
        assert (verdict.workers, verdict.figures["seed"]) == (fewest, fresh)
        assert verdict.figures["p999_ms"] == pytest.approx(late(fewest, fresh), abs=1e-3)
        assert verdict.reason.split(",")[0] == "fewer miss the p99.9 target"


class Imagined(Planner):
    """A planner whose runs meet the target, by their seed, from so many workers on.

    Args:
        base: see `Planner`.
        enough: seed -> workers.
        figures: of every run, more than p99.9.
    """

    def __init__(self, base: Scenario, enough: Callable[[int], float], **figures: Any) -> None:
        super().__init__(base, ACCURACY, Target(p999_ms=60, accuracy=0.9))
        self.enough, self.figures = enough, figures
        self.asked: list[tuple[int, int]] = []

    def _probe(
        self, candidate: Candidate, workers: int, draws: Draws, *, to_the_end: bool = False
    ) -> Probe:
        self.asked.append((workers, draws.seed))
        met = workers >= self.enough(draws.seed)
        figures = {"p999_ms": 50.0 if met else 70.0, "p999_ms_95": None, **self.figures}
        return Probe("" if met else "p99.9", {**figures, "seed": draws.seed})


def test_a_number_that_may_miss_is_unsure() -> None:
    def verdict(interval: tuple[float, float] | None, queries: int) -> Verdict:
        base = BASE.updated(queries=queries)
        return Imagined(base, lambda _: 0, p999_ms_95=interval).judge(UNCODED)

    good = "the load and the stragglers allow no fewer"
    for interval, queries, doubt in (
        ((40.0, 60.0), 6000, ""),
        ((40.0, 60.5), 6000, ", unsure"),
        (None, 6000, ", unsure: the run is too short for an interval"),
        (None, 60_000, ", unsure: lost answers leave no interval"),
    ):
        found = verdict(interval, queries)
        assert (found.reason, found.unsure) == (good + doubt, bool(doubt))


@pytest.mark.parametrize("enough", [76, 77, 91, 100, 101, 103, 250])
def test_steps_of_several_workers_end_with_the_right_reason(enough: int) -> None:
    base = BASE.updated(qps=7550, workers=10_000)  # 76 workers do the work
    planner = Imagined(base, lambda _: enough)
    verdict = planner.judge(UNCODED)
    assert verdict.workers is not None
    assert enough <= verdict.workers <= 1.02 * enough + 1
    missed = verdict.reason.startswith("fewer miss the p99.9 target")
    assert missed == (min(workers for workers, _ in planner.asked) < enough)
    assert missed or verdict.reason.startswith("the load and the stragglers allow no fewer")


@pytest.mark.parametrize("chosen", [80, 100, 130, 390])
@pytest.mark.parametrize("judged", [80, 100, 130, 390])
def test_what_one_runs_draws_need_more_for_is_found_to_a_step(chosen: int, judged: int) -> None:
    """The search is lucky; the run that chooses needs more, or the one that judges does."""
    needed = {0: 78, 1: chosen, 2: judged}
    planner = Imagined(BASE.updated(qps=7550, workers=10_000), lambda seed: needed.get(seed, 76))
    verdict = planner.judge(UNCODED)
    assert verdict.workers is not None
    assert max(chosen, judged) <= verdict.workers <= 1.02 * max(chosen, judged) + 1
    seeds = [seed for workers, seed in planner.asked if workers == verdict.workers]
    last = verdict.figures["seed"]
    assert (seeds.count(last), last >= 2) == (1, True)  # it had no part in choosing the number
    assert last == 2 + (judged > chosen)
    assert len(planner.asked) < 35


def test_plans_of_neighbouring_seeds_share_no_draws() -> None:
    asked = []
    for seed in (0, 1, 2**31 - 1):
        planner = Imagined(BASE.updated(seed=seed), lambda _: 20)
        planner.judge(UNCODED)
        asked.append({seed for _, seed in planner.asked})
    assert asked[0].isdisjoint(asked[1])
    assert all(0 <= seed < 2**31 for seed in asked[2])


def test_what_misses_after_all_is_told_of_the_same_run() -> None:
    """The search was lucky with its draws, the choosing runs are not, whatever the workers."""
    planner = Imagined(BASE, lambda seed: math.inf if seed == BASE.seed + 1 else 0)
    verdict = planner.judge(UNCODED)
    assert (verdict.workers, verdict.figures["seed"]) == (None, BASE.seed + 1)
    assert verdict.reason.startswith("p99.9 is 70 ms with")
    assert len(planner.asked) < 12


def test_a_load_that_a_short_run_would_hide_is_planned_for() -> None:
    """Overload makes few requests late enough before the run ends."""
    base = scenario(
        workers=500,
        qps=5000,
        queries=12_000,
        service={"distribution": "lognormal", "ms": 24, "shape": 0.1},
        stragglers=[{"kind": "slow", "probability": 0.02, "delay": EXPONENTIAL}],
    )
    assert base.busy_workers == pytest.approx(5000 * (24.12 + 2.4) / 1000, rel=0.002)
    steps: list[str] = []
    target = Target(p999_ms=850, accuracy=0.9)
    verdict = Planner(base, ACCURACY, target, steps.append).judge(UNCODED)
    assert verdict.workers is not None
    assert min(int(words.split()[-2]) for words in steps) > base.busy_workers
    assert verdict.figures["utilisation"] < 1
    longer = base.updated(workers=verdict.workers, queries=60_000, seed=9)
    assert summarise(Simulation(longer).run(), longer)["p999_ms"] < 850
    given = base.updated(queries=6000)
    planner = Planner(given, ACCURACY, Target(p999_ms=3000, accuracy=0.9))
    probe = planner._probe(UNCODED, 128, Draws(6000, 0))  # the load keeps 133 busy
    assert probe.figures["p999_ms"] < 3000
    assert probe.lack == "requests seem to wait ever longer"
    assert planner._probe(UNCODED, 180, Draws(6000, 0)).lack == ""


def test_workers_of_several_slots_need_to_be_fewer() -> None:
    assert fewest_workers(scenario(workers=9, qps=750)) == 8
    assert fewest_workers(scenario(workers=9, qps=750, slots=4)) == 2


def test_what_no_number_of_workers_mends() -> None:
    base = scenario(workers=100, qps=200, queries=6000, stragglers=HELD)
    planner = Planner(base, ACCURACY, Target(p999_ms=60, accuracy=0.9))
    verdict = planner.judge(UNCODED)
    assert verdict.workers is None
    assert "p99.9 is 110 ms with 48 workers, the most tried" in verdict.reason
    assert planner.judge(Candidate("replicate", 10, 1)).workers is not None


def test_the_ranking_is_by_workers_then_by_work() -> None:
    base = scenario(workers=100, qps=400, batch=4, queries=6000, stragglers=HELD)
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


def test_sure_numbers_rank_before_unsure_ones_of_the_same_size() -> None:
    def sure(candidate: Candidate) -> Verdict:
        work = {"uncoded": 1.0, "hedge": 1.1, "replicate": 2.0}[candidate.policy]
        workers = 5 if candidate.policy != "replicate" else 4
        figures = {"work_per_query": work}
        return Verdict(candidate, workers, figures, "", candidate.policy == "uncoded")

    planner = Planner(BASE, ACCURACY, Target(60, 0.9))
    planner.judge = sure  # type: ignore[method-assign]
    ways = [UNCODED, Candidate("hedge", 10, 1), Candidate("replicate", 10, 1)]
    found = planner.rank(ways)
    assert [v.candidate.policy for v in found] == ["replicate", "hedge", "uncoded"]
    rows = report(found, BASE, planner.target)["ranking"]
    assert [row["unsure"] for row in rows] == [False, False, True]


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
    (line,) = table(report([hopeless], base, Target(60, 0.99)))[1:]
    assert line.split()[:8] == ["uncoded", *"------", "even"]


def test_a_parity_that_keeps_members_apart_makes_up_for_several_of_a_group() -> None:
    held = [{"kind": "hold", "probability": 0.3, "delay": 100}]
    base = scenario(workers=100, qps=200, queries=6000, stragglers=held)
    target, way = Target(p999_ms=60, accuracy=0.5), Candidate("coded", 10, 1)
    mean = Planner(base, ACCURACY, target).judge(way)
    kept = base.updated(bundle="cifar10")
    apart = Planner(kept, ACCURACY, target).judge(way)
    assert apart.figures["decoded_share"] > 1.5 * mean.figures["decoded_share"] > 0
    assert apart.figures["accuracy"] < mean.figures["accuracy"]
    uncoded = Planner(kept, ACCURACY, target).judge(UNCODED)
    assert uncoded.figures["decoded_share"] == 0


def test_a_small_backup_makes_up_for_several_at_no_cost_of_encoding() -> None:
    held = [{"kind": "hold", "probability": 0.3, "delay": 100}]
    base = scenario(workers=100, qps=200, queries=6000, stragglers=held, encode=5)
    base = base.updated(method_accuracy={"small-backup": {10: 0.5}})
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
    base = base.updated(method_accuracy={"small-backup": {10: 1.0}})
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
