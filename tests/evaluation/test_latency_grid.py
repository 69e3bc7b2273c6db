from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.errors import UserError
from codedinvnet.evaluation.latency_grid import (
    arms,
    chosen,
    injected,
    load_latency_grid,
    quick_grid,
)
from codedinvnet.serving.policies import SERVED
from codedinvnet.simulation.stragglers import stragglers

ROOT = Path(__file__).resolve().parents[2]

GRID: dict[str, Any] = {
    "name": "test",
    "bundle": "mnist",
    "wait_ms": 8,
    "service_ms": 10,
    "runs": 2,
    "parts": "accuracy.json",
    "blocks": [
        {"batches": [10], "loads": [0.4], "stragglers": ["pareto", "held"]},
        {"batches": [1, 10], "loads": [0.4], "stragglers": ["held"], "methods": ["coded"]},
    ],
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "grid.json"
    path.write_text(json.dumps({**GRID, **changes}))
    return path


def test_the_grid_with_a_method_of_ones_own_in_the_docs_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = ROOT / "docs" / "how-to" / "compare-methods.md"
    blocks = re.findall(r"```json\n(.*?)```", docs.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = [block for block in blocks if '"service_ms"' in block]
    path = tmp_path / "mine.json"
    path.write_text(text)
    monkeypatch.chdir(ROOT)
    found = [arm.label for arm in arms(load_latency_grid(path))]
    assert found == ["hedge", "coded", "examples/my_method.py:TwoParities"]


def test_every_run_has_its_turn_before_the_next(tmp_path: Path) -> None:
    found = list(arms(load_latency_grid(write(tmp_path))))
    assert len(found) == len(set(found)) == 2 * (2 * len(SERVED) + 1)  # one arm is in both blocks
    first = found[: 4 * len(SERVED)]
    assert [arm.run for arm in first] == [1] * (2 * len(SERVED)) + [2] * (2 * len(SERVED))
    assert [arm.label for arm in first[: len(SERVED)]] == list(SERVED)
    assert {arm.batch for arm in first} == {10}
    assert found[-1].name() == "single images at 40%, held: coded, run 2"


def test_capacity_is_stated_and_parts_lie_beside_the_grid(tmp_path: Path) -> None:
    grid = load_latency_grid(write(tmp_path))
    assert grid.capacity_qps == 1100
    assert grid.parts == tmp_path / "accuracy.json"


def test_the_shipped_grid_has_every_method_in_every_setting() -> None:
    grid = load_latency_grid(ROOT / "configs" / "bench" / "latency.json")
    found = list(arms(grid))
    labels = {a.label for a in found}
    assert {"uncoded", "coded", "hedge", "small-backup"} <= labels <= set(SERVED)
    assert {(a.batch, a.load, a.stragglers, a.label) for a in found} == {
        (batch, load, model, label)
        for batch in (1, 10)
        for load in (0.4, 0.7)
        for model in ("held", "pareto", "slower")
        for label in labels
    } | {(1, 0.5, model, label) for model in ("none", "held") for label in ("uncoded", "auto")}
    assert grid.runs >= 3
    assert grid.queries >= 10_000
    assert grid.parts.is_file()
    assert (found[0].batch, found[0].load) == (10, 0.4)


def test_quick(tmp_path: Path) -> None:
    found = list(arms(quick_grid(load_latency_grid(write(tmp_path)))))
    places = {(a.batch, a.load, a.stragglers, a.run) for a in found}
    assert (places, len(found)) == ({(10, 0.4, "pareto", 1)}, len(SERVED))
    assert quick_grid(load_latency_grid(write(tmp_path))).queries == 3000


def test_only(tmp_path: Path) -> None:
    wanted = list(arms(load_latency_grid(write(tmp_path))))
    assert chosen(wanted, []) == wanted
    found = chosen(wanted, ["method=coded", "method=hedge", "batch=10", "stragglers=held", "run=2"])
    assert [arm.label for arm in found] == ["hedge", "coded"]
    assert {(arm.batch, arm.run) for arm in found} == {(10, 2)}
    assert chosen(wanted, ["load=0.40"]) == wanted
    for word, told in (
        ("coded", "'coded' is not KEY=VALUE with KEY of method, batch"),
        ("policy=coded", "is not KEY=VALUE"),
        ("method=codde", "has no method=codde; its values: auto, coded, coded.guess, coded.hedge"),
        ("batch=ten", "has no batch=ten; its values: 1, 10"),
        ("load=0.9", "has no load=0.9"),
    ):
        with pytest.raises(UserError, match=told):
            chosen(wanted, [word])


def test_stragglers_are_the_simulators() -> None:
    (pareto,), (model,) = injected("pareto", 42.0, 10), stragglers("pareto", 42.0, 10)
    assert (pareto.kind, pareto.probability) == (model.kind, model.probability)
    assert pareto.delay is not None
    assert model.delay is not None
    assert pareto.delay.model_dump() == model.delay.model_dump(
        include={"distribution", "ms", "shape"}
    )
    (held,) = injected("held", 42.0, 10)
    assert (held.kind, held.probability, held.per_request) == ("hold", 0.1, True)
    assert injected("none", 42.0, 10) == []
    (hung,) = injected("hung", 42.0, 10)
    assert (hung.kind, hung.delay) == ("hang", None)


def test_a_slower_worker_is_blocked_for_the_difference() -> None:
    (slower,) = injected("slower", 42.0, 10)
    assert (slower.kind, slower.worker, slower.probability) == ("slow", 0, 1.0)
    assert slower.delay is not None
    assert slower.delay.ms == 84.0  # with 42 of its own three times the others'


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"blocks": [{**GRID["blocks"][0], "methods": ["codde"]}]}, "did you mean 'coded'"),
        ({"blocks": [{**GRID["blocks"][0], "stragglers": ["bursts"]}]}, "cannot inject 'burst'"),
        ({"blocks": [{**GRID["blocks"][0], "stragglers": ["sleepy"]}]}, "neither a file nor one"),
        ({"blocks": [{**GRID["blocks"][0], "loads": [1.0]}]}, "blocks.0.loads.0.*less than 1"),
        ({"workers": 10}, "coded with k = 10 needs 11, got 10"),
        (
            {"workers": 1, "blocks": [{**GRID["blocks"][0], "methods": ["replicate"]}]},
            "replicate needs 2, got 1",
        ),
        ({"wait_ms": 0}, "wait_ms.*greater than 0"),
        ({"wait_ms": 10}, "service_ms must be above the wait_ms of 10 that it has in it"),
        ({"weight_ms": 1}, "weight_ms"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        load_latency_grid(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_faults_of_workers_that_there_are_not(tmp_path: Path) -> None:
    faults = tmp_path / "faults.json"
    faults.write_text('{"faults": [{"kind": "slow", "worker": 11, "delay": {"ms": 5}}]}')
    blocks = [{**GRID["blocks"][0], "stragglers": [str(faults)]}]
    with pytest.raises(UserError, match=r"blocks\.0\.stragglers: the faults name worker 11; there"):
        load_latency_grid(write(tmp_path, blocks=blocks))
    assert load_latency_grid(write(tmp_path, blocks=blocks, workers=12)).workers == 12


def test_files_that_are_no_grid(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the grid"):
        load_latency_grid(tmp_path / "missing.json")
    path = tmp_path / "grid.json"
    path.write_text("{oops")
    with pytest.raises(UserError, match="is not JSON"):
        load_latency_grid(path)


def test_what_is_wrong_with_a_methods_file_is_told(tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    block = {"batches": [1], "loads": [0.4], "stragglers": ["held"]}
    grid = write(tmp_path, blocks=[{**block, "methods": [f"{own}:TwoParities"]}])
    with pytest.raises(UserError, match=r"blocks\.0\.methods: there is no file .*mine\.py"):
        load_latency_grid(grid)
    own.write_text("class TwoParities: ...")
    with pytest.raises(UserError, match=r"methods: .*'TwoParities' is no subclass of Method"):
        load_latency_grid(grid)
