from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.bench import latency_plots, latency_tables
from codedinvnet.bench.latency_grid import load_latency_grid
from codedinvnet.quantiles import rank_of
from codedinvnet.rows import append_row
from codedinvnet.simulation import figures
from tests.bench.canned import MACHINE, latency_row


def sample(seed: int, scale: float = 1.0, count: int = 1000) -> np.ndarray:
    return scale * (50 + np.random.default_rng(seed).exponential(20, count))


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    found = [latency_row("coded", sample(run), run=run) for run in (1, 2, 3)]
    found += [
        latency_row("uncoded", sample(run, 2.0), run=run, accuracy=0.993) for run in (1, 2, 3)
    ]
    found += [latency_row("hedge", sample(1, 1.2))]
    found += [latency_row("replicate", sample(1), error="RuntimeError: out of luck")]
    return found


def test_percentiles_are_of_all_runs_together(rows: list[dict[str, Any]]) -> None:
    uncoded, hedge, coded = latency_tables.lines_of(rows)
    assert [x.label for x in (uncoded, hedge, coded)] == ["uncoded", "hedge", "coded"]
    together = np.sort(np.concatenate([sample(run) for run in (1, 2, 3)]))
    for name, place in (("p99", 2969), ("p995", 2984), ("p999", 2996)):
        value = coded.latency(name)
        assert value is not None
        assert value.value == pytest.approx(together[place], abs=1e-3)
        assert value.interval is not None
        assert value.interval[0] < value.value < value.interval[1]
    median = coded.latency("p50")  # the tails that rows keep do not reach so far
    assert median is not None
    medians = [np.sort(sample(run))[499] for run in (1, 2, 3)]
    assert median.value == pytest.approx(math.exp(np.log(medians).mean()), abs=1e-3)


def test_intervals_are_students_over_runs_on_the_logarithm() -> None:
    assert figures.half_width([1.0, 2.0], 1.5) is None
    assert figures.half_width([1.0, math.inf, 2.0], 1.5) is None
    half = figures.half_width([1.0, 2.0, 3.0], 2.0)
    assert half == pytest.approx(4.302653 / math.sqrt(3))  # t(0.975, 2) s / sqrt(n), s = 1


def test_a_single_run_has_the_interval_of_its_stretches(rows: list[dict[str, Any]]) -> None:
    hedge = latency_tables.lines_of(rows)[1]
    median, far = hedge.latency("p50"), hedge.latency("p999")
    assert median is not None
    assert median.interval is not None
    assert far is not None
    assert far.interval is None  # a thousand requests are too few


def test_lost_queries_are_infinitely_late() -> None:
    (line,) = latency_tables.lines_of([latency_row("uncoded", sample(1, count=980), lost=20)])
    assert line.latency("p50") is not None
    far = line.latency("p99")
    assert far is not None
    assert far.value == math.inf
    (cells,) = latency_tables.cells([line])
    found = dict(zip(latency_tables.COLUMNS, cells, strict=True))
    assert found["p99"] == "never"
    assert found["lost"] == "2.00 %"


def test_lost_requests_are_never_and_not_bold() -> None:
    rows = [latency_row("uncoded", sample(run, 2.0), run=run) for run in (1, 2, 3)]
    rows += [latency_row("coded", sample(run, count=980), lost=20, run=run) for run in (1, 2, 3)]
    lines = latency_tables.lines_of(rows)
    uncoded, coded = latency_tables.cells(lines)
    found = dict(zip(latency_tables.COLUMNS, coded, strict=True))
    assert found["p99.5"] == "never"
    assert "**" not in "".join(coded)
    assert uncoded[latency_tables.COLUMNS.index("p99.5")].startswith("**")
    assert "".join(uncoded).count("**") == 2


