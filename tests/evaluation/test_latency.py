"""`bench latency`: two methods on the real service, and the grid's settings and waits."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from codedinvnet.codes.equal_cost import count_macs, macs
from codedinvnet.codes.method import given_by
from codedinvnet.codes.registry import find_method
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import file_digest
from codedinvnet.common.grid import read_rows
from codedinvnet.common.quantiles import Histogram
from codedinvnet.evaluation import latency
from codedinvnet.evaluation.latency import arms, load_latency_grid, quick_grid
from codedinvnet.evaluation.service import ParityWait, injected, schedule
from codedinvnet.models.bundle import load_bundle, weights_digest
from codedinvnet.models.checkpoint import PART, module_tensors, save_checkpoint
from tests.conftest import Command

ROOT = Path(__file__).resolve().parents[2]
REAL = ["coded", "small-backup"]
RUNS = 2


def with_parts(bundle: Path, to: Path, *names: str) -> Path:
    """Copy a bundle, with an untrained part of each of these methods for groups of four."""
    shutil.copytree(bundle, to)
    for method in map(find_method, names):
        made_with = {"method": method.name, "base": "invertible", "k": 4, "width": 5}
        made_with |= {"bundle": weights_digest(to), **method.identity()}
        part = method.untrained(given_by(load_bundle(to), 4), made_with)
        path = to / f"{method.name}-k4.safetensors"
        save_checkpoint(path, module_tensors({PART: part}), {"settings": made_with})
    return to


def write_grid(folder: Path, bundle: Path, methods: list[str], /, **changes: Any) -> Path:
    """Write a grid of a second's runs."""
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
        data_dir=data_dir,
        log=folder / "log",
        **more,
    )


def bench_of(path: Path, data_dir: Path, quick: bool = False) -> latency.LatencyBench:
    from codedinvnet.data import load_images

    grid = load_latency_grid(path)
    test = load_images("mnist", "test", data_dir=data_dir)
    return latency.LatencyBench(grid, quick, test, path.parent / "log")


