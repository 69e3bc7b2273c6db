"""The results page and README's two headline tables, rendered from the benchmarks' rows alone.

A folder of results holds `accuracy.jsonl`, `latency.jsonl`, `validation.json`, `map.jsonl`,
`ablation.jsonl` and `speed.json`, as their commands leave them with `--out`. What is not there is
called not measured, beside the command that measures it.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from benchmarks import ablation, speed
from codedinvnet.bench import latency_tables, tables
from codedinvnet.bench.gaps import ABSENT, gaps
from codedinvnet.bench.grid import Base, load_grid
from codedinvnet.bench.latency_grid import load_latency_grid
from codedinvnet.bench.papers import PUBLISHED
from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.berrut import ApproxIFER
from codedinvnet.codes.nercc import NeRCC
from codedinvnet.codes.parm import ParM
from codedinvnet.codes.plain import Plain
from codedinvnet.codes.registry import METHODS, OURS
from codedinvnet.errors import UserError
from codedinvnet.files import file_digest, read_json
from codedinvnet.rows import Row, agreeing, current_accuracy, current_latency, read_rows
from codedinvnet.serving.policies import in_order
from codedinvnet.simulation import agreement, measured, sweep
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.figures import SAME
from codedinvnet.simulation.scenario import Scenario

HEADLINE_K = 10
"""The hard case: an overhead of a tenth."""
RIVALS = (SmallBackup, NeRCC, ApproxIFER, ParM)
"""The methods that README compares with the code, all at its overhead."""
HEADLINE_LATENCY = ((10, 0.4, "pareto"), (1, 0.4, "pareto"))
"""Images of a request, load, and straggler model of the settings in README's table: one in which
the code is ahead, and one in which it is not."""

ACCURACY_GRID = "configs/bench/accuracy.json"
LATENCY_GRID = "configs/bench/latency.json"
COMMANDS = {
    "accuracy.jsonl": f"codedinvnet bench accuracy {ACCURACY_GRID} --data-dir data",
    "latency.jsonl": f"codedinvnet bench latency {LATENCY_GRID} --data-dir data",
    "validation.json": "codedinvnet simulate configs/bench/simulate-measured.json "
    "--measured docs/results/latency.jsonl",
    "map.jsonl": "codedinvnet simulate configs/bench/simulate-map.json",
    "policies.jsonl": "codedinvnet simulate configs/bench/simulate-policies.json",
    "ablation.jsonl": "python -m benchmarks ablation configs/bench/ablation.json --data-dir data",
    "speed.json": "python -m benchmarks inverse mnist",
}
PICTURES = {
    "accuracy.jsonl": {
        "accuracy-k.png": "Recovered accuracy against k, each method on its better base model",
        "accuracy-unavailability.png": "Accuracy of all answers against the share of workers that "
        "are missing, k = 10, if never two of a group are (of independent losses a quarter of the "
        "groups would miss two or more at the right end)",
        "accuracy-confusion.png": "Which classes lost queries are taken for, the right one left "
        "out, k = 10",
    },
    "latency.jsonl": {
        "latency-tails.png": "The share of requests of all runs that take longer",
        "latency-accuracy.png": "The farthest percentile that all methods have against the "
        "accuracy of all answers; methods that lost more than it allows are left out",
    },
    "map.jsonl": {"map.png": "Simulated p99.9 against load"},
}
"""What the commands draw beside their rows, and what it shows."""


def page(
    folder: Path,
    pictures: str,
    grid: Path | None = None,
    latency_grid: Path | None = None,
    more: Mapping[str, str] | None = None,
) -> str:
    """Return the Markdown page of a folder of results.

    Args:
        folder: where the rows and pictures lie.
        pictures: the folder's path as seen from the page, for the links to its pictures.
        grid: of `bench accuracy`, ACCURACY_GRID; which of its trials were not done is told.
        latency_grid: likewise of `bench latency`, LATENCY_GRID.
        more: further sections, title -> text.

    Raises:
        UserError: if a file is damaged.
    """
    sections: dict[str, tuple[str, Callable[[Path], str]]] = {
        "Accuracy": ("accuracy.jsonl", partial(accuracy_section, grid=grid)),
        "Latency": ("latency.jsonl", partial(latency_section, grid=latency_grid)),
        "Does the simulator agree with it?": ("validation.json", validation_section),
        "Where each policy wins": ("map.jsonl", map_section),
        "What each part of the design is worth": ("ablation.jsonl", ablation_section),
        "Speed of the invertible network": ("speed.json", speed_section),
    }
    text = [
        "# Results",
        "Rendered from the benchmarks' rows by `python -m benchmarks.figures`; nothing here is "
        "written by hand. Figures of papers are marked as published. Which command measures which "
        "section, and how: `docs/benchmarks.md`.",
    ]
    titles = [*sections, *(more or {})]
    text.append("\n".join(f"- [{title}](#{_anchor(title)})" for title in titles))
    for title, (name, render) in sections.items():
        text += [f"## {title}", _measured(folder / name, render)]
        for picture, shows in PICTURES.get(name, {}).items():
            if (folder / picture).is_file():
                text += [f"{shows}:", f"![{shows}]({pictures}/{picture})"]
    for title, own in (more or {}).items():
        text += [f"## {title}", own.strip()]
    return "\n\n".join(text) + "\n"


def _anchor(title: str) -> str:
    """Return what a page's links call a section."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def headlines(folder: Path, grid: Path | None = None) -> dict[str, str]:
    """Return README's tables by the names of their places; for the grid see `page`."""
    return {
        "accuracy": _measured(folder / "accuracy.jsonl", partial(headline_accuracy, grid=grid)),
        "latency": _measured(folder / "latency.jsonl", headline_latency),
        "policies": _measured(folder / "policies.jsonl", headline_policies),
        "late": _measured(folder / "accuracy.jsonl", headline_late),
    }