def test_bold_is_only_what_enough_requests_are_beyond() -> None:
    """Of three runs of 1,000 requests, three are beyond p99.9, of a run of 1,000 ten beyond p99."""
    rows = [latency_row("coded", sample(run), run=run) for run in (1, 2, 3)]
    assert list(latency_tables.best(latency_tables.lines_of(rows)).values()) == ["p995"]
    rows += [latency_row("hedge", sample(1, 0.5))]  # of one run: both are judged by its p99
    assert list(latency_tables.best(latency_tables.lines_of(rows)).values()) == ["p99"]
    long = [latency_row("coded", sample(run, count=4000), run=run) for run in (1, 2, 3)]
    assert list(latency_tables.best(latency_tables.lines_of(long)).values()) == ["p999"]
    short = [latency_row("coded", sample(1, count=300))]
    assert latency_tables.best(latency_tables.lines_of(short)) == {}


def test_two_lost_requests_of_three_thousand_leave_the_percentile_of_all() -> None:
    rows = [latency_row("coded", sample(run), run=run) for run in (1, 2)]
    rows += [latency_row("coded", sample(3, count=998), run=3, lost=2)]
    (line,) = latency_tables.lines_of(rows)
    together = [*sample(1), *sample(2), *sample(3, count=998), math.inf, math.inf]
    found = line.latency("p999")
    assert found is not None
    assert found.value == pytest.approx(sorted(together)[2996], abs=1e-3)
    assert found.interval is None  # one run has no finite p99.9
    latency, _ = latency_plots.curve(line)
    assert np.isfinite(latency).all()


def test_percentiles_of_different_ranks_are_not_compared() -> None:
    rows = [latency_row("coded", sample(1, 2.0)), latency_row("hedge", sample(1, count=300))]
    lines = latency_tables.lines_of(rows)
    assert [(latency_tables.tail(line) or [""])[0] for line in lines] == ["p99", "p999"]
    assert [label for _, label in latency_tables.farthest(lines)] == ["coded"]


def test_methods_that_were_not_measured_side_by_side_are_named() -> None:
    rows = [
        latency_row(label, sample(run), run=run)
        for run in (1, 2)
        for label in ("uncoded", "hedge", "coded")
    ]
    assert "side by side" not in latency_tables.overview(rows)
    for row in rows:
        if row["label"] == "coded":
            row |= {"commit": "another", "processors_busy": 0.2}
    text = latency_tables.overview(rows)
    assert (
        "Not measured side by side, but at other commits: uncoded, hedge (the processors 40% busy "
        "in the mean); coded (the processors 20% busy in the mean)." in text
    )


def test_medians_of_few_requests_are_no_tails() -> None:
    few = [latency_row(label, sample(1, count=300)) for label in ("coded", "hedge")]
    assert latency_tables.overview(few) == ""
    enough = [latency_row(label, sample(1)) for label in ("coded", "hedge")]
    assert "| coded | 1 of 1 |" in latency_tables.overview(enough)


def test_the_overview_compares_methods_in_the_same_runs() -> None:
    """Whatever a run's arrivals did to all of them does not count."""
    scales = {"held": (1.0, 1.04), "pareto": (2.0, 1.0), "slower": (3.0, 1.0)}
    rows = [
        latency_row(label, run * scale * sample(1), stragglers=stragglers, run=run)
        for stragglers, pair in scales.items()
        for run in (1, 2)
        for label, scale in zip(("uncoded", "coded"), pair, strict=True)
    ]
    rows.append(latency_row("uncoded", sample(1), stragglers="exponential"))  # coded lacks it
    text = latency_tables.overview(rows)
    assert "| uncoded | 2 of 6 | 2.00 | 3.00 | 0 | 4 | 2.00 |" in text
    assert "| coded | 6 of 6 | 1.00 | 1.04 |  |  |  |" in text
    assert "Tails of 6 runs (3 settings: " in text
    lost = latency_row("coded", sample(1, count=900), lost=100, stragglers="exponential")
    more = latency_tables.overview([*rows, lost])
    assert "| coded | 6 of 7 | 1.00 | never |" in more
    assert "| uncoded | 3 of 7 | 2.00 | 3.00 | 1 | 4 | 2.00 |" in more
    few = latency_tables.overview([*rows, latency_row("hedge", sample(1), stragglers="held")])
    assert few.replace(" Left out, of too few runs: hedge, 1 runs.", "") == text
    assert len(few) > len(text)
    assert latency_tables.overview([]) == ""
    assert latency_tables.overview(rows[:1] + rows[5:6]) == ""


