"""Tables of `bench latency`, made from its rows alone: Markdown and CSV."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codedinvnet.bench.latency_grid import LatencyGrid, arms, long_enough
from codedinvnet.bench.tables import as_csv, markdown, one_line, percent
from codedinvnet.files import write_atomically
from codedinvnet.models.runtime import PYTORCH
from codedinvnet.rows import Row, current_latency, latency_place, read_rows
from codedinvnet.serving.policies import in_order
from codedinvnet.simulation.figures import (
    QUANTILES,
    SAME,
    TAIL,
    Estimate,
    RunPercentile,
    half_width,
    latencies_of,
    latency_of,
    percentile_of_runs,
)

TITLES = {"p50": "p50", "p99": "p99", "p995": "p99.5", "p999": "p99.9"}
TAILS = ("p99", "p995", "p999")
"""What methods are compared by; a median is no tail."""
CODED, UNCODED = "coded", "uncoded"
"""The method that the others are compared with, and the one without any redundancy."""


@dataclass(frozen=True)
class Line:
    """One method in one setting, over its runs."""

    dataset: str
    batch: int
    load: float
    stragglers: str
    label: str
    rows: tuple[Mapping[str, Any], ...]

    @property
    def setting(self) -> tuple[str, int, float, str]:
        """What methods are compared in."""
        return self.dataset, self.batch, self.load, self.stragglers

    def latency(self, name: str) -> Estimate | None:
        """Return a percentile (of QUANTILES) in ms; None if the runs were too short for it.

        It is the one of `percentile_of_runs`, with the largest latencies that the rows keep.
        """
        share = QUANTILES[name]
        for row in self.rows:
            if not long_enough(row["requests"], share, row["settings"]["quick"]):
                return None
        # None stands for infinity now: that of a run which lost as many requests.
        own = [Estimate(latency_of(row[f"{name}_ms"]), row[f"{name}_ms_95"]) for row in self.rows]
        runs = [
            RunPercentile(one, latencies_of(row["tail_ms"]), row["requests"])
            for one, row in zip(own, self.rows, strict=True)
        ]
        return percentile_of_runs(runs, share)

    def mean(self, figure: str) -> float:
        """Return the mean of a figure over the runs."""
        return statistics.fmean(row[figure] for row in self.rows)

    def spread(self, figure: str) -> float | None:
        """Return the half width of its 95 % interval; None with fewer than three runs."""
        return half_width([row[figure] for row in self.rows], self.mean(figure))


def lines_of(rows: Iterable[Mapping[str, Any]]) -> list[Line]:
    """Put the finished rows that belong together in order, runs of one arm on one line."""
    found: dict[tuple[str, int, float, str, str], list[Row]] = {}
    for row in current_latency(rows):
        if row["error"] is None:
            found.setdefault(latency_place(row), []).append(row)
    lines = [Line(*place, tuple(runs)) for place, runs in found.items()]
    labels = in_order(line.label for line in lines)
    return sorted(
        lines, key=lambda x: (x.dataset, -x.batch, x.load, x.stragglers, labels.index(x.label))
    )


def tail(line: Line) -> tuple[str, Estimate] | None:
    """Return the name and value of a line's p99.9, else p99; None if it has none."""
    for name in ("p999", "p99"):
        value = line.latency(name)
        if value is not None:
            return name, value
    return None


def farthest(lines: Sequence[Line]) -> dict[tuple[Any, ...], tuple[str, Estimate]]:
    """Return by (setting, label) the tails that can be compared.

    In a setting they are all the same percentile; lines that do not have it are left out.
    """
    tails = {(line.setting, line.label): found for line in lines if (found := tail(line))}
    beyond = {(setting, name) for (setting, _), (name, _) in tails.items()}
    return {
        (setting, label): (name, value)
        for (setting, label), (name, value) in tails.items()
        if name == "p999" or (setting, "p999") not in beyond
    }