def _measured(path: Path, render: Callable[[Path], str]) -> str:
    """Return what is rendered from a file, or that it was not measured if it is not there."""
    if not path.is_file() or not path.stat().st_size:
        command = f"{COMMANDS[path.name]} --out docs/results/{path.name}"
        return f"Not measured yet; `{command}` measures it."
    return render(path).strip()


def headline_policies(path: Path) -> str:
    """Return the simulated p99.9 and work of the policies, a column for each place.

    Of a policy's rows in a place the last one counts.
    """
    rows = {
        (row["cell"]["stragglers"], row["cell"]["batch"], row["cell"]["policy"]): row
        for row in sweep.read_rows(path)
    }
    places = list(dict.fromkeys(key[:2] for key in rows))
    policies = in_order(key[2] for key in rows)

    def cells(policy: str) -> list[str]:
        found = [rows[(*place, policy)] for place in places]
        works = [row["work_per_query"] for row in found]
        return [
            policy,
            *[f"{row['p999_ms']:.0f}" for row in found],
            f"{min(works):.2f} to {max(works):.2f}",
        ]

    heads = [f"{name}, {batch}" for name, batch in places]
    return tables.markdown(["policy", *heads, "work"], [cells(policy) for policy in policies])


# Accuracy


def accuracy_section(path: Path, grid: Path | None = None) -> str:
    """Return for each data set the table of all methods and the comparison with the rivals."""
    return tables.body(
        read_rows(path, "accuracy"), "###", None if grid is None else load_grid(grid)
    )


def headline_late(path: Path) -> str:
    """Return the accuracy of direct answers and of late ones at k = 10, a column for each data set.

    Of a method's base models the better one counts.
    """
    lines = tables.lines_of(read_rows(path, "accuracy"))
    found = {
        (line.label, line.dataset): tables.percent(line.mean("recovered"))
        for line in tables.best_bases(lines)
        if (line.k, line.missing, line.corrupt) == (HEADLINE_K, 1, 0)
    }
    for line in lines:
        if line.label == OURS:
            found["direct", line.dataset] = tables.percent(line.mean("normal"))
    datasets = tables.in_order(dataset for label, dataset in found if label == OURS)
    cells = [
        [name, *(found.get((name, dataset), ABSENT) for dataset in datasets)]
        for name in ("direct", OURS, *(method.name for method in RIVALS))
    ]
    return tables.markdown(["answer, % right", *datasets], cells)