@pytest.mark.parametrize(("count", "percentile"), [(10_000, 99.9), (2000, 99.5), (1000, 99)])
def test_a_runs_tail_has_ten_requests_beyond_it(count: int, percentile: float) -> None:
    (line,) = latency_tables.lines_of([latency_row("coded", sample(1, count=count))])
    (tails,) = latency_tables.run_tails([line]).values()
    expected = np.sort(sample(1, count=count))[round(count * percentile / 100) - 1]
    assert tails["coded"] == pytest.approx(expected, rel=1e-3)
    (short,) = latency_tables.lines_of([latency_row("coded", sample(1, count=15))])
    assert latency_tables.run_tails([short]) == {}


def test_work_stands_beside_the_tails() -> None:
    rows = [
        latency_row(label, sample(1), run=run) | {"work_per_query": work + 0.1 * run}
        for label, work in (("uncoded", 1.0), ("coded", 1.1))
        for run in (1, 2)
    ]
    text = latency_tables.overview(rows)
    assert "| uncoded | 2 of 2 | 1.00 | 1.00 | 0 | 0 | 1.00 | 1.15 |" in text
    assert "| coded | 2 of 2 | 1.00 | 1.00 |  |  |  | 1.25 |" in text
    alone = latency_row("coded", sample(1), stragglers="slower") | {"work_per_query": 9.0}
    assert latency_tables.overview([*rows, alone]) == text  # of the runs whose tails are compared


def test_coded_tails_stand_beside_the_published_ones() -> None:
    flat = np.full(10_000, 50.0)
    late, less = flat.copy(), flat.copy()
    late[:20], less[:20] = 450.0, 250.0
    rows = [latency_row("uncoded", late), latency_row("coded", less)]
    text = latency_tables.overview(rows)
    told = "of the 1 settings with 10 requests beyond it 44%, least 44%), up to 2.0 times (2.0)."
    assert f"Here, of coded: by up to 44% (median {told}" in text
    short = [latency_row(label, less[:9000]) for label in ("uncoded", "coded")]
    assert "Published of ParM" not in latency_tables.overview(short)
    assert "Published of ParM" not in latency_tables.overview(rows[1:])


def test_quick_rows_have_no_p999() -> None:
    (line,) = latency_tables.lines_of([latency_row("coded", sample(1, count=300), quick=True)])
    assert line.latency("p999") is None
    assert (latency_tables.tail(line) or [""])[0] == "p99"
    text = latency_tables.latency_table([latency_row("coded", sample(1, count=300), quick=True)])
    assert "| – |" in text
    assert "quick version" in text


def test_the_lowest_tail_is_bold_and_so_is_an_equal_one(rows: list[dict[str, Any]]) -> None:
    for run in (1, 2, 3):
        rows.append(latency_row("coded+hedge", sample(run, 0.5), run=run, stragglers="held"))
    rows.append(latency_row("coded", sample(4, 0.5), stragglers="slower"))
    found = {
        (cells[2], cells[3]): dict(zip(latency_tables.COLUMNS, cells, strict=True))
        for cells in latency_tables.cells(latency_tables.lines_of(rows))
    }
    assert found["pareto", "coded"]["p99"].startswith("**")
    assert not found["pareto", "uncoded"]["p99"].startswith("**")
    assert found["held", "coded+hedge"]["p99.5"].startswith("**")  # alone in its setting
    assert "**" not in found["slower", "coded"]["p99"]  # a single run, without an interval
    assert found["pareto", "uncoded"]["runs"] == "3"
    assert found["pareto", "coded"]["accuracy"] == "99.00 ± 0.00"
    assert found["pareto", "hedge"]["accuracy"] == "99.00"