def best(lines: Sequence[Line]) -> dict[tuple[Any, ...], str]:
    """Return (setting, label) of the lines with the lowest tail of their setting, or an equal one.

    Equal is within 5 %, as in the simulator's map. The value is the percentile's name: the
    farthest beyond which all runs of every line of the setting together have TAIL requests.
    """
    found: dict[tuple[Any, ...], str] = {}
    for setting in dict.fromkeys(line.setting for line in lines):
        own = [line for line in lines if line.setting == setting]
        fewest = min(sum(row["requests"] for row in line.rows) for line in own)
        held = [name for name in TAILS if (1 - QUANTILES[name]) * fewest >= TAIL]
        tails = {line.label: line.latency(held[-1]) for line in own} if held else {}
        values = {label: one.value for label, one in tails.items() if one is not None}
        lowest = min(values.values(), default=math.inf)
        if math.isfinite(lowest):
            near = [label for label, value in values.items() if value <= (1 + SAME) * lowest]
            found |= {(setting, label): held[-1] for label in near}
    return found


COLUMNS = (
    "images of a request",
    "load",
    "stragglers",
    "method",
    *TITLES.values(),
    "decoded",
    "lost",
    "accuracy",
    "work",
    "runs",
)


def _shown(value: Estimate | None, bold: bool) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value.value):
        return "never"
    text = f"**{value.value:.1f}**" if bold else f"{value.value:.1f}"
    if value.interval is None:
        return text
    low, high = value.interval
    return f"{text} ({low:.1f}–{high:.1f})"


def _percent(line: Line, figure: str) -> str:
    """Return a figure in %, with its interval if there is one."""
    return percent(line.mean(figure), line.spread(figure))


