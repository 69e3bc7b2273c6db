from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import results
from benchmarks.results import HEADLINE_LATENCY, headlines, page
from codedinvnet.errors import UserError
from codedinvnet.files import file_digest, read_json
from codedinvnet.rows import append_row
from codedinvnet.simulation.agreement import check, told
from codedinvnet.simulation.measured import COMPARED
from codedinvnet.simulation.sweep import parse_sweep
from tests.bench.canned import latency_row, row

FILES = (
    *("accuracy.jsonl", "latency.jsonl", "validation.json"),
    *("map.jsonl", "ablation.jsonl", "speed.json"),
)
BATCH, LOAD, MODEL = HEADLINE_LATENCY[0]
OTHER_BATCH = HEADLINE_LATENCY[1][0]
TIMES = np.arange(1000.0)


def sweep_row(load: float, policy: str, late: float | None, work: float) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "cell": {"stragglers": "held", "batch": 10, "load": load, "policy": policy},
        "cpu_seconds_per_million": 20 + 20 * load,
        "machine": "a machine",
        "scenario": {},
        "p999_ms": late,
        "p999_ms_95": None if late is None else [0.98 * late, 1.02 * late],
        "work_per_query": work,
        "queries": 20_000,
    }


def ablation_row(name: str, recovered: float, **more: Any) -> dict[str, Any]:
    figures = {"normal_accuracy": 0.98, "recovered_accuracy": recovered}
    scores = {"seconds": 60.0, "10": figures}
    key = json.dumps([name, "mnist", [10], {"seed": 1}])
    found = {"row": name, "data": "mnist", "seed": 1, "k": [10], "machine": "a machine"}
    return {"schema_version": 1, "key": key, **found, "validation": scores, "test": scores, **more}


def percentile(measured: float, simulated: float | None, agrees: bool | None) -> dict[str, Any]:
    known = math.isfinite(measured)
    return {
        "measured_ms": measured if known else None,
        "simulated_ms": simulated,
        "allowed_ms": [0.85 * measured, 1.15 * measured] if known else [None, None],
        "agrees": agrees,
    }


def validation(rows: Path) -> dict[str, Any]:
    """Three arms.

    Of the first two's six percentiles two are off and one cannot be judged; of the third's one is
    never on both sides, one in the measurement alone, and one is not there.
    """
    good, late = percentile(100.0, 101.0, True), percentile(100.0, 120.0, True)
    arms = [
        {"p50": good, "p99": late, "p999": percentile(200.0, 190.0, None)},
        {"p50": good, "p99": percentile(100.0, 130.04, False)},
    ]
    arms[1]["p999"] = percentile(400.0, None, False)
    arms.append({"p50": percentile(math.inf, 90.0, False), "p99": percentile(math.inf, None, True)})
    return {
        "schema_version": 2,
        "measured_digest": file_digest(rows),
        "arms": [
            {
                "name": f"arm {i}",
                "percentiles": own,
                "same_arrivals": False,
                "simulated": [[{"queries": 20_000}]],
            }
            for i, own in enumerate(arms)
        ],
    }


