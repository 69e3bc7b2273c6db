from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import reports, serve
from codedinvnet.bench import load
from codedinvnet.bench.load import Reply, descendants
from codedinvnet.data import sample_images
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import bundle_folder, load_bundle
from tests.benchmarks.replies import canned
from tests.conftest import Command
from tests.processes import needs_proc, survivors, wait_until

TINY = serve.Sizes(
    chaos_queries=120,
    overhead_queries=20,
    light_queries=60,
    straggler_requests=24,
    straggler_rounds=2,
    single_queries=30,
    soak_seconds=4.0,
    capacity_seconds=1.0,
    harm_seconds=0.2,
)


def bench(tmp_path: Path) -> serve.ServeBench:
    return serve.ServeBench(
        "mnist", load_bundle("mnist"), sample_images("mnist"), TINY, 0, tmp_path / "log"
    )


def reply(row: int, label: int, outcome: str, probabilities: np.ndarray) -> Reply:
    return Reply(
        f"q{row}",
        (row,),
        0.01 * (row + 1),
        200,
        f"q{row}",
        np.array([label]),
        (outcome,),
        probabilities[None],
    )


def test_a_folder_is_served_under_its_bundles_name(tmp_path: Path) -> None:
    """Asked for by another name, a service answers 404."""
    folder = tmp_path / "mine"
    shutil.copytree(bundle_folder("mnist"), folder)
    own = load_bundle(folder)
    found = serve.ServeBench(str(folder), own, sample_images("mnist"), TINY, 0, tmp_path / "log")
    assert (found.name, found.model) == (str(folder), "mnist")
    assert asyncio.run(found.overhead())["http_p50_ms"] > 0