def test_shares_and_work_have_intervals_over_three_runs(tmp_path: Path) -> None:
    rows = [
        latency_row(
            "coded",
            sample(run, count=1000 - 10 * run),
            run=run,
            lost=10 * run,
            decoded=0.01 * run,
            accuracy=0.9 + 0.01 * run,
            work=0.9 + 0.1 * run,
        )
        for run in (1, 2, 3)
    ]
    (cells,) = latency_tables.cells(latency_tables.lines_of(rows))
    found = dict(zip(latency_tables.COLUMNS, cells, strict=True))
    half = 4.302653 / math.sqrt(3)  # of 1, 2, 3
    assert found["decoded"] == found["lost"] == f"2.00 ± {half:.2f} %"
    assert found["accuracy"] == f"92.00 ± {half:.2f}"
    assert found["work"] == f"1.10 ± {half / 10:.2f}"
    for one in rows:
        append_row(tmp_path / "latency.jsonl", one)
    with open(latency_tables.write(tmp_path / "latency.jsonl")[1], newline="") as file:
        (line,) = csv.DictReader(file)
    assert float(line["work_per_query_high"]) == pytest.approx(1.1 + half / 10, abs=1e-4)
    assert float(line["missing_share_low"]) == pytest.approx(0.02 - half / 100, abs=1e-4)
    (two,) = latency_tables.csv_cells(latency_tables.lines_of(rows[:2]))
    row = dict(zip(latency_tables.CSV_COLUMNS, two, strict=True))
    assert (row["decoded_share"], row["decoded_share_low"]) == ("0.015", "")


def test_the_table_says_how_workers_behave_as_machines(rows: list[dict[str, Any]]) -> None:
    text = latency_tables.latency_table(rows)
    assert text.startswith("| images of a request | load | stragglers | method | p50 |")
    assert "11 workers share 2 cores: a query's task waits 40.0 ms without a processor" in text
    assert "mean service time was 42.1 ms, the processors were 40 % busy. " in text
    rows[0]["processors_own"] = 0.3
    text = latency_tables.latency_table(rows)
    others = "other programs than service and client took at most 10% in a run"
    assert f"the processors were 40 % busy, {others}. " in text
    rows[0]["front_ms_per_query"] = 2.44
    text = latency_tables.latency_table(rows)
    assert f"{others}, the front end computed 2.4 ms a query. " in text
    assert MACHINE in text
    assert latency_tables.latency_table([]) == ""


def test_older_settings_other_benchmarks_and_failures(rows: list[dict[str, Any]]) -> None:
    old = [latency_row("coded", sample(9, 5.0), run=run, wait_ms=1.0) for run in (1, 2)]
    other = {**rows[0], "kind": "accuracy", "key": "another"}
    found = latency_tables.lines_of([*old, other, *rows])
    assert [(x.label, len(x.rows)) for x in found] == [("uncoded", 3), ("hedge", 1), ("coded", 3)]
    page = latency_tables.report(rows)
    assert "| replicate, run 1 | RuntimeError: out of luck |" in page
    again = latency_tables.report([*rows, latency_row("replicate", sample(1))])
    assert "Failed runs" not in again


def test_methods_are_compared_under_the_same_settings_and_faults() -> None:
    rows = [latency_row(label, sample(1)) for label in ("uncoded", "coded")]
    rows += [latency_row("coded", sample(1), stragglers="held", error="RuntimeError: no")]
    backup = latency_row("small-backup", sample(2))  # has a setting of its own
    assert len(latency_tables.lines_of([*rows, backup])) == 3
    late = [latency_row("hedge", sample(2), wait_ms=1.0)]
    late += [latency_row("hedge", sample(2), held_ms=50.0)]
    for one in late:
        (line,) = latency_tables.lines_of([*rows, one])
        assert line.label == "hedge"
    assert "Failed runs" in latency_tables.report([*rows, latency_row("hedge", sample(2))])
    assert "Failed runs" not in latency_tables.report([*rows, late[0]])


def test_errors_stay_in_their_cell() -> None:
    page = latency_tables.report([latency_row("coded", sample(1), error="OSError: a | b\n  c")])
    assert "| coded, run 1 | OSError: a \\| b c |\n" in page


def test_the_note_says_how_long_parities_waited(rows: list[dict[str, Any]]) -> None:
    lines = latency_tables.lines_of([*rows, latency_row("small-backup", sample(1))])
    note = latency_tables.note(lines)
    assert "A parity waits 40 ms and 1.6 ms for each image of its group, as E costs" in note
    assert "A small backup waits 4 ms for each image of its group, as it may cost 1/k" in note