def headline_accuracy(path: Path, grid: Path | None = None) -> str:
    """Return recovered accuracies at k = 10, methods down and data sets across.

    Codes without direct answers have a second figure, that of their answers when nobody is missing.
    What the grid has and the rows have not is called not measured, or failed if it did.
    """
    rows = read_rows(path, "accuracy")
    lines = tables.lines_of(rows)
    alone = tables.alone_measured(lines)
    best = [
        line
        for line in tables.best_bases(lines)
        if (line.k, line.missing, line.corrupt) == (HEADLINE_K, 1, 0)
    ]
    datasets = tables.in_order(line.dataset for line in best)
    found = {(line.label, line.dataset): line for line in best}
    lacking = {
        (trial.label, trial.dataset)
        for trial in (gaps(load_grid(grid), current_accuracy(rows)) if grid is not None else ())
        if (trial.k, trial.missing, trial.corrupt) == (HEADLINE_K, 1, 0)
        and trial.dataset in datasets
    }
    failed = {(row["label"], row["dataset"]) for row in current_accuracy(rows) if row["error"]}
    order = {label: place for place, label in enumerate(METHODS)}
    labels = sorted(
        {label for label, _ in (*found, *lacking)},
        key=lambda label: (order.get(label, len(order)), label),
    )
    normal = {
        (line.dataset, line.base): tables.percent(line.mean("normal"))
        for line in lines
        if line.label in (OURS, Plain.name)
    }
    bases = [base for base in get_args(Base) if any((name, base) in normal for name in datasets)]
    cells = [
        [
            f"no worker missing: {' / '.join(bases)}",
            "",
            *(" / ".join(normal.get((name, base), ABSENT) for base in bases) for name in datasets),
        ]
    ]
    for label in labels:
        values = []
        for dataset in datasets:
            line = found.get((label, dataset))
            if line is None:
                missing = "failed" if (label, dataset) in failed else ABSENT
                values.append(missing if (label, dataset) in lacking else "")
            else:
                values.append(_recovered(line) + (" †" if line.place in alone else ""))
        overheads = [line.overhead for line in best if line.label == label]
        cells.append([label, f"{100 * overheads[0]:.0f} %" if overheads else "", *values])
    for label in dict.fromkeys(figure.label for figure in PUBLISHED):
        published = {figure.dataset: figure for figure in PUBLISHED if figure.label == label}
        if published.keys() & set(datasets):
            values = [
                f"{published[dataset].recovered:.1f}" if dataset in published else ""
                for dataset in datasets
            ]
            cells.append([f"{label}, published", "10 %", *values])
    marked = any("†" in cell for row in cells for cell in row)
    sign = "†: on one base model alone. " if marked else ""
    return "\n\n".join(
        [
            tables.markdown(["method", "extra queries", *datasets], cells).strip(),
            f"Accuracy in % with one worker of a group of {HEADLINE_K} missing, on each method's "
            "better base model: of the missing worker's answer; of codes without direct answers, "
            "which decode every answer, of all answers of the group, and in brackets what these "
            "are with nobody missing. With `none` the missing answer counts as the majority class. "
            f"{sign}± is over seeds; what has none was trained once. The oracle embeds all members "
            f"to make its parity, which nobody would serve. {tables.HEADS} All settings, tests of "
            "the differences, and the published figures with their sources: "
            "[docs/results.md](results.md). " + tables.remarks(rows),
        ]
    )


def _recovered(line: tables.Line) -> str:
    """Return a line's cell of the headline."""
    recovered = tables.percent(line.mean("recovered"), line.std("recovered"))
    if line.systematic:
        return recovered
    return f"{recovered} ({tables.percent(line.mean('complete'))})"


# Latency


def latency_section(path: Path, grid: Path | None = None) -> str:
    """Return the table of all settings, what of the grid was not measured, and what failed."""
    wanted = None if grid is None else load_latency_grid(grid)
    return latency_tables.body(read_rows(path, "latency"), "###", wanted).strip()


