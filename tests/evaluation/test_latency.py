from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.validation import arms_of, scenarios_of
from codedinvnet.codes.registry import METHODS
from codedinvnet.config import EncoderSettings
from codedinvnet.engines import ENGINES, ONNX_RUNTIME
from codedinvnet.errors import UserError
from codedinvnet.evaluation import latency
from codedinvnet.evaluation.client import Reply
from codedinvnet.evaluation.cost import encoder_share
from codedinvnet.evaluation.latency_grid import Arm, arms, load_latency_grid
from codedinvnet.evaluation.quantiles import Histogram
from codedinvnet.evaluation.service import ParityWait, latency_figures
from codedinvnet.files import file_digest
from codedinvnet.models.coded import build_encoder, with_encoder
from codedinvnet.rows import newest, read_rows
from codedinvnet.simulation.scenario import load_scenario
from tests.conftest import Command
from tests.evaluation.grids import PAPER, PART

ROOT = Path(__file__).resolve().parents[2]
REAL = ["coded", "small-backup"]
RUNS = 2


def write_grid(folder: Path, bundle: Path, methods: list[str], /, **changes: Any) -> Path:
    """Write a grid of a second's runs, and beside it the one that trains the backup."""
    data: dict[str, Any] = {"bundle": str(bundle), "paper": PAPER}
    data |= {kind: PART for kind in ("classifier", "backup", "parity")}
    parts = {"name": "tiny", "datasets": {"mnist": data}, "blocks": [{"methods": ["none"]}]}
    (folder / "parts.json").write_text(json.dumps(parts))
    block = {"batches": [4], "loads": [0.3], "stragglers": ["held"], "methods": methods}
    grid = {
        "name": "tiny",
        "bundle": str(bundle),
        "k": 4,
        "workers": 5,
        "wait_ms": 10,
        "service_ms": 12,
        "queries": 80,
        "runs": 1,
        "parts": "parts.json",
        "blocks": [block],
        **changes,
    }
    path = folder / "grid.json"
    path.write_text(json.dumps(grid))
    return path


def run(grid: Path, folder: Path, data_dir: Path, **more: Any) -> dict[str, Any]:
    return latency.run(
        grid,
        out=folder / "rows.jsonl",
        save_dir=folder / "runs",
        data_dir=data_dir,
        log=folder / "log",
        **more,
    )