@pytest.fixture(scope="module")
def finished(
    bundle_folder: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two methods on the real service, done."""
    folder = tmp_path_factory.mktemp("latency")
    bundle = with_parts(bundle_folder, folder / "bundle", "small-backup")
    grid = write_grid(folder, bundle, REAL)
    counts = run(grid, folder, data_dir)
    assert counts == {"runs": RUNS, "kept": 0, "done": RUNS, "failed": 0}
    return folder, grid


def test_a_row_tells_what_was_served_and_what_came_out(finished: tuple[Path, Path]) -> None:
    rows = {row["label"]: row for row in read_rows(finished[0] / "rows.jsonl", "latency")}
    assert list(rows) == REAL
    for row in rows.values():
        assert row["error"] is None
        assert (row["requests"], row["queries"], row["errors"]) == (20, 80, 0)
        assert row["qps"] == pytest.approx(0.3 * 5000 / 12, abs=1e-3)
        assert row["p50_ms"] >= 10  # no answer is faster than the wait
        assert row["mean_service_ms"] > 10
        assert 0.1 < row["accuracy"] <= 1  # a tiny bundle, and an untrained backup
        assert Histogram.of_row(row).total == 20
        (fault,) = row["stragglers"]
        assert (fault["kind"], fault["per_request"], fault["probability"]) == ("hold", True, 0.04)
        if sys.platform == "linux":
            assert 0 < row["processors_own"] < 1
            assert 0 < row["processors_busy"] <= 1
    # Where others compute, too, a group may be answered before its backup task is sent.
    assert 1 <= 80 * rows["small-backup"]["extra_tasks_per_query"] <= 20.01
    assert 1 < rows["small-backup"]["work_per_query"] < 1.6
    # Its E is dear for so small an f: some groups are answered before their parity is sent.
    assert 0 < rows["coded"]["extra_tasks_per_query"] <= 0.25
    # A quarter of a data task's wait an image.
    assert rows["small-backup"]["settings"]["parity_wait_ms"] == [0, 2.5]
    task, image = rows["coded"]["settings"]["parity_wait_ms"]
    waits = (task + 4 * image) / rows["coded"]["mean_service_ms"]
    work = 1 + rows["coded"]["extra_tasks_per_query"] * waits
    assert work < rows["coded"]["work_per_query"] < 1.5 * work  # others compute here, too


def test_finished_runs_are_kept(finished: tuple[Path, Path], data_dir: Path, call: Command) -> None:
    folder, grid = finished
    words = ["bench", "latency", grid, "--data-dir", data_dir]
    words += ["--out", folder / "rows.jsonl", "--log", folder / "log", "--json"]
    outcome = call(*words)
    report = json.loads(outcome.out)
    assert (report["kept"], report["done"], report["failed"]) == (RUNS, 0, 0)
    assert {Path(p).name for p in report["written"]} == {"rows.md", "rows.csv"}


def waits(bench: latency.LatencyBench, label: str) -> list[float]:
    """Return how long tasks wait: a query's, and the extra one of one and of three images."""
    (arm,) = (arm for arm in arms(bench.grid) if arm.label == label)
    own = schedule(bench.grid.wait_ms, 4, bench.parity_wait(arm), injected(arm.stragglers, 12, 4))
    # The straggler's place says which requests it hits.
    assert [place for place, fault in enumerate(own) if fault.kind == "hold"] == [1]
    return [
        sum(
            fault.delay.ms * (size if fault.each_image else 1)
            for fault in own
            if fault.kind == "slow" and fault.delay is not None and fault.concerns(number)
        )
        for number, size in ((0, 1), (4, 1), (4, 3))
    ]


def test_parities_wait_as_long_as_they_cost(
    bundle_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    labels = ["uncoded", "hedge", "coded", "small-backup", "parm", "collage@1.4", "auto"]
    names = ("small-backup", "parm", "collage@1.4")
    bundle = with_parts(bundle_folder, tmp_path / "bundle", *names)
    bench = bench_of(write_grid(tmp_path, bundle, labels), data_dir)
    model = bench.bundle.model
    encoding = count_macs(lambda: model.encoder(torch.zeros(1, 4, *model.input_shape)))
    share = encoding / macs(model.network, model)
    assert waits(bench, "uncoded") == waits(bench, "hedge") == [10] * 3
    assert waits(bench, "small-backup") == pytest.approx([10, 2.5, 7.5])
    assert waits(bench, "auto") == waits(bench, "small-backup")  # which it may ask
    coded = [10, 10 * (1 + share / 4), 10 * (1 + 3 * share / 4)]
    assert waits(bench, "coded") == pytest.approx(coded, abs=1e-3)
    assert waits(bench, "parm") == [10] * 3  # nothing encodes
    assert waits(bench, "collage@1.4") == pytest.approx([10, 14, 14])


TWO = """
from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.rules import BACKUP, AnswersAll, Costs
class Shared(SmallBackup):
    name = "shared"
    def rules(self, k, tolerance=None, bundle=None):
        return AnswersAll(k, BACKUP, cost=Costs(member=1 / k), r=2)
"""


def test_a_run_depends_on_ones_own_method_and_on_the_faults(
    bundle_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    own, faults = tmp_path / "two.py", tmp_path / "faults.json"
    own.write_text(TWO)
    block = {"batches": [4], "loads": [0.3], "stragglers": [str(faults)]}
    label = f"{own}:Shared"
    bundle = with_parts(bundle_folder, tmp_path / "bundle", label)
    keys = []
    for ms in (5, 6):
        fault = {"kind": "slow", "worker": 0, "delay": {"ms": ms}}
        faults.write_text(json.dumps({"faults": [fault]}))
        path = write_grid(tmp_path, bundle, [], workers=6, blocks=[{**block, "methods": [label]}])
        bench = bench_of(path, data_dir)
        (arm,) = arms(bench.grid)
        assert bench.parity_wait(arm) == ParityWait(0.0, 2.5, 0.5)  # of two images of four
        cell = bench.cell(arm)
        assert cell.settings["method"] == {"digest": f"{file_digest(own)}:Shared"}
        keys.append(cell.key)
    assert keys[0] != keys[1]


def test_every_method_meets_the_same_arrivals_and_faults(
    bundle_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    path = write_grid(tmp_path, bundle_folder, ["uncoded", "hedge"], runs=2)
    bench = bench_of(path, data_dir)
    seeds = {(arm.label, arm.run): bench.seed(arm) for arm in arms(bench.grid)}
    assert list(seeds) == [("uncoded", 1), ("hedge", 1), ("uncoded", 2), ("hedge", 2)]
    assert seeds["uncoded", 1] == seeds["hedge", 1] != seeds["uncoded", 2]


def test_the_grid_that_ships_and_its_short_version() -> None:
    grid = load_latency_grid(ROOT / "configs" / "bench" / "latency.json")
    assert {(arm.batch, arm.stragglers) for arm in arms(grid)} >= {(10, "pareto"), (1, "held")}
    short = quick_grid(grid)
    assert len(arms(short)) == len(grid.blocks[0].methods)
    assert short.queries == latency.QUICK_QUERIES


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"wait_ms": 12}, "service_ms must be above the wait_ms of 12"),
        ({"k": 5}, "serves groups of 2 to 4"),
        ({"workers": 4}, "workers: coded with k = 4 needs 5, got 4"),
        ({"group_timeout_ms": 9000}, "group_timeout_ms"),
        ({"methods": ["cooded"]}, "blocks.0.methods: unknown 'cooded': did you mean 'coded'?"),
        ({"stragglers": ["pareta"]}, "blocks.0.stragglers"),
        ({"only": ["load=0.9"]}, "the grid has no load=0.9"),
        ({}, "small-backup needs its trained part"),
    ],
)
def test_mistakes_are_refused_before_any_work(
    changes: dict[str, Any], why: str, bundle_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    only = changes.pop("only", ())
    block: dict[str, Any] = {"batches": [4], "loads": [0.3], "stragglers": ["held"]}
    block |= {"methods": ["coded", "small-backup"]}
    block |= {name: changes.pop(name) for name in tuple(block) if name in changes}
    path = write_grid(tmp_path, bundle_folder, [], **{"workers": 6, **changes}, blocks=[block])
    with pytest.raises(UserError) as caught:
        run(path, tmp_path, data_dir, only=only)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_straggler_that_the_service_cannot_inject_is_refused(tmp_path: Path) -> None:
    (slow,) = injected("slower", 40.0, 1)
    assert slow.kind == "slow"
    path = tmp_path / "faults.json"
    burst = {"kind": "burst", "workers": 2, "factor": 4, "every_s": 1, "delay": 300}
    path.write_text(json.dumps({"faults": [burst]}))
    with pytest.raises(UserError, match="the service cannot inject 'burst' like this"):
        injected(str(path), 40.0, 1)