def headline_latency(path: Path) -> str:
    """Return how near every method comes to the best of each setting, and two settings' table."""
    kept = current_latency(read_rows(path, "latency"))
    rows = [row for row in kept if row["error"] is None and _setting(row) in HEADLINE_LATENCY]
    if not rows:
        wanted = " and ".join(f"{n} at {load:.0%}, {model}" for n, load, model in HEADLINE_LATENCY)
        return f"Not measured yet for requests of {wanted}."
    return (
        f"{latency_tables.overview(kept)}\nTwo of these settings, and how all were measured "
        f"([docs/results.md](results.md#latency) has the others):\n\n"
        f"{latency_tables.latency_table(rows)}"
    ).strip()


def _setting(row: Row) -> tuple[int, float, str]:
    return row["batch"], row["load"], row["straggler_model"]


def _machines(rows: Iterable[Row]) -> str:
    return f"Measured on {'; '.join(sorted({row['machine'] for row in rows}))}."


# The rest


def validation_section(path: Path) -> str:
    """Return how many percentiles of the measured arms the simulator meets, and which it does not.

    Raises:
        UserError: if the file is damaged.
    """
    report = read_json(path)
    if not isinstance(report, dict) or report.get("schema_version") != measured.SCHEMA:
        raise UserError(f"{path} is no comparison of `simulate --measured`: write it again")
    arms = report["arms"]
    off = [
        [
            tables.one_line(arm["name"]),
            latency_tables.TITLES[name],
            measured.shown(cell["measured_ms"]),
            " to ".join(dict.fromkeys(map(measured.shown, cell["allowed_ms"]))),
            measured.shown(cell["simulated_ms"]),
        ]
        for arm in arms
        for name, cell in arm["percentiles"].items()
        if cell["agrees"] is False
    ]
    found = measured.tally(arms)
    images = _range(
        [sum(one["queries"] for one in run) for arm in arms for run in arm["simulated"]]
    )
    times = "times from other runs" if report.get("times") == "others" else "times of these runs"
    together = agreement.check(arms)
    never = ""
    if found.never:
        never = f" {found.never} are never on both sides ({measured.NEVER}), and not among them."
    rows = sorted(path.parent.glob("latency*.jsonl"))
    of = [one.name for one in rows if file_digest(one) == report["measured_digest"]]
    named = f" of `{of[0]}`" if of else ""
    again = all(arm["same_arrivals"] for arm in arms)
    arrivals = "requests coming when they came there, " if again else ""
    text = [
        f"Every arm{named} with finished runs was simulated with {times}, {arrivals}{images} "
        "images a run. "
        + ("Nothing is to be compared." if together is None else agreement.told(together) + never)
    ]
    if rows and not of:
        text.append("The rows of the measurement have changed since.")
    if off:
        columns = ("arm", "percentile", "measured, ms", "allowed, ms", "simulated, ms")
        table = tables.markdown(columns, off).strip()
        text += ["Beyond 15 % and the measured 95 % interval lie:", table]
    return "\n\n".join(text)


def map_section(path: Path) -> str:
    """Return which policy wins where, and up to which load each helps."""
    rows = _current_cells(sweep.read_rows(path))
    best, helps = sweep.winners(rows), sweep.helps_up_to(rows)
    ties, told = sweep.contested(rows)
    loads = sorted({load for _, _, load in best})
    policies = in_order(policy for _, _, policy in helps)
    places = list(dict.fromkeys((model, batch) for model, batch, _ in best))
    wins = [
        [model, str(batch), *(best.get((model, batch, load), "") for load in loads)]
        for model, batch in places
    ]
    ends = [
        [model, str(batch), *(_reach(helps.get((model, batch, p)), loads) for p in policies)]
        for model, batch in places
    ]
    shares = [f"{load:.0%}" for load in loads]
    lost = (
        f" ({sweep.NOBODY}: every policy loses more than one request in a thousand)"
        if sweep.NOBODY in best.values()
        else ""
    )
    seconds = [row["cpu_seconds_per_million"] for row in rows]
    met = [tail for tail in sweep.tails(rows).values() if math.isfinite(min(tail.values()))]
    names = in_order(name for tail in met for name in tail)
    whole = [tail for tail in met if len(tail) == len(names)]
    overview = (
        []
        if not whole
        else [
            f"p99.9 of {len(whole)} places (stragglers, images of a request, load) over the lowest "
            f"there, and beside coded's, from {SAME:.0%} on (never: more is lost than "
            "p99.9 allows):",
            latency_tables.compare_tails(whole, names).strip(),
        ]
    )
    return "\n\n".join(
        [
            f"Simulated with the service's own rules{_times(rows)}. The policy with the least work "
            f"among those whose p99.9 is within {SAME:.0%} of the lowest, by load{lost}:",
            tables.markdown(["stragglers", "images of a request", *shares], wins).strip(),
            f"Up to which load a policy's p99.9 is more than {SAME:.0%} below that of "
            f"doing nothing (none: not even at {shares[0]}; ≥ {shares[-1]}: at the highest load "
            "simulated, too):",
            tables.markdown(["stragglers", "images of a request", *policies], ends).strip(),
            *overview,
            f"{len(rows)} runs of {_range([row['queries'] for row in rows])} images each, which "
            f"arrive at random.{_draws(rows, len(best))} A million images took "
            f"{statistics.median(seconds):.0f} s of a core ({min(seconds):.0f} to "
            f"{max(seconds):.0f}) on {'; '.join(sorted({row['machine'] for row in rows}))}."
            + (
                f" In {ties} of {told} places the 95 % interval of the lowest p99.9 overlaps "
                "another policy's: there the winner is one of several."
                if told
                else " They are too short for an interval of p99.9: winners may be so by chance."
            ),
        ]
    )