SPEED = {
    "bundle": "mnist",
    "machine": "a machine",
    "cores": 2,
    "train_ratio": 1.4,
    "train_ratio_spread": [1.3, 1.5],
    "train_ms": {"plain": {"median": 210.0, "min": 200.0, "max": 220.0}},
}


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    for one in rows:
        append_row(path, one)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with every file."""
    accuracy = [
        row("coded-invnet", 0.93),
        row("parm", 0.50, seed=1),
        row("parm", 0.54, seed=2),
        row("approxifer", 0.80, systematic=False),
        row("approxifer", 0.88, base="resnet", systematic=False),
        row("approxifer", 0.97, k=4, systematic=False),
        row("coded-invnet", 0.89, dataset="fashion"),
    ]
    write(tmp_path / "accuracy.jsonl", accuracy)
    latency = [latency_row("coded", TIMES + run, run=run) for run in (1, 2)]
    latency += [latency_row("hedge", TIMES), latency_row("hedge", TIMES[:300], batch=BATCH + 1)]
    latency += [latency_row("uncoded", TIMES, error="RuntimeError: no")]
    write(tmp_path / "latency.jsonl", latency)
    report = validation(tmp_path / "latency.jsonl")
    (tmp_path / "validation.json").write_text(json.dumps(report))
    sweeps = [
        sweep_row(0.2, "uncoded", 100.0, 1.0),
        sweep_row(0.2, "coded", 60.0, 1.1),
        sweep_row(0.5, "uncoded", 100.0, 1.0),
        sweep_row(0.5, "coded", 99.0, 1.1),
    ]
    write(tmp_path / "map.jsonl", sweeps)
    write(tmp_path / "ablation.jsonl", [ablation_row("all", 0.95), ablation_row("no g'", 0.91)])
    (tmp_path / "speed.json").write_text(json.dumps(SPEED))
    return tmp_path


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_what_was_not_measured_is_said_to_be_not_measured(tmp_path: Path) -> None:
    text = page(tmp_path, "results")
    assert text.count("Not measured yet; `") == len(FILES)
    for name in FILES:
        assert f"--out docs/results/{name}` measures it." in text
    assert "| --- |" not in text
    assert all(table.startswith("Not measured yet; ") for table in headlines(tmp_path).values())


@pytest.mark.parametrize("missing", FILES)
def test_one_missing_file_costs_its_section_alone(folder: Path, missing: str) -> None:
    assert "Not measured" not in page(folder, ".")
    (folder / missing).unlink()
    text = page(folder, ".")
    assert text.count("Not measured yet") == 1
    assert f"docs/results/{missing}" in text


def test_accuracy_has_a_table_and_a_comparison_for_each_data_set(folder: Path) -> None:
    found = section(page(folder, "."), "Accuracy")
    mnist = found.split("### mnist")[1].split("###")[0]
    assert (
        "| 10 | 1 | 0 | parm | invertible | 10 % | 95.00 ± 0.00 |  | 52.00 ± 2.83 |  | 2 |" in mnist
    )
    assert "| 87.2 |  |  | published: ApproxIFER's repository, Bar_plots.py |" in mnist
    assert "| margin, points | 95 % | p |" in mnist
    assert "| 10 | 1 | 0 | approxifer | resnet | 88.00 | 93.00 | 94.82 | +" in mnist
    fashion = found.split("### fashion")[1].split("###")[0]
    assert "| 10 | 1 | 0 | coded-invnet | invertible |" in fashion
    assert "margin" not in fashion  # no rival was measured on it
    unnamed = found.split("### Data set not named")[1].split("###")[0]
    assert unnamed.count("published: Dinh & Lee") == 2
    beside = found.split("### Beside the published figures")[1]
    assert "| mnist | 10 | parm | 99.0 | 59.2 | 95.00 | 52.00 | -7.2 |" in beside


def test_the_headline_has_methods_down_and_data_sets_across(folder: Path) -> None:
    lines = headlines(folder)["accuracy"].splitlines()
    assert lines[0] == "| method | extra queries | mnist | fashion |"
    cells = [line.strip("| ").split(" | ") for line in lines[2:] if line.startswith("|")]
    assert [row[0] for row in cells] == [
        "no worker missing: invertible",
        "coded-invnet",
        "approxifer",
        "parm",
        "approxifer, published",
        "parm, published",
    ]
    assert lines[2] == "| no worker missing: invertible |  | 95.00 | 95.00 |"
    assert lines[3] == "| coded-invnet | 10 % | 93.00 | 89.00 |"
    # Its better base; k = 4 is left out. In brackets: nobody missing.
    assert lines[4] == "| approxifer | 10 % | 88.00 (90.00) |  |"
    assert lines[5] == "| parm | 10 % | 52.00 ± 2.83 † |  |"  # of two bases, one
    assert lines[7] == "| parm, published | 10 % | 59.2 | 59.0 |"
    assert "`average-image`, `coded-invnet-paper` and `oracle` answer with g," in lines[-1]
    assert "`average-image`, `coded-invnet-paper` and `oracle` answer with g," in page(folder, ".")


def test_what_of_the_grid_was_not_measured_is_no_blank(folder: Path) -> None:
    """A blank is what the grid does not have: here ParM on Fashion-MNIST."""
    part = {"epochs": 1, "steps_per_epoch": 3}
    data = {"classifier": part, "backup": part, "parity": part}
    blocks: list[dict[str, Any]] = [
        {"methods": ["coded-invnet", "approxifer", "oracle"], "k": [10]},
        {"methods": ["parm"], "datasets": ["mnist"], "k": [10], "seeds": [1, 2]},
        {"methods": ["parm"], "datasets": ["fashion"], "k": [10], "missing": [2]},
    ]
    grid = {"datasets": {name: {"bundle": name, **data} for name in ("mnist", "fashion")}}
    path = folder / "grid.json"
    path.write_text(json.dumps({"name": "tiny", "blocks": blocks, **grid}))
    lines = headlines(folder, path)["accuracy"].splitlines()
    assert lines[3] == "| coded-invnet | 10 % | 93.00 | 89.00 |"
    assert lines[4] == "| approxifer | 10 % | 88.00 (90.00) | not measured |"
    assert lines[5] == "| parm | 10 % | 52.00 ± 2.83 † |  |"
    assert lines[6] == "| oracle |  | not measured | not measured |"
    told = "Not measured: oracle: mnist, fashion k = 10. approxifer: fashion k = 10. "
    assert f"\n\n{told}parm: fashion k = 10 with 2 missing.\n\n" in page(folder, ".", path)
    write(folder / "accuracy.jsonl", [row("oracle", 0.9, dataset="fashion", error="it overflows")])
    assert "\n| oracle |  | not measured | failed |\n" in headlines(folder, path)["accuracy"]
    assert "Not measured: oracle: mnist k = 10. approxifer: fashion" in page(folder, ".", path)


def test_the_grid_is_that_of_the_command() -> None:
    assert f" {results.ACCURACY_GRID} " in results.COMMANDS["accuracy.jsonl"]
    assert (Path(__file__).parents[2] / results.ACCURACY_GRID).is_file()


def test_latency_has_a_table_of_all_settings_and_the_headline_of_two(folder: Path) -> None:
    found = section(page(folder, "."), "Latency")
    lines = [line for line in found.splitlines() if line.startswith("| 1")]
    assert [line.split(" | ")[3] for line in lines] == ["hedge", "hedge", "coded"]
    assert lines[1].startswith(f"| {BATCH} | {LOAD:.0%} | {MODEL} | hedge | 499.0 (")
    assert lines[2].endswith("| 2 |")  # runs
    assert "a query's task waits 40.0 ms without a processor" in found
    assert found.count("uncoded") == 1  # it failed
    assert "### Failed runs\n\n| run | error |" in found
    assert "| uncoded, run 1 | RuntimeError: no |" in found
    headline = headlines(folder)["latency"]
    assert headline.count("| hedge |") == 2  # the overview, and one setting
    write(folder / "latency.jsonl", [latency_row("hedge", TIMES, batch=OTHER_BATCH)])
    headline = headlines(folder)["latency"]
    assert headline.count("| hedge |") == 3
    assert f"\n| {OTHER_BATCH} | {LOAD:.0%} | {MODEL} | hedge |" in headline
    assert f"\n| {BATCH + 1} |" not in headline
    assert "docs/results.md" in headline
    assert "uncoded" not in headline


def test_the_simulator_is_judged_by_the_rows(folder: Path) -> None:
    title = "Does the simulator agree with it?"
    found = section(page(folder, "."), title)
    report = json.loads((folder / "validation.json").read_text())
    together = check(report["arms"])
    assert together is not None
    assert told(together) in found
    rows = [line for line in found.splitlines() if line.startswith("| arm ")][1:]
    assert rows == [
        "| arm 1 | p99 | 100.0 | 85.0 to 115.0 | 130.0 |",
        "| arm 1 | p99.9 | 400.0 | 340.0 to 460.0 | never |",
        "| arm 2 | p50 | never | never | 90.0 |",
    ]
    assert "have changed since" not in found
    assert "Every arm of `latency.jsonl` with" in found
    (folder / "latency.jsonl").rename(folder / "latency-before.jsonl")
    assert "Every arm of `latency-before.jsonl` with" in section(page(folder, "."), title)
    write(folder / "latency-before.jsonl", [latency_row("hedge", TIMES, run=2)])
    found_again = section(page(folder, "."), title)
    assert "Every arm with" in found_again
    assert "have changed since" in found_again
    good = json.loads((folder / "validation.json").read_text())
    same = percentile(100.0, 90.0, True)
    good["arms"] = [{**good["arms"][0], "percentiles": dict.fromkeys(COMPARED, same)}]
    (folder / "validation.json").write_text(json.dumps(good))
    found = section(page(folder, "."), title)
    assert "times of these runs, 20,000 images a run. " in found
    assert "Beyond" not in found
    good["arms"][0] |= {"same_arrivals": True, "simulated": [[{"queries": 400}, {"queries": 600}]]}
    (folder / "validation.json").write_text(json.dumps(good))
    again = section(page(folder, "."), title)
    assert "these runs, requests coming when they came there, 1,000 images a run. " in again
    (folder / "validation.json").write_text("{}")
    with pytest.raises(UserError, match="is no comparison of `simulate --measured`"):
        page(folder, ".")
    (folder / "validation.json").write_text(json.dumps(good))
    assert "None is left out." in found
    assert not any(words in found for words in ("never", "not judged", "Those that do not"))


def test_a_headline_of_a_setting_that_was_not_run_says_so(tmp_path: Path) -> None:
    write(tmp_path / "latency.jsonl", [latency_row("coded", TIMES, batch=BATCH + 1)])
    assert headlines(tmp_path)["latency"].startswith("Not measured yet for requests of 10")


def test_the_map_the_ablation_and_the_speeds(folder: Path) -> None:
    text = page(folder, ".")
    where = section(text, "Where each policy wins")
    assert "| held | 10 | coded | uncoded |" in where
    assert "| held | 10 | 20% |" in where
    assert "p99.9 of 2 places" in where
    assert "Simulated with the service's own rules. The policy" in where
    assert "by load:\n" in where
    assert (
        "doing nothing (none: not even at 20%; ≥ 50%: at the highest load simulated, too)" in where
    )
    assert "| uncoded | 1 of 2 | 1.34 | 1.67 | 0 | 1 | 1.34 |" in where
    assert "| coded | 2 of 2 | 1.00 | 1.00 |" in where
    assert "In 1 of 2 places the 95 % interval" in where
    assert "4 runs of 20,000 images each, which arrive at random." in where
    worth = section(text, "What each part of the design is worth")
    assert "| mnist, test split, k = 10 |" in worth
    assert "| 2 | no g' | 98.00 | 91.00 | -4.00 | 1 | 60 |" in worth
    assert "quick" not in worth
    speeds = section(text, "Speed of the invertible network")
    assert "train_ratio                       1.40   (1.30 to 1.50 over the rounds)" in speeds
    assert (
        "| training step over one with all norms in the forward pass | 1.3 | 1.40 | 1.30 to"
        in speeds
    )
    assert "embedding of one image" not in speeds  # it was not measured


def test_rows_of_an_earlier_sweep_are_left_out(folder: Path) -> None:
    path = folder / "map.jsonl"
    write(path, [sweep_row(0.5, "coded", 50.0, 1.1)])
    where = section(page(folder, "."), "Where each policy wins")
    assert "| held | 10 | coded | coded |" in where
    assert "4 runs of 20,000 images each, which arrive at random. All 2 places met the" in where
    write(path, [{**sweep_row(0.2, "hedge", 9.0, 1.0), "scenario": {"workers": 20}}])
    where = section(page(folder, "."), "Where each policy wins")
    assert "| held | 10 | hedge |" in where
    assert "1 runs of" in where
    assert "A million images took 24 s of a core (24 to 24) on a machine." in where


def test_a_map_without_a_place_that_every_policy_has(tmp_path: Path) -> None:
    rows = [sweep_row(0.2, "uncoded", 9.0, 1.0), sweep_row(0.5, "coded", 9.0, 1.1)]
    write(tmp_path / "map.jsonl", rows)
    where = section(page(tmp_path, "."), "Where each policy wins")
    assert "| held | 10 | uncoded | coded |" in where
    assert "p99.9 of" not in where


def test_the_map_says_what_its_tasks_take(tmp_path: Path) -> None:
    times = {"service": {"distribution": "lognormal", "ms": 24.0, "shape": 0.1}}
    rows = [sweep_row(0.2, "coded", 9.0, 1.1), sweep_row(0.5, "coded", None, 1.1)]
    for one in rows:
        one["scenario"] = {**times, "encode": {"ms": 0.96}}
    write(tmp_path / "map.jsonl", rows)
    where = section(page(tmp_path, "."), "Where each policy wins")
    assert "rules: a query takes 24.12 ms in the mean, encoding 0.96 ms for each image" in where
    assert "of a group, and groups are coded after 20 ms. The policy" in where
    assert "by load (none: every policy loses more than one request in a thousand):" in where


def test_cells_of_one_sweep_differ_in_their_place_alone() -> None:
    path = Path(__file__).parents[2] / "configs" / "bench" / "simulate-map.json"
    found = parse_sweep(read_json(path), path)
    assert found is not None
    rows = [
        {
            "cell": cell._asdict(),
            "cpu_seconds_per_million": 30.0,
            "machine": "a machine",
            "scenario": scenario.model_dump(mode="json", exclude_defaults=True),
        }
        for cell, scenario in found.scenarios()
    ]
    assert results._current_cells(rows) == rows
    seeds: dict[tuple[str, int, float], set[int]] = {}
    for cell, scenario in found.scenarios():
        seeds.setdefault((cell.stragglers, cell.batch, cell.load), set()).add(scenario.seed)
    assert all(len(of_a_place) == 1 for of_a_place in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds)
    assert results._draws(rows, len(seeds)) == ""


def test_quick_rows_are_marked(tmp_path: Path) -> None:
    fast = row("coded-invnet", 0.93)
    fast["settings"]["quick"] = True
    write(tmp_path / "accuracy.jsonl", [fast])
    write(tmp_path / "ablation.jsonl", [ablation_row("all", 0.9, quick=True)])
    text = page(tmp_path, ".")
    assert section(text, "Accuracy").count("This is the quick version") == 1
    assert section(text, "What each part of the design is worth").count("the quick version") == 1
    assert "the quick version" in headlines(tmp_path)["accuracy"]


def test_pictures_are_linked_where_they_are(folder: Path) -> None:
    assert "![" not in page(folder, "results")
    (folder / "map.png").touch()
    (folder / "accuracy-k.png").touch()
    text = page(folder, "results")
    assert "](results/map.png)" in section(text, "Where each policy wins")
    caption = "Recovered accuracy against k, each method on its better base model"
    picture = f"{caption}:\n\n![{caption}](results/accuracy-k.png)"
    assert picture in section(text, "Accuracy")
    assert text.count("![") == 2


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "speed.json").write_text("{")
    with pytest.raises(UserError, match=r"speed\.json is not JSON"):
        page(folder, ".")