def cells(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Return the cells of the table, a row a line.

    The lowest tails of a setting (`best`) are bold if they have an interval, by which to judge
    them.
    """
    lowest = best(lines)
    found = []
    for line in lines:
        name = lowest.get((line.setting, line.label), "")
        values = {title: line.latency(title) for title in TITLES}
        times = [
            _shown(value, bool(title == name and value is not None and value.interval))
            for title, value in values.items()
        ]
        work = line.spread("work_per_query")
        found.append(
            (
                str(line.batch),
                f"{line.load:.0%}",
                line.stragglers,
                line.label,
                *times,
                f"{_percent(line, 'decoded_share')} %",
                f"{_percent(line, 'missing_share')} %",
                _percent(line, "accuracy"),
                f"{line.mean('work_per_query'):.2f}" + ("" if work is None else f" ± {work:.2f}"),
                str(len(line.rows)),
            )
        )
    return found


def note(lines: Sequence[Line]) -> str:
    """Return what must be known to read the table: how it was measured."""
    rows = [row for line in lines for row in line.rows]

    def span(figure: str, digits: int = 1, factor: float = 1.0) -> str:
        values = [factor * row[figure] for row in rows if row.get(figure) is not None]
        if not values:
            return "an unknown share of"
        low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
        return low if low == high else f"{low} to {high}"

    def each(figure: str, between: str = ", ") -> str:
        return between.join(str(value) for value in sorted({row[figure] for row in rows}))

    quick = any(row["settings"]["quick"] for row in rows)
    waits = {
        tuple(row["settings"]["parity_wait_ms"])
        for line in lines
        for row in line.rows
        if "parity_wait_ms" in row["settings"]
    }
    parities = "".join(
        f"{'A parity' if task else 'A small backup'} waits "
        + (f"{task:g} ms and " if task else "")
        + f"{image:.2g} ms for each image of its group, "
        + ("as E costs beside f. " if task else "as it may cost 1/k of f for each. ")
        for task, image in sorted(waits, reverse=True)
    )
    commits = ", ".join(sorted({row["commit"][:7] for row in rows}))
    own = ""
    others = [
        max(0.0, row["processors_busy"] - row["processors_own"])
        for row in rows
        if None not in (row.get("processors_busy"), row.get("processors_own"))
    ]
    if others:
        own = f", other programs than service and client took at most {max(others):.0%} in a run"
    if any(row.get("front_ms_per_query") is not None for row in rows):
        own += f", the front end computed {span('front_ms_per_query')} ms a query"
    engines = {row["settings"].get("engine", PYTORCH) for row in rows}
    engine = "" if engines == {PYTORCH} else f", workers compute by {', '.join(sorted(engines))}"
    return (
        "Latencies in ms from when a request was due until its last image was answered; "
        "percentiles of all runs' requests together where the hundred largest of each reach down "
        "to them, else the geometric mean of the runs' own, with 95 % intervals over runs, as all "
        "± are (of one run: over stretches of it; of two: none); bold, where it has an interval: "
        f"the lowest of a setting, or within {SAME:.0%} of it, by the farthest percentile beyond "
        f"which its runs together have {TAIL} requests. "
        f"Open loop, Poisson arrivals, {each('queries')} images a run, `{each('bundle')}`, "
        f"k = {each('k')}{engine}. "
        f"{each('workers')} workers share {each('cores')} cores: a query's task waits "
        f"{each('wait_ms')} ms without a processor besides computing, so that workers behave as "
        "machines of their own as far as a processor is free when they need it; the mean service "
        f"time was {span('mean_service_ms')} ms, the processors were "
        f"{span('processors_busy', 0, 100)} % busy{own}. {parities}Load is a share "
        f"of {each('workers')} workers / {each('service_ms')} ms; work is in service times a "
        "query, without injected delays. A query without an answer is lost: it counts as "
        "infinitely late and as wrong. "
        + (
            "This is the quick version: one short run, and a hastily trained backup. "
            if quick
            else ""
        )
        + f"Measured on {each('machine', '; ')}, at commit {commits}."
    )


def latency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of rows, with the note that it cannot be read without.

    "" if no run has finished.
    """
    lines = lines_of(rows)
    return f"{markdown(COLUMNS, cells(lines))}\n{note(lines)}\n" if lines else ""


def run_tails(lines: Iterable[Line]) -> dict[tuple[Any, ...], dict[str, float]]:
    """Return (setting, seed) -> method -> the farthest percentile that the run holds TAIL beyond.

    Runs of one seed met the same arrivals. A tail is infinite if too many queries were lost.
    """
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for line in lines:
        for row in line.rows:
            held = [n for n in TAILS if (1 - QUANTILES[n]) * row["requests"] >= TAIL]
            if held:
                value = latency_of(row[f"{held[-1]}_ms"])
                found.setdefault((line.setting, row["seed"]), {})[line.label] = value
    return found


def overview(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how every method's tail compares with the others' of the same runs; "" without rows.

    Of methods that have at least half as many runs as any, and of runs of which each of these has
    its own: a method of which few are measured does not take the others' away.
    """
    tails = run_tails(lines_of(rows))
    counts = Counter(label for run in tails.values() for label in run)
    labels = [label for label in counts if 2 * counts[label] >= max(counts.values())]
    whole = {
        place: compared
        for place, run in tails.items()
        if len(compared := {label: run[label] for label in labels if label in run}) == len(labels)
        and math.isfinite(min(compared.values()))
    }
    if not whole:
        return ""
    fewer = [f"{label}, {counts[label]} runs" for label in counts if label not in labels]
    settings = {setting for setting, _ in whole}
    lines = lines_of(rows)
    work: dict[str, list[float]] = {label: [] for label in labels}
    for line in lines:
        for row in line.rows:
            if line.label in work and (line.setting, row["seed"]) in whole:
                work[line.label].append(row["work_per_query"])
    return (
        f"{compare_tails(list(whole.values()), labels, _means(work))}\n"
        f"Tails of {len(whole)} runs ({len(settings)} settings: images of a request, load and "
        "stragglers): of each the farthest percentile beyond which it has ten requests (10,000 "
        "single images: p99.9; 1,000 requests of ten: p99), over the lowest of all methods in that "
        f"run, which met the same arrivals, and beside {CODED}'s, from {SAME:.0%} on. Never: more "
        "queries were lost than the percentile allows. (With ten beyond it, the percentile of a "
        "tail with exponent 1.5 varies by a fifth from run to run: a few runs tell little.) "
        "Work: in service times a query, the mean."
        + (f" Left out, of too few runs: {'; '.join(fewer)}." if fewer else "")
        + apart(current_latency(rows))
        + f" {beside_published(lines)}".rstrip()
        + "\n"
    )


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.fmean(each) for name, each in values.items()}


def beside_published(lines: Iterable[Line]) -> str:
    """Return ParM's published tails, and how coded's compare with no code's here; "" without.

    Of settings whose runs together have TAIL requests beyond the p99.9.
    """
    found = {(line.setting, line.label): line for line in lines}
    ratios, nearer = [], []
    for (setting, label), without in found.items():
        coded = found.get((setting, CODED))
        if label != UNCODED or coded is None:
            continue
        fewest = min(sum(row["requests"] for row in line.rows) for line in (coded, without))
        if (1 - QUANTILES["p999"]) * fewest < TAIL:
            continue
        ends = [(line.latency("p999"), line.latency("p50")) for line in (coded, without)]
        values = [one.value for pair in ends for one in pair if one is not None]
        if len(values) < 4 or not all(map(math.isfinite, values)):
            continue
        tail, middle, other_tail, other_middle = values
        ratios.append(tail / other_tail)
        nearer.append((other_tail - other_middle) / max(tail - middle, 1e-9))
    if not ratios:
        return ""
    lowest, middle, highest = (1 - pick(ratios) for pick in (min, statistics.median, max))
    return (
        "Published of ParM beside no code, at equal workers (Kosaian et al., SOSP 2019): p99.9 "
        "lower by up to 48 %, and up to 3.5 times nearer to the median. Here, of coded: by up to "
        f"{lowest:.0%} (median of the {len(ratios)} settings with {TAIL} requests beyond it "
        f"{middle:.0%}, least {highest:.0%}), up to {max(nearer):.1f} times "
        f"({statistics.median(nearer):.1f})."
    )


def apart(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a space and a sentence on methods that were not measured side by side, or ""."""
    own: dict[str, dict[Any, Mapping[str, Any]]] = {}
    for row in rows:
        if row["error"] is None:
            own.setdefault(row["label"], {})[latency_place(row)[:-1], row["seed"]] = row
    groups: list[list[str]] = []
    for label in in_order(own):
        for group in groups:
            first = own[group[0]]
            both = first.keys() & own[label].keys()
            if all(first[place]["commit"] == own[label][place]["commit"] for place in both):
                group.append(label)
                break
        else:
            groups.append([label])
    if len(groups) < 2:
        return ""
    told = []
    for labels in groups:
        known = [row["processors_busy"] for label in labels for row in own[label].values()]
        busy = [value for value in known if value is not None]
        words = f" (the processors {statistics.fmean(busy):.0%} busy in the mean)" if busy else ""
        told.append(f"{', '.join(labels)}{words}")
    return f" Not measured side by side, but at other commits: {'; '.join(told)}."


def compare_tails(
    tails: Sequence[Mapping[str, float]],
    labels: Sequence[str],
    work: Mapping[str, float] | None = None,
) -> str:
    """Return a table of methods' tails beside the lowest of each place, and beside coded's.

    Args:
        tails: for each place a finite lowest, and every method's tail (inf: too many are lost).
        labels: the methods.
        work: of each, for a column of its own.
    """
    columns = ["method", f"within {SAME:.0%} of the lowest"]
    columns += ["median, over the lowest", "worst, over the lowest"]
    beside = CODED in labels and len(labels) > 1
    if beside:
        columns += [f"lower than {CODED}", f"higher than {CODED}", f"median, over {CODED}"]
    if work:
        columns.append("work")
    cells = []
    for label in labels:
        ratios = [run[label] / min(run.values()) for run in tails]
        near = sum(ratio <= 1 + SAME for ratio in ratios)
        row = [label, f"{near} of {len(tails)}", _ratio(statistics.median(ratios))]
        row.append(_ratio(max(ratios)))
        if beside and label == CODED:
            row += ["", "", ""]
        elif beside:
            pairs = [(run[label], run[CODED]) for run in tails]
            row.append(str(sum((1 + SAME) * one < other for one, other in pairs)))
            row.append(str(sum(one > (1 + SAME) * other for one, other in pairs)))
            known = [a / b for a, b in pairs if math.isfinite(b)]
            row.append(_ratio(statistics.median(known)) if known else "")
        if work:
            row.append(f"{work[label]:.2f}")
        cells.append(tuple(row))
    return markdown(columns, cells)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "never"


def failures(rows: Sequence[Mapping[str, Any]], heading: str = "##") -> str:
    """Return the Markdown section of the runs that failed; "" if none did."""
    failed = [row for row in current_latency(rows) if row["error"] is not None]
    cells = [(one_line(row["name"]), one_line(row["error"])) for row in failed]
    return f"{heading} Failed runs\n\n{markdown(('run', 'error'), cells)}" if failed else ""


def describe_gaps(rows: Sequence[Mapping[str, Any]], grid: LatencyGrid) -> str:
    """Return a line that counts each method's runs of a grid without a row; "" if all have one."""
    kept = current_latency(rows)
    if any(row["settings"]["quick"] for row in kept):
        return ""
    done = {(*latency_place(row)[1:], row["run"]) for row in kept}
    runs = list(arms(grid))
    wanted: dict[str, list[bool]] = {label: [] for label in in_order(arm.label for arm in runs)}
    for arm in runs:
        place = (arm.batch, arm.load, arm.stragglers, arm.label, arm.run)
        wanted[arm.label].append(place in done)
    lacking = [
        f"{label}, {runs.count(False)} of {len(runs)} runs"
        for label, runs in wanted.items()
        if not all(runs)
    ]
    return f"Not measured: {'; '.join(lacking)}.\n" if lacking else ""


def body(
    rows: Sequence[Mapping[str, Any]], heading: str = "##", grid: LatencyGrid | None = None
) -> str:
    """Return the overview and the table of rows, its note, and the runs that failed.

    Args:
        rows: of a file, oldest first.
        heading: the marks before a section's title.
        grid: what was to be measured; of it is told what was not.
    """
    lacking = describe_gaps(rows, grid) if grid is not None else ""
    texts = (overview(rows), latency_table(rows), lacking, failures(rows, heading))
    return "\n".join(text for text in texts if text)


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown page of rows."""
    return f"# Latency of every method\n\n{body(rows)}"


MEANS = ("decoded_share", "missing_share", "accuracy", "work_per_query")
"""Figures that are means over runs."""
CSV_COLUMNS = (
    *("dataset", "batch", "load", "stragglers", "method", "runs", "requests"),
    *(f"{name}_ms{end}" for name in TITLES for end in ("", "_low", "_high")),
    *(f"{name}{end}" for name in MEANS for end in ("", "_low", "_high")),
)


def csv_cells(lines: Iterable[Line]) -> list[tuple[str, ...]]:
    """Return the cells of the CSV: plain numbers, "" for what there is none of."""
    found = []
    for line in lines:
        words: list[Any] = [*line.setting, line.label, len(line.rows)]
        words.append(sum(row["requests"] for row in line.rows))
        for name in TITLES:
            value = line.latency(name)
            bounds = ("", "") if value is None or value.interval is None else value.interval
            words += ["" if value is None else value.value, *bounds]
        for name in MEANS:
            mean, half = line.mean(name), line.spread(name)
            words += [mean, *(("", "") if half is None else (mean - half, mean + half))]
        found.append(tuple(f"{w:.6g}" if isinstance(w, float) else str(w) for w in words))
    return found


def write(rows_file: Path) -> list[Path]:
    """Write the tables of a file of rows beside it, as .md and .csv; return what was written."""
    rows = read_rows(rows_file, "latency")
    lines = lines_of(rows)
    if not rows:
        return []
    page, table = rows_file.with_suffix(".md"), rows_file.with_suffix(".csv")
    write_atomically(page, report(rows).encode())
    write_atomically(table, as_csv(CSV_COLUMNS, csv_cells(lines)).encode())
    return [page, table]