def test_the_note_names_an_engine_other_than_pytorch(rows: list[dict[str, Any]]) -> None:
    assert "workers compute" not in latency_tables.note(latency_tables.lines_of(rows))
    for row in rows:
        row["settings"]["engine"] = "onnxruntime"
    note = latency_tables.note(latency_tables.lines_of(rows))
    assert "k = 10, workers compute by onnxruntime. " in note


def test_runs_of_the_grid_without_a_row_are_counted(rows: list[dict[str, Any]]) -> None:
    path = Path(__file__).parents[2] / "configs" / "bench" / "latency.json"
    block = {"batches": (10,), "loads": (0.4,), "stragglers": ("pareto",)}
    grid = load_latency_grid(path)
    grid = grid.model_copy(update={"blocks": (grid.blocks[0].model_copy(update=block),)})
    others = "replicate, 2 of 3 runs; "
    whole = f"{others}hedge, 2 of 3 runs; coded+hedge, 3 of 3 runs; coded+guess, 3 of 3 runs; "
    assert (
        latency_tables.describe_gaps(rows, grid)
        == f"Not measured: {whole}small-backup, 3 of 3 runs.\n"
    )
    labels = ("replicate", "coded+hedge", "coded+guess", "small-backup")
    more = [latency_row(label, sample(1), run=run) for label in labels for run in (1, 2, 3)]
    more.append(latency_row("hedge", sample(1), run=2, error="no"))  # it has a table of its own
    more.append(latency_row("hedge", sample(1), run=3))
    assert latency_tables.describe_gaps([*rows, *more], grid) == ""
    assert latency_tables.describe_gaps([latency_row("hedge", sample(1), quick=True)], grid) == ""


def test_the_curve_stops_where_it_stands_for_less_than_a_request(
    rows: list[dict[str, Any]],
) -> None:
    hedge, coded = latency_tables.lines_of(rows)[1:]
    for line, least in ((hedge, 1e-3), (coded, 1 / 3000)):
        latency, later = latency_plots.curve(line)
        assert (np.diff(latency) >= 0).all()
        assert (np.diff(later) < 0).all()
        assert least * 0.99 < later[-1] < 1.5 * least
    latency, later = latency_plots.curve(coded)
    together = np.sort(np.concatenate([sample(run) for run in (1, 2, 3)]))
    for value, share in list(zip(latency, later, strict=True))[-8:]:
        assert value == pytest.approx(together[rank_of(3000, 1 - share)], abs=1e-3)
    for share in (0.3, 0.6, 0.8):  # of which the rows keep quantiles alone
        at = int(np.argmin(np.abs(1 - later - share)))
        assert latency[at] == pytest.approx(np.quantile(together, 1 - later[at]), rel=0.02)
    latency, later = latency_plots.curve(hedge)
    at = int(np.argmin(np.abs(later - 0.1)))
    assert latency[at] == pytest.approx(np.quantile(sample(1, 1.2), 0.9), rel=0.02)


@pytest.mark.parametrize(("longest", "named"), [(1000.0, True), (100_000.0, False)])
def test_of_many_decades_only_these_are_named(longest: float, named: bool) -> None:
    one = latency_row("coded", np.geomspace(10.0, longest, 1000))
    figure = latency_plots.tails(latency_tables.lines_of([one]))
    assert figure is not None
    ticks = figure.axes[0].get_xticks()
    assert 100 in ticks
    assert (200 in ticks) == named


def test_files_are_made_from_the_rows_alone(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "latency.jsonl"
    assert latency_tables.write(path) == latency_plots.write(path) == []
    for one in rows:
        append_row(path, one)
    page, table = latency_tables.write(path)
    assert page.read_text().startswith("# Latency of every method\n")
    with open(table, newline="") as file:
        read = {line["method"]: line for line in csv.DictReader(file)}
    assert set(read) == {"uncoded", "hedge", "coded"}
    assert float(read["coded"]["p999_ms_low"]) < float(read["coded"]["p999_ms"])
    assert read["hedge"]["p999_ms_low"] == ""
    assert read["coded"]["requests"] == "3000"
    pictures = latency_plots.write(path)
    assert [p.name for p in pictures] == ["latency-tails.png", "latency-accuracy.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures)