def _times(rows: Sequence[Row]) -> str:
    """Return what the simulated tasks take, if the rows say so; they have it in common."""
    scenario = rows[0]["scenario"]
    if "service" not in scenario:
        return ""
    service, encode = (
        Distribution.model_validate(scenario.get(name, {})).mean_ms
        for name in ("service", "encode")
    )
    timeout = scenario.get("group_timeout_ms", Scenario.model_fields["group_timeout_ms"].default)
    return (
        f": a query takes {service:.4g} ms in the mean, encoding {encode:.3g} ms for each image of "
        f"a group, and groups are coded after {timeout:g} ms"
    )


def _draws(rows: Sequence[Row], places: int) -> str:
    """Return a space and a sentence if places met the same draws; else ""."""
    seeds = len({row["scenario"].get("seed", 0) for row in rows})
    if seeds >= places:
        return ""
    return (
        f" All {places} places met the same gaps between arrivals: they are one draw."
        if seeds == 1
        else f" The {places} places have {seeds} seeds: of one seed the gaps are the same."
    )


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _current_cells(rows: Sequence[Row]) -> list[Row]:
    """Return the newest row of every cell, of those whose scenario differs in its place alone."""
    varied = ("arrivals", "policy", "method", "stragglers", "queries", "seed")

    def base(row: Row) -> dict[str, Any]:
        return {key: value for key, value in row["scenario"].items() if key not in varied}

    kept = agreeing(rows, lambda row: None, base)
    return list({tuple(row["cell"].items()): row for row in kept}.values())


def _reach(load: float | None, loads: Sequence[float]) -> str:
    """Say up to which load something helps; it may do so beyond the last one that there is."""
    if load is None:
        return "none"
    return f"{'≥ ' if load == loads[-1] else ''}{load:.0%}"


def ablation_section(path: Path) -> str:
    """Return the tables of `benchmarks ablation`."""
    results = ablation.read_results(path)
    quick = any(row.get("quick") for row in results)
    text = [
        ablation.table(results).strip(),
        "± is the standard deviation over the seeds, of a margin over the differences of each "
        "seed; seconds are those of all trainings of a row, f and g in them, and of rows that "
        "share these they hold the same ones again. Seconds of rows that were trained on different "
        "machines, or beside other work, do not compare (`docs/benchmarks.md` says which).",
        _machines(results),
    ]
    return "\n\n".join([*text, *(["This is the quick version: short trainings."] if quick else [])])


def speed_section(path: Path) -> str:
    """Return what was aimed at, and the tables of `benchmarks inverse`, `embed` and `train`."""
    report = read_json(path)
    text = [f"```text\n{speed.table(report).strip()}\n```"]
    if cells := speed.aims(report):
        text.insert(0, tables.markdown(speed.AIM_COLUMNS, cells).strip())
    return "\n\n".join(text)