@pytest.fixture(scope="module")
def finished(
    bundle_folder: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two methods on the real service, done."""
    folder = tmp_path_factory.mktemp("latency")
    grid = write_grid(folder, bundle_folder, REAL)
    counts = run(grid, folder, data_dir)
    assert counts == {"runs": RUNS, "kept": 0, "done": RUNS, "failed": 0}
    return folder, grid


def test_a_row_tells_what_was_served_and_what_came_out(finished: tuple[Path, Path]) -> None:
    rows = {row["label"]: row for row in read_rows(finished[0] / "rows.jsonl")}
    assert list(rows) == REAL
    for row in rows.values():
        for field in ("commit", "machine", "seed", "seconds", "settings", "began", "cores"):
            assert row[field] not in (None, ""), field
        assert row["error"] is None
        assert (row["requests"], row["queries"], row["errors"]) == (20, 80, 0)
        assert row["qps"] == pytest.approx(0.3 * 5000 / 12, abs=1e-3)
        assert row["p50_ms"] >= 10  # nobody is faster than the wait
        assert row["mean_service_ms"] > 10
        assert 0.5 < row["accuracy"] <= 1  # a tiny bundle
        assert Histogram.of_row(row).total == 20
        (fault,) = row["stragglers"]
        assert (fault["kind"], fault["per_request"], fault["probability"]) == ("hold", True, 0.04)
        assert row["apart"] is False
        if sys.platform == "linux":
            assert 0 < row["processors_own"] < 1
            assert 0 < row["front_ms_per_query"] < 1000 * row["seconds"] / row["queries"]
            assert 0 < row["processors_busy"] <= 1
    # Where others compute, too, a group may be answered before its backup task is sent.
    sent = 80 * rows["small-backup"]["extra_tasks_per_query"]
    assert sent == pytest.approx(round(sent), abs=0.01)
    assert 1 <= sent <= 20  # of twenty groups
    assert 1 < rows["small-backup"]["work_per_query"] < 1.6
    # Its E is dear for so small an f: some groups are answered before their parity is sent.
    assert 0 < rows["coded"]["extra_tasks_per_query"] <= 0.25
    # A quarter of a data task's wait an image.
    assert rows["small-backup"]["settings"]["parity_wait_ms"] == [0, 2.5]
    task, image = rows["coded"]["settings"]["parity_wait_ms"]
    assert task == 10
    assert image > 1
    waits = (task + 4 * image) / rows["coded"]["mean_service_ms"]
    work = 1 + rows["coded"]["extra_tasks_per_query"] * waits
    assert work < rows["coded"]["work_per_query"] < 1.1 * work
    assert rows["small-backup"]["backup"]
    assert rows["small-backup"]["policy"] == "coded"


def test_rows_are_what_the_simulator_repeats(finished: tuple[Path, Path]) -> None:
    arms = arms_of(read_rows(finished[0] / "rows.jsonl"))
    base = load_scenario(ROOT / "configs" / "bench" / "simulate-measured.json")
    repeated = [scenarios_of(arm, base)[0][0] for arm in arms]
    for scenario in repeated:
        assert scenario.service.mean_ms > 10  # the wait is a part of it
        assert scenario.front_end.mean_ms > 0
        assert scenario.trip.mean_ms > 0
        assert scenario.decode.mean_ms == 0
        assert scenario.arrivals.batch == 4
    coded, backup = (scenario for scenario in repeated if scenario.policy == "coded")
    assert coded.encode.mean_ms > 1  # E's share of the wait is a part of it
    assert backup.encode.mean_ms < 1
    assert (coded.method, backup.method) == ("coded-invnet", "small-backup")


def test_parities_wait_as_long_as_they_cost(
    bundle_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    labels = ["uncoded", "replicate", "hedge", "coded", "small-backup", "parm", "collage@1.4"]
    others = ["coded-invnet-paper", "average-image", "auto"]
    grid = load_latency_grid(write_grid(tmp_path, bundle_folder, labels + others))
    bench = latency.LatencyBench(grid, False, tmp_path, data_dir, False, tmp_path / "log")
    waited: dict[str, list[float]] = {}
    for arm in arms(grid):
        schedule = bench.schedule(arm, bench.faults(arm))
        # The straggler's place says which requests it hits.
        assert [place for place, fault in enumerate(schedule) if fault.kind == "hold"] == [1]
        waited[arm.label] = [
            sum(
                fault.delay.ms * (size if fault.each_image else 1)
                for fault in schedule
                if fault.kind == "slow" and fault.delay is not None and fault.concerns(number)
            )
            for number, size in ((0, 1), (3, 1), (4, 1), (4, 3))
        ]
    share = encoder_share(bench.bundle.model, 4)
    assert waited["uncoded"] == waited["replicate"] == waited["hedge"] == [10] * 4
    assert waited["small-backup"] == pytest.approx([10, 10, 2.5, 7.5])
    assert waited["auto"] == waited["small-backup"]  # which it may ask
    coded = [10, 10, 10 * (1 + share / 4), 10 * (1 + 3 * share / 4)]
    assert waited["coded"] == pytest.approx(coded, abs=1e-3)
    assert waited["parm"] == waited["average-image"] == [10] * 4  # nothing encodes
    assert waited["collage@1.4"] == pytest.approx([10, 10, 14, 14])
    model = bench.bundle.model
    encoder = build_encoder(EncoderSettings.model_validate(PAPER["encoder"]), model.input_shape)
    share = encoder_share(with_encoder(model, encoder.eval()), 4)
    paper = [10, 10, 10 * (1 + share / 4), 10 * (1 + 3 * share / 4)]
    assert waited["coded-invnet-paper"] == pytest.approx(paper, abs=1e-3)


TWO = """
from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.rules import BACKUP, AnswersAll, Costs
class Shared(SmallBackup):
    name = "shared"
    def rules(self, k, tolerance=None, bundle=None):
        return AnswersAll(k, BACKUP, cost=Costs(member=1 / k), r=2)
"""


def test_groups_with_two_extra_tasks_are_what_the_simulator_repeats(
    bundle_folder: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "two.py"
    own.write_text(TWO)
    labels = [f"{ROOT / 'examples' / 'my_method.py'}:TwoParities", f"{own}:Shared"]
    path = write_grid(tmp_path, bundle_folder, labels, workers=6)
    grid = load_latency_grid(path)
    bench = latency.LatencyBench(grid, False, tmp_path, data_dir, False, tmp_path / "log")
    waits = [bench.parity_wait(arm) for arm in arms(grid)]
    assert waits == [ParityWait(10.0, 0.0), ParityWait(0.0, 2.5, 0.5)]  # of four images, and of two

    async def measured(*_: Any) -> dict[str, Any]:
        return latency_figures([reply(12, [0], ["direct"])])

    monkeypatch.setattr(latency.LatencyBench, "_measure", measured)
    assert run(path, tmp_path, data_dir)["done"] == 2
    base = load_scenario(ROOT / "configs" / "bench" / "simulate-measured.json")
    (arm,) = arms_of(read_rows(tmp_path / "rows.jsonl"))
    assert [own[0].r for own in scenarios_of(arm, base)] == [2, 2]


def test_a_run_depends_on_the_methods_version_and_file(
    bundle_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    own = tmp_path / "mine.py"
    own.write_text((ROOT / "examples" / "my_method.py").read_text())
    labels = ["coded", "collage", f"{own}:TwoParities"]
    grid = load_latency_grid(write_grid(tmp_path, bundle_folder, labels, workers=6))
    bench = latency.LatencyBench(grid, False, tmp_path, data_dir, False, tmp_path / "log")
    found = [bench.settings(arm).get("method") for arm in arms(grid)]
    assert found == [None, {"version": 2}, {"digest": f"{file_digest(own)}:TwoParities"}]


def test_finished_runs_and_parts_are_kept(
    finished: tuple[Path, Path], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, grid = finished

    def no_training(*_: Any) -> None:
        raise AssertionError("there is nothing to do")

    with monkeypatch.context() as patch:
        patch.setattr(latency.LatencyBench, "train_part", no_training)
        counts = run(grid, folder, data_dir)
    assert counts == {"runs": RUNS, "kept": RUNS, "done": 0, "failed": 0}
    (part,) = (folder / "runs" / "bench" / "tiny" / "mnist").rglob("best.safetensors")
    before = part.stat().st_mtime_ns
    bundle = Path(json.loads(grid.read_text())["bundle"])
    bench = latency.LatencyBench(
        load_latency_grid(write_grid(folder, bundle, REAL)),
        False,
        folder / "runs",
        data_dir,
        False,
        folder / "log",
    )
    bench.train_part(METHODS["small-backup"])
    assert bench.parts == {"small-backup": part}
    assert part.stat().st_mtime_ns == before


def test_a_run_that_raises_is_a_row_and_is_tried_again(
    bundle_folder: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = write_grid(tmp_path, bundle_folder, ["uncoded", "hedge"])
    measured: list[str] = []

    async def breaks(_: Any, arm: Any, faults: Any, row: Any) -> dict[str, Any]:
        measured.append(arm.label)
        if arm.label == "hedge" and len(measured) == 2:
            raise RuntimeError("out of luck")
        return {"p50_ms": 1.0}

    monkeypatch.setattr(latency.LatencyBench, "_measure", breaks)
    assert run(grid, tmp_path, data_dir)["failed"] == 1
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["error"] for row in rows] == [None, "RuntimeError: out of luck"]
    counts = run(grid, tmp_path, data_dir)
    assert (counts["kept"], counts["done"], counts["failed"]) == (1, 1, 0)
    assert measured == ["uncoded", "hedge", "hedge"]
    assert all(r["error"] is None for r in newest(read_rows(tmp_path / "rows.jsonl")).values())
    longer = write_grid(tmp_path, bundle_folder, ["uncoded", "hedge"], wait_ms=11)
    assert run(longer, tmp_path, data_dir)["done"] == 2  # another setting is another run
    assert run(longer, tmp_path, data_dir, only=["method=hedge"])["runs"] == 1


def test_workers_compute_by_the_engine_of_the_grid(
    bundle_folder: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def noted(self: latency.LatencyBench, arm: Arm, *_: Any) -> dict[str, Any]:
        asked.extend(self._options(arm))
        return {"p50_ms": 1.0}

    monkeypatch.setattr(latency.LatencyBench, "_measure", noted)
    grid = write_grid(tmp_path, bundle_folder, ["uncoded"], engine="onnxruntime")
    assert run(grid, tmp_path, data_dir)["done"] == 1
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row["settings"]["engine"] == "onnxruntime"
    assert "engine=onnxruntime" in asked
    lacking = replace(ENGINES[ONNX_RUNTIME], needed=("nowhere_to_be_found",))
    monkeypatch.setitem(ENGINES, ONNX_RUNTIME, lacking)
    with pytest.raises(UserError, match=r"needs nowhere_to_be_found: pip install"):
        run(grid, tmp_path, data_dir)


def test_a_run_that_was_measured_with_other_faults_is_measured_again(
    bundle_folder: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = tmp_path / "mine.json"

    def write(ms: int) -> None:
        delay = {"distribution": "exponential", "ms": ms}
        faults.write_text(json.dumps({"faults": [{"kind": "slow", "delay": delay}]}))

    async def measured(*_: Any) -> dict[str, Any]:
        return {"p50_ms": 1.0}

    monkeypatch.setattr(latency.LatencyBench, "_measure", measured)
    block = {"batches": [4], "loads": [0.3], "methods": ["uncoded"]}
    blocks = [{**block, "stragglers": [model]} for model in ("pareto", str(faults))]
    grid = write_grid(tmp_path, bundle_folder, [], blocks=blocks)
    write(20)
    assert run(grid, tmp_path, data_dir)["done"] == 2
    assert run(grid, tmp_path, data_dir)["kept"] == 2
    write(30)
    counts = run(grid, tmp_path, data_dir)
    assert (counts["kept"], counts["done"]) == (1, 1)
    after = read_rows(tmp_path / "rows.jsonl")[-1]
    assert after["stragglers"][0]["delay"]["ms"] == 30
    rows = [r for r in read_rows(tmp_path / "rows.jsonl") if r["key"] == after["key"]]
    assert len(rows) == 2  # the same key, and the newest row counts
    assert run(grid, tmp_path, data_dir)["kept"] == 2


def test_every_setting_and_run_meets_arrivals_of_its_own(
    bundle_folder: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def measured(*_: Any) -> dict[str, Any]:
        return {"p50_ms": 1.0}

    monkeypatch.setattr(latency.LatencyBench, "_measure", measured)
    block = {"batches": [1, 4], "loads": [0.3, 0.6], "stragglers": ["held", "pareto"]}
    blocks = [{**block, "methods": ["uncoded", "hedge"]}]
    grid = write_grid(tmp_path, bundle_folder, [], blocks=blocks, runs=2)
    assert run(grid, tmp_path, data_dir)["done"] == 2 * 16
    rows = read_rows(tmp_path / "rows.jsonl")
    fields = ("batch", "load", "straggler_model", "run")
    seeds = {(*(row[field] for field in fields), row["label"]): row["seed"] for row in rows}
    assert len(set(seeds.values())) == 16
    for (*setting, label), seed in seeds.items():
        assert seeds[(*setting, "hedge")] == seed, label
    # One that met others is measured again.
    rows[3]["seed"] += 1
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = run(grid, tmp_path, data_dir)
    assert (counts["kept"], counts["done"]) == (31, 1)
    other = write_grid(tmp_path, bundle_folder, [], blocks=blocks, runs=2, seed=7)
    assert run(other, tmp_path, data_dir)["done"] == 32
    others = {row["seed"] for row in read_rows(tmp_path / "rows.jsonl")[-32:]}
    assert len(others) == 16
    assert others.isdisjoint(seeds.values())


def test_the_command_writes_rows_and_tables(
    finished: tuple[Path, Path], data_dir: Path, tmp_path: Path, call: Command
) -> None:
    folder, grid = finished
    out = tmp_path / "rows.jsonl"
    out.write_bytes((folder / "rows.jsonl").read_bytes())
    words = ["bench", "latency", grid, "--out", out, "--data-dir", data_dir]
    words += ["--save-dir", folder / "runs", "--log", tmp_path / "log", "--json"]
    outcome = call(*words)
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert (report["kept"], report["done"], report["failed"]) == (RUNS, 0, 0)
    names = [Path(path).name for path in report["written"]]
    assert names == ["rows.md", "rows.csv"]


@pytest.mark.parametrize(
    ("changes", "words", "told"),
    [
        ({"k": 5, "workers": 6}, [], "serves groups of 2 to 4"),
        ({"parts": "missing.json"}, [], "cannot read the grid"),
        ({"group_timeout_ms": 5000}, [], "group_timeout_ms must be below the deadline of 5000 ms"),
        (
            {"blocks": [{"batches": [257], "loads": [0.3], "methods": ["coded"]}]},
            [],
            "blocks.0.batches.0: input should be less than or equal to 256, got 257",
        ),
        ({}, ["--only", "method=parm"], "the grid has no method=parm"),
        ({"bundle": "nowhere"}, [], "no bundle 'nowhere'"),
        ({}, ["--save-dir", "/dev/null/runs"], "--save-dir: cannot write into /dev/null/runs: "),
        (
            {
                "bundle": "cifar10",
                "blocks": [
                    {
                        "batches": [4],
                        "loads": [0.3],
                        "stragglers": ["held"],
                        "methods": ["coded+guess"],
                    }
                ],
            },
            [],
            "methods: coded+guess needs a bundle that guesses: leave it out",
        ),
    ],
)
def test_mistakes_are_told_before_any_work(
    bundle_folder: Path,
    data_dir: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    words: list[str],
    told: str,
    call: Command,
) -> None:
    grid = write_grid(tmp_path, bundle_folder, REAL, **changes)
    out = tmp_path / "rows.jsonl"
    outcome = call("bench", "latency", grid, "--data-dir", data_dir, "--out", out, *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert told in outcome.err
    assert outcome.err.count("\n") == 1
    assert not out.exists()


def test_the_log_is_not_where_the_rows_go(
    bundle_folder: Path, data_dir: Path, tmp_path: Path, call: Command
) -> None:
    grid = write_grid(tmp_path, bundle_folder, REAL)
    both = tmp_path / "both"
    words = ["--data-dir", data_dir, "--out", both, "--log", both]
    outcome = call("bench", "latency", grid, *words)
    assert outcome.code == 2
    assert "both is where the rows go: name another file" in outcome.err
    assert not both.exists()


def test_a_backup_of_another_bundle_is_refused(
    bundle_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    grid = write_grid(tmp_path, bundle_folder, REAL)
    parts = json.loads((tmp_path / "parts.json").read_text())
    parts["datasets"]["mnist"]["bundle"] = "mnist"
    (tmp_path / "parts.json").write_text(json.dumps(parts))
    with pytest.raises(UserError, match=r"datasets.mnist must have the bundle"):
        run(grid, tmp_path, data_dir)


def reply(milliseconds: float, labels: list[int], outcomes: list[str], status: int = 200) -> Reply:
    rows = tuple(range(len(labels)))
    return Reply(
        "q",
        rows,
        milliseconds / 1000,
        status,
        labels=np.array(labels),
        outcomes=tuple(outcomes),
    )


def test_a_query_without_an_answer_is_wrong_and_infinitely_late() -> None:
    truth = np.array([0, 1])
    replies = [
        reply(5, [0, 1], ["direct", "decoded"]),
        reply(6, [0, 0], ["direct", "guessed"]),
        reply(9, [0, 0], [], status=504),
    ]
    found = latency.answer_figures(replies, truth)
    assert found["queries"] == 6
    assert found["errors"] == 1
    assert found["missing_share"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["decoded_share"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["accuracy"] == 0.5
    assert found["decoded_accuracy"] == 0.5
    times = latency_figures(replies)
    assert times["p50_ms"] == 6
    assert times["p99_ms"] is None
    assert times["histogram"]["lost"] == 1
    nobody = latency.answer_figures([reply(9, [0], [], status=503)], truth)
    assert (nobody["missing_share"], nobody["decoded_accuracy"]) == (1, None)