def test_a_log_that_cannot_be_written_is_told_before_anything_is_served(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*log: .*file is no folder"):
        serve.run(
            "mnist", quick=True, data_dir=None, seed=0, log=tmp_path / "file" / "log", parts=()
        )


def test_help_names_all_parts(call_benchmarks: Command) -> None:
    told = " ".join(call_benchmarks("serve", "--help").out.split())
    assert all(part in told for part in serve.PARTS)


def test_pool_answers_in_milliseconds(tmp_path: Path) -> None:
    found = asyncio.run(bench(tmp_path).pool())
    assert 0 < found["pool_first_10_of_11_ms"] < 100  # 3 on an idle machine


def test_overhead_and_chaos(tmp_path: Path) -> None:
    parts = bench(tmp_path)
    overhead = asyncio.run(parts.overhead())
    assert overhead["http_p50_ms"] > 0 < overhead["forward_ms"]  # which is faster, load decides
    found = asyncio.run(parts.chaos())
    for figures in (found, found["least_loaded"]):
        assert (figures["queries"], figures["answered"], figures["errors"]) == (120, 120, 0)
        assert figures["killed"] > 0 < figures["stopped"]
        assert figures["direct"] + figures["decoded"] == 120
        assert figures["mismatched_ids"] == 0
        assert figures["direct_labels_differ"] == figures["direct_probabilities_differ"] == 0
    assert found["evaluated_recovered_accuracy"] > 0.9


def test_what_ends_the_harm_ends_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its promise would be that of a service that nobody harms."""

    async def state(_: Any) -> dict[str, Any]:
        raise RuntimeError("no state")

    monkeypatch.setattr(load.Client, "state", state)
    with pytest.raises(RuntimeError, match="no state"):
        asyncio.run(bench(tmp_path).chaos())


def test_harm_counts_the_processes_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, sent = 11, []

    def kill(pid: int, number: int) -> None:
        if pid == gone:
            raise ProcessLookupError
        sent.append((pid, number))

    class Client:
        turns = 0

        async def state(self) -> dict[str, Any]:
            self.turns += 1
            pids = [gone, None, 100 + self.turns]  # the chosen first is sometimes the one that left
            return {"workers": [{"pid": pid} for pid in pids]}

    monkeypatch.setattr(os, "kill", kill)
    parts, harm = bench(tmp_path), serve.Harm()
    parts.sizes = dataclasses.replace(TINY, harm_seconds=0.001)
    asyncio.run(parts._harm(Client(), harm, 0.005))  # type: ignore[arg-type]
    assert [pid for pid, number in sent if number == signal.SIGKILL] == harm.killed
    assert [pid for pid, number in sent if number == signal.SIGSTOP] == harm.stopped
    assert gone not in {*harm.killed, *harm.stopped}
    assert 2 <= len(sent) < 6  # four turns, two of them with a stop, some at one that is gone


def test_wrong_answers_are_found(tmp_path: Path) -> None:
    parts = bench(tmp_path)
    images = torch.from_numpy(parts.images[:6])
    right = parts.bundle.classify(parts.bundle.embed(images)).numpy()
    labels = right.argmax(1)
    wrong = right.copy()
    wrong[3, 0] += 2e-5
    replies = [reply(i, int(labels[i]), "direct", wrong[i]) for i in range(4)]
    replies.append(reply(4, (int(parts.labels[4]) + 1) % 10, "decoded", right[4]))
    replies.append(reply(5, int(parts.labels[5]), "guessed", right[5]))
    replies[0] = Reply(**{**vars(replies[0]), "returned": "another"})
    replies[1] = reply(1, (int(labels[1]) + 1) % 10, "direct", right[1])
    failed = Reply("q9", (9,), 0.5, 504, error="late")
    found = parts._checked([*replies, failed])
    assert (found["queries"], found["answered"], found["errors"]) == (7, 6, 1)
    assert (found["direct"], found["decoded"]) == (4, 2)
    assert found["mismatched_ids"] == 1
    assert found["direct_labels_differ"] == 1
    assert found["direct_probabilities_differ"] == 1
    assert found["decoded_accuracy"] == 0.5


def test_command(call_benchmarks: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "QUICK", TINY)
    out = tmp_path / "serve.json"
    log = tmp_path / "log"
    outcome = call_benchmarks(
        "serve", "--quick", "--part", "pool", "--json", "--out", out, "--log", log
    )
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert found == json.loads(out.read_text())
    assert found["bundle"] == "mnist"
    assert {"machine", "seed", "schema_version", "cores"} <= found.keys()
    assert set(found["parts"]) == {"pool"}
    reports.save({**found, "parts": {"soak": {}}, "soak_errors": 0}, out)
    merged = json.loads(out.read_text())
    assert set(merged["parts"]) == {"pool", "soak"}
    assert merged["pool_first_10_of_11_ms"] == found["pool_first_10_of_11_ms"]

    async def nothing(_: Any) -> dict[str, Any]:
        raise AssertionError("nothing is measured")

    monkeypatch.setattr(serve.ServeBench, "pool", nothing)
    words = ("--quick", "--part", "pool", "--out", out, "--log", log)
    outcome = call_benchmarks("serve", *words, "--seed", "1")
    assert outcome.code == 2
    assert f"{out} holds parts that were measured otherwise (seed 0 -> 1)" in outcome.err
    assert json.loads(out.read_text()) == merged


@pytest.mark.parametrize("key", ["weights", "cores", "device", "machine", "bundle", "quick"])
def test_reports_of_other_settings_are_not_mixed(tmp_path: Path, key: str) -> None:
    path = tmp_path / "serve.json"
    report = {**dict.fromkeys(reports.COMPARABLE, "this"), "parts": {"pool": {}}, "a": 1}
    reports.save(report, path)
    with pytest.raises(UserError, match=rf"serve.json holds .* \({key} 'this' -> 'that'\)"):
        reports.save({**report, key: "that", "parts": {"soak": {}}}, path)
    assert json.loads(path.read_text()) == report
    path.write_text(json.dumps({k: v for k, v in report.items() if k != key}))  # of an old version
    reports.save({**report, key: "that", "parts": {"soak": {}}}, path)
    assert set(json.loads(path.read_text())["parts"]) == {"pool", "soak"}


def test_a_log_is_no_report(tmp_path: Path, call_benchmarks: Command) -> None:
    both = tmp_path / "both.json"
    outcome = call_benchmarks("serve", "--quick", "--part", "pool", "--out", both, "--log", both)
    assert outcome.code == 2
    assert "both.json is where the report goes: name another file" in outcome.err
    assert not both.exists()


def test_a_part_that_is_measured_anew_leaves_nothing_of_before(tmp_path: Path) -> None:
    path = tmp_path / "serve.json"
    other = {"pool": reports.part_of_report({"c": 3}, "then")}
    reports.save({"c": 3, "parts": other}, path)
    for figures in ({"a": 1, "b": 2}, {"a": 4}):
        reports.save({**figures, "parts": {"soak": reports.part_of_report(figures, "now")}}, path)
    found = json.loads(path.read_text())
    assert {key: found.get(key) for key in "abc"} == {"a": 4, "b": None, "c": 3}
    assert set(found["parts"]) == {"pool", "soak"}


def test_the_committed_report_can_be_added_to() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "results" / "serve.json"
    old = json.loads(path.read_text())
    reports.check_mergeable({"weights": "abc", "device": "cpu", **old}, path)
    with pytest.raises(UserError, match="cores"):
        reports.check_mergeable({**old, "cores": 1000}, path)


@needs_proc
def test_a_terminated_benchmark_leaves_nothing_behind(tmp_path: Path) -> None:
    words = ("serve", "--quick", "--part", "soak", "--log", str(tmp_path / "log"))
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:  # the server, and its fork server, resource tracker and workers
        assert wait_until(lambda: len(descendants(process.pid)) > 5, timeout=60)
        started = descendants(process.pid)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert survivors(started) == []


def test_unknown_part(call_benchmarks: Command) -> None:
    outcome = call_benchmarks("serve", "--part", "nonsense")
    assert outcome.code == 2
    assert "nonsense" in outcome.err
    assert "chaos" in outcome.err


def test_a_light_load_is_compared_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, turns = bench(tmp_path), []

    async def capacity(size: int) -> float:
        assert size == 1
        return 100.0

    async def arm(options: tuple[str, ...], **more: Any) -> list[Reply]:
        turns.append(options[1])
        assert (more["rate"], more["count"], more["size"]) == (30.0, TINY.light_queries // 3, 1)
        return canned(0.03 if options[1] == "coded" else 0.02, more["count"])

    monkeypatch.setattr(parts, "_capacity", capacity)
    monkeypatch.setattr(parts, "_arm", arm)
    found = asyncio.run(parts.light())
    assert turns == ["uncoded", "coded"] * 3
    assert found["light_p50_ratio"] == pytest.approx(1.5)
    assert found["light_p50_ratio_spread"] == pytest.approx([1.5, 1.5])
    assert found["capacity_qps"] == 100.0


def test_stragglers_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = bench(tmp_path)
    turns: list[tuple[str, str]] = []

    async def capacity(size: int) -> float:
        return 20.0 if size == 10 else 100.0

    async def arm(options: tuple[str, ...], **more: Any) -> list[Reply]:
        fault = more["faults"] and more["faults"]["faults"][0]
        turns.append((options[1], fault["kind"] if fault else "none"))
        assert more["rate"] == (50.0 if more["size"] == 1 else 10.0)
        late = 0.1 if fault and options[1] == "uncoded" else 0.0
        return canned(0.02 + late, more["count"])

    monkeypatch.setattr(parts, "_capacity", capacity)
    monkeypatch.setattr(parts, "_arm", arm)
    found = asyncio.run(parts.stragglers())
    half = len(turns) // 2
    assert turns[:half] == turns[half:]  # two rounds of the same arms
    assert set(turns) == {("uncoded", "none"), *((p, "hold") for p in TINY.policies)}
    assert found["straggler_arms"]["held/coded"]["requests"] == TINY.straggler_requests
    assert found["p999_ratio_coded"] == pytest.approx(1.0)
    for kind in ("", "even_"):
        assert found[f"{kind}p999_ratio_uncoded"] == pytest.approx(6.0)
        low, high = found[f"{kind}p999_ratio_uncoded_95"]
        assert 3 < low <= high < 9

    turns.clear()
    found = asyncio.run(parts.variants())
    assert {kind for _, kind in turns} == {"slow", "hold"}
    assert found["variant_arms"]["single/hedge"]["requests"] == TINY.single_queries
    assert found["variant_arms"]["blocked/uncoded"]["p50_ms"] > 100
