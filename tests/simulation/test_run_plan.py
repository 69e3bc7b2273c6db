"""`plan`, from the command line to what it prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from codedinvnet.models.bundle import load_bundle, weights_digest
from codedinvnet.rows import append_row
from codedinvnet.simulation import run
from codedinvnet.simulation.distributions import Distribution
from tests.conftest import Command
from tests.evaluation.canned import row
from tests.simulation.test_run import SCENARIO
from tests.simulation.test_run import file as file


def test_a_plan_for_more_than_can_be_tried_is_refused_at_once(call: Command) -> None:
    words = ("--p999-ms", "150", "--service-ms", "24", "--encode-ms", "1", "--policy", "hedge")
    for load in ("1e9", "1e300", "1e307"):
        outcome = call("plan", "mnist", "--qps", load, *words)
        assert outcome.code == 2
        assert "--qps: this load needs" in outcome.err
        assert "10,000 are the most tried" in outcome.err


def test_plan_prints_a_ranking(call: Command) -> None:
    words = ["plan", "mnist", "--qps", "100", "--p999-ms", "60", "--min-accuracy", "0.97"]
    times = ["--service-ms", "10", "--encode-ms", "0.1", "--stragglers", "held", "--batch", "4"]
    ways = ["--policy", "uncoded", "--policy", "coded", "--k", "4", "--queries", "6000"]
    outcome = call(*words, *times, *ways, "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    best, worst = report["ranking"]
    assert (best["method"], worst["method"]) == ("coded, k = 4, r = 1", "uncoded")
    assert best["workers"] >= 5
    assert best["figures"]["p999_ms"] <= 60
    assert worst["workers"] is None
    assert "p99.9 is 11" in worst["reason"]
    service = Distribution.model_validate(report["scenario"]["service"])
    assert service.distribution == "lognormal"
    assert service.mean_ms == pytest.approx(10)
    assert report["scenario"]["bundle"] == report["bundle"] == "mnist"
    assert report["cpu_seconds"] > 0
    lines = call(*words, *times, *ways).out.splitlines()
    assert lines[0].startswith("100 images a second, service 10.00 ms")
    bounds = best["figures"]["p999_ms_95"] or ()
    (told,) = (line for line in lines if line.startswith("coded, k = 4"))
    assert all(f" {bound:.1f} " in told for bound in bounds)
    assert report["not_ranked"] == {}


def test_plan_ranks_a_small_backup_whose_accuracy_is_known(
    tmp_path: Path, file: Path, call: Command
) -> None:
    rows, quick = tmp_path / "rows.jsonl", tmp_path / "quick.jsonl"
    weights = weights_digest("mnist")
    for number, backup in enumerate((0.97, 0.95)):
        append_row(rows, row("small-backup", backup, k=4, seed=number, weights=weights))
    append_row(rows, row("small-backup", 0.5, k=4, base="resnet", weights=weights))
    append_row(rows, row("coded-invnet", 0.9, k=4, weights=weights))
    append_row(rows, row("small-backup", 0.1, k=2, weights="another", dataset="fashion"))
    words = ["plan", "mnist", "--qps", "100", "--p999-ms", "200", "--scenario", file, "--k", "4"]
    words += ["--policy", "uncoded", "--policy", "small-backup", "--queries", "2000"]
    outcome = call(*words, "--accuracy-rows", rows, "--json")
    report = json.loads(outcome.out)
    ranked = {found["method"]: found for found in report["ranking"]}
    assert set(ranked) == {"uncoded", "small-backup, k = 4"}
    assert report["scenario"]["method_accuracy"]["small-backup"] == {"4": pytest.approx(0.96)}
    backup = ranked["small-backup, k = 4"]
    assert backup["workers"] >= 5
    assert 0.96 < backup["figures"]["accuracy"] < 1
    assert report["not_ranked"] == {}
    unknown = call(*words)
    assert "small-backup, k" not in unknown.out
    assert unknown.out.splitlines()[-1].startswith(
        "not ranked: small-backup, since it is not known"
    )
    for number in range(2):  # as trained by --quick, for seconds
        append_row(quick, row("small-backup", 0.9, k=4, seed=number, weights=weights, quick=True))
    outcome = call(*words, "--accuracy-rows", quick)
    assert outcome.code == 2
    assert "of the bundle 'mnist' that was measured in full (not by --quick)" in outcome.err
    rows.write_text("")
    outcome = call(*words, "--accuracy-rows", rows)
    assert outcome.code == 2
    assert "holds no method of the bundle 'mnist'" in outcome.err


def test_plan_tells_which_of_several_k_a_policy_lacks(file: Path, call: Command) -> None:
    words = ["plan", "mnist", "--qps", "50", "--p999-ms", "200", "--scenario", file, "--k", "4"]
    words += ["--k", "50", "--policy", "coded", "--policy", "hedge", "--queries", "1000", "--json"]
    report = json.loads(call(*words).out)
    assert list(report["not_ranked"]) == ["coded of k = 50"]
    assert report["not_ranked"]["coded of k = 50"].startswith("no accuracy is known of k = 50;")
    assert "coded, k = 4, r = 1" in {found["method"] for found in report["ranking"]}


def test_plan_needs_something_to_rank(tmp_path: Path, call: Command) -> None:
    path = tmp_path / "scenario.json"
    path.write_text(json.dumps({**SCENARIO, "accuracy": {"normal": 0.99}}))
    words = ["plan", "mnist", "--qps", "10", "--p999-ms", "60", "--scenario", path]
    outcome = call(*words, "--policy", "coded")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: not ranked: coded, since it is not known how often")
    assert outcome.err.count("\n") == 1
    outcome = call(*words, "--policy", "coded", "--policy", "uncoded", "--queries", "1000")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].startswith("not ranked: coded, since")


def test_plan_takes_a_scenario_and_times_the_bundle_without_one(file: Path) -> None:
    options = run.PlanOptions("mnist", 50, 100, 0.9, scenario=file)
    base = run._plan_base(options)
    assert base.service.mean_ms == 10
    assert base.arrivals.qps == 50
    assert base.stragglers == ()
    assert base.code is None
    file.write_text(json.dumps({**SCENARIO, "method": "small-backup"}))  # of which nothing is kept
    assert run._plan_base(options).method == "coded-invnet"
    assert base.encode.mean_ms > 0  # measured, since the scenario does not say it
    assert (base.trip.ms, base.front_end.ms, base.decode.ms) == (0.3, 1.7, 0.6)
    free = {"encode": 0, "trip": 0, "front_end": 0, "decode": 2}
    file.write_text(json.dumps({**SCENARIO, **free}))
    said = run._plan_base(options)
    assert [getattr(said, key).ms for key in free] == list(free.values())
    longer = run._plan_base(dataclasses.replace(options, service_ms=30, encode_ms=1))
    assert longer.service == Distribution(distribution="exponential", ms=30)
    assert longer.encode.ms == 1
    timed = run._plan_base(run.PlanOptions("mnist", 50, 100, 0.9))
    assert timed.service.distribution == "lognormal"
    assert 0.1 < timed.service.mean_ms < 1000
    assert 0 < timed.encode.mean_ms < timed.service.mean_ms
    assert timed.stragglers[0].kind == "slow"
    given = run.PlanOptions("mnist", 50, 100, 0.9, service_ms=10, encode_ms=1, batch=10)
    batches = run._plan_base(given)
    requests = batches.queries / batches.arrivals.batch
    assert requests == timed.queries == 53_000  # as sure of p99.9 as with single images
    few = dataclasses.replace(given, queries=2000)
    assert run._plan_base(few).queries == 2000
    silent = {key: value for key, value in SCENARIO.items() if key != "queries"}
    for raw, queries in ((SCENARIO, SCENARIO["queries"]), (silent, 530_000)):
        file.write_text(json.dumps(raw))
        scenario = dataclasses.replace(options, batch=10)
        assert run._plan_base(scenario).queries == queries


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--p999-ms", "0"], "--p999-ms: must be above 0"),
        (["--min-accuracy", "97"], "--min-accuracy: must lie in 0..1"),
        (["--policy", "prayer"], "--policy: 'prayer' is not one of"),
        (["--policy", "coded", "--k", "11"], "known of k = 11; of codes it is up to k = 10"),
        (["--policy", "coded", "--k", "1"], "no accuracy is known of k = 1"),
        (["--k", "0"], "--k: must be at least 1, got 0"),
        (["--p999-ms", "5001"], "--p999-ms: 5001 is beyond the deadline of 5000 ms"),
        (["--service-ms", "3001"], "and a worker that is at one for 3000 is replaced"),
        (["--deadline-ms", "1000", "--service-ms", "1001"], "raise --hang-timeout-ms"),
        (["--deadline-ms", "0"], "--deadline-ms: must be above 0, got 0"),
        (["--hang-timeout-ms", "nan"], "--hang-timeout-ms: must be above 0, got nan"),
        (["--stragglers", "sleepy"], "neither a file nor one of"),
        (["--qps", "-1"], "qps"),
        (["--service-ms", "1e308"], "not with a service of 1e+308 ms"),
        (
            ["--p999-ms", "14", "--deadline-ms", "15"],
            "--deadline-ms: group_timeout_ms (of a --scenario) must be below the deadline of 15 ms",
        ),
        (
            ["--policy", "hedge", "--p999-ms", "14", "--deadline-ms", "15", "--service-ms", "1001"],
            "raise --hang-timeout-ms",  # without a code there are no groups
        ),
        (["--batch", "-5"], "--batch: must be at least 1, got -5"),
        (["--queries", "0"], "--queries: must be at least 1, got 0"),
        (["--extra", "nan"], "--extra: must be at least 0, got nan"),
        (["--accuracy-rows", "rows.jsnl"], "--accuracy-rows: there is no file rows.jsnl"),
        (["--scenario", "FILE", "--service-ms", "-1"], "--service-ms: must be above 0"),
        (["--scenario", "FILE", "--encode-ms", "nan"], "--encode-ms: must be above 0"),
    ],
)
def test_plan_refuses_in_one_line(
    words: list[str], message: str, file: Path, call: Command
) -> None:
    words = [str(file) if word == "FILE" else word for word in words]
    good = ["mnist", "--qps", "10", "--p999-ms", "60", "--service-ms", "10", "--encode-ms", "1"]
    outcome = call("plan", *good, *words)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_plan_takes_a_k_between_those_measured_and_any_share_of_copies(call: Command) -> None:
    words = ["plan", "mnist", "--qps", "10", "--p999-ms", "300", "--queries", "1000"]
    words += ["--service-ms", "10", "--encode-ms", "1", "--stragglers", "none", "--json"]
    policies = ["--policy", "uncoded", "--policy", "hedge", "--policy", "coded"]
    for k, ranked in (("7", {"uncoded", "hedge", "coded"}), ("50", {"uncoded", "hedge"})):
        outcome = call(*words, *policies, "--k", k)
        assert outcome.code == 0, outcome.err
        report = json.loads(outcome.out)
        assert {row["policy"] for row in report["ranking"]} == ranked
        left = {"coded": f"no accuracy is known of k = {k}; of codes it is up to k = 10"}
        assert report["not_ranked"] == ({} if "coded" in ranked else left)
    assert call(*words, "--policy", "uncoded", "--k", "50").code == 0
    report = json.loads(call(*words, *policies, "--extra", "0.05").out)
    assert report["scenario"]["extra"] == 0.05
    assert [row["method"] for row in report["ranking"] if row["policy"] == "hedge"] == [
        "hedge, at most 5 % copies"
    ]


def test_plan_ranks_auto_with_a_method_at_hand_and_without_any(call: Command) -> None:
    words = ["plan", "mnist", "--qps", "10", "--p999-ms", "300", "--queries", "1000", "--json"]
    words += ["--service-ms", "10", "--encode-ms", "1", "--stragglers", "none"]
    policies = ["--policy", "auto+coded-invnet", "--policy", "auto+none", "--policy", "uncoded"]
    for more in ((), ("--extra", "0.05"), ("--max-disagreement", "0.01")):
        report = json.loads(call(*words, *policies, *more).out)
        workers = {row["method"]: row["workers"] for row in report["ranking"]}
        assert workers == {
            **{f"auto+coded-invnet, k = {k}, r = 1": k + 1 for k in (2, 4, 10)},
            **dict.fromkeys(("auto+none", "uncoded"), 1),
        }
        assert report["not_ranked"] == {}


def test_plan_ranks_no_code_that_the_bundle_has_not(file: Path, call: Command) -> None:
    guessed = {"normal": 0.99, "recovered": {"1": {"4": 0.9}}, "guessed": 0.8}
    file.write_text(json.dumps({**SCENARIO, "accuracy": guessed}))
    words = ["--qps", "10", "--p999-ms", "300", "--scenario", file, "--policy", "coded+guess"]
    outcome = call("plan", "cifar10", *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert "not ranked: coded+guess, since the code of cifar10 cannot guess" in outcome.err
    assert call("plan", "mnist", *words).code == 0


def test_plan_tells_whose_times_it_takes(file: Path, call: Command) -> None:
    words = ["--qps", "10", "--p999-ms", "300", "--scenario", file, "--policy", "uncoded", "--json"]
    for bundle in ("cifar10", "mnist"):
        report = json.loads(call("plan", bundle, *words).out)
        assert report["scenario"]["bundle"] == bundle
        told = f"{file} is of the bundle mnist: its times are taken for those of cifar10"
        assert [told in note for note in report["notes"]] == [True] * (bundle != "mnist")
    assert told in call("plan", "cifar10", *words[:-1]).out


def test_another_bundle_is_not_judged_by_the_scenarios_accuracy(
    tmp_path: Path, file: Path, call: Command
) -> None:
    words = ["--qps", "10", "--p999-ms", "300", "--scenario", file, "--json"]
    words += ["--policy", "uncoded", "--policy", "small-backup", "--k", "4", "--queries", "2000"]
    given = {"normal": 0.99, "recovered": {"1": {"4": 0.9}}}
    file.write_text(
        json.dumps({**SCENARIO, "accuracy": given, "method_accuracy": {"small-backup": {"4": 0.9}}})
    )
    own = json.loads(call("plan", "mnist", *words).out)
    assert {found["method"] for found in own["ranking"]} == {"uncoded", "small-backup, k = 4"}
    assert own["ranking"][0]["figures"]["accuracy"] == pytest.approx(0.99, abs=0.001)
    other = json.loads(call("plan", "cifar10", *words).out)
    (only,) = other["ranking"]
    normal = load_bundle("cifar10").info.figures["test_k4"]["normal_accuracy"]
    assert only["figures"]["accuracy"] == pytest.approx(normal, abs=0.001)
    assert "small-backup" in other["not_ranked"]
    rows = tmp_path / "rows.jsonl"
    append_row(
        rows,
        row("small-backup", 0.8, k=4, weights=weights_digest("cifar10"), dataset="cifar10"),
    )
    rated = json.loads(call("plan", "cifar10", *words, "--accuracy-rows", rows).out)
    assert rated["not_ranked"] == {}


def test_patience_can_be_had(call: Command) -> None:
    words = ["plan", "mnist", "--qps", "1", "--p999-ms", "5500", "--service-ms", "3500"]
    words += ["--encode-ms", "1", "--stragglers", "none", "--queries", "1000", "--json"]
    words += ["--policy", "uncoded", "--deadline-ms", "9000", "--hang-timeout-ms", "6000"]
    outcome = call(*words)
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["ranking"][0]["workers"] is not None
    assert report["scenario"]["hang_timeout_ms"] == 6000


def test_plan_knows_its_bundles(file: Path, call: Command) -> None:
    times = ("--service-ms", "10", "--encode-ms", "1")
    given = {"normal": 0.99, "recovered": {"1": {"4": 0.9}}}
    file.write_text(json.dumps({**SCENARIO, "accuracy": given}))
    for more in (times, ("--scenario", file)):
        outcome = call("plan", "nothing", "--qps", "10", "--p999-ms", "60", *more)
        assert (outcome.code, outcome.out) == (2, "")
        assert "no bundle 'nothing'" in outcome.err


def test_plan_says_what_it_takes_for_granted(file: Path, call: Command) -> None:
    words = ["plan", "mnist", "--p999-ms", "200", "--policy", "uncoded", "--queries", "1000"]
    times = ["--service-ms", "10", "--encode-ms", "1"]
    outcome = call(*words, *times, "--qps", "100")
    assert "trip 0.3 ms, front end 1.7 ms, p99.9 within 200 ms" in outcome.out
    assert "One front end" not in outcome.out
    outcome = call(*words, *times, "--qps", "1000")
    assert "One front end would be 170% busy" in outcome.out
    assert "take 3, each with" in outcome.out
    file.write_text(json.dumps({**SCENARIO, "max_pending": 20}))
    base = run._plan_base(run.PlanOptions("mnist", 50, 100, 0.9, scenario=file))
    assert base.max_pending is None


def test_plan_tells_of_what_is_rare_and_hits_few(call: Command) -> None:
    words = ["plan", "mnist", "--qps", "2000", "--p999-ms", "500", "--policy", "uncoded"]
    words += ["--service-ms", "24", "--encode-ms", "1", "--stragglers", "bursts"]
    report = json.loads(call(*words, "--queries", "2000", "--json").out)
    front_ends, few, short = sorted(report["notes"])
    assert short.startswith("The longest runs last 1.0 s, and the rarest event (burst) comes every")
    assert few.startswith(f"Stragglers are 3 of {report['ranking'][0]['workers']} workers")
    assert front_ends.startswith("One front end would be 340% busy")
    assert report["front_ends"] == {"busy": 3.4, "needed": 5}


def test_what_is_rare_is_so_by_the_workers_that_were_found(call: Command) -> None:
    words = ["plan", "mnist", "--qps", "200", "--p999-ms", "45", "--policy", "uncoded"]
    words += ["--service-ms", "24", "--encode-ms", "1", "--stragglers", "hung"]
    report = json.loads(call(*words, "--queries", "2000", "--json").out)
    workers = report["ranking"][0]["workers"]
    assert workers > 6  # the load needs five
    assert any(f"(hang) comes every {workers / 0.2:.4g} s" in note for note in report["notes"])


def test_plan_ranks_a_policy_once(file: Path, call: Command) -> None:
    raw = {**SCENARIO, "accuracy": {"normal": 0.99}}
    file.write_text(json.dumps(raw))
    words = ["plan", "mnist", "--qps", "10", "--p999-ms", "200", "--scenario", file]
    words += ["--policy", "hedge", "--policy", "hedge", "--k", "10", "--queries", "1000"]
    outcome = call(*words, "--json")
    assert outcome.code == 0, outcome.err
    assert [row["policy"] for row in json.loads(outcome.out)["ranking"]] == ["hedge"]


def test_the_network_is_timed_with_a_workers_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def report(*_: Any) -> dict[str, float]:
        seen.append(torch.get_num_threads())
        return {"embedding_ms": 2.0, "encoder_ms_k10": 5.0}

    monkeypatch.setattr(run, "info_report", report)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert run.measured_times("mnist") == (2.0, 0.5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]
