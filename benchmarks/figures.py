"""Measure the shipped bundles on the whole test splits, and render all figures.

They go into README.md and the pages in docs, between their marks, and into docs/results.md.

    python -m benchmarks.figures --data-dir data          measure (half an hour), then render
    python -m benchmarks.figures --data-dir data mnist    measure one bundle
    python -m benchmarks.figures --measure                the same on images from the usual places
    python -m benchmarks.figures --costs                  measure times and multiply-adds alone
    python -m benchmarks.figures --costs --device cuda    the same on a GPU
    python -m benchmarks.figures                          render what is in docs/results
    python -m benchmarks.figures --page results/quick     render the page of another folder into it

In `docs/results`, `NAME.json` holds what was measured of a bundle, `serve.json` what
`python -m benchmarks serve mnist --data-dir data --out docs/results/serve.json` wrote,
`engine-NAME.json` what `python -m benchmarks engine NAME` did (`make bench-engine`), and
`paper-mnist-k2.json` is a copy of what the paper's four commands left in
`runs/mnist/fusion-k2/evaluation.json`; `pixels-NAME-kK.json` is what
`codedinvnet reproduce configs/NAME-pixels.json --k K --json` printed of the paper's objective, and
`seed-NAME.json` what `codedinvnet reproduce configs/NAME-recovery.json --seed N --json` did of
another seed (`make bench-pixels`, `make bench-seeds`); the rows of the other benchmarks are
`make bench`'s. What is missing is called not measured.

Three more have a section of docs/results.md each, if they are there: `NAME-cuda.json`, which holds
the costs on a GPU; `speed-cuda.json`, which `python -m benchmarks inverse mnist --device cuda --out
docs/results/speed-cuda.json` and likewise `embed` and `train` write; and
`paper-full-mnist-kK.json`, a copy of what the paper's four commands left of
`configs/paper/mnist.json` in `runs/paper-mnist/fusion-kK/evaluation.json`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import (
    ACCURACY_GRID,
    COMMANDS,
    LATENCY_GRID,
    headlines,
    page,
    speed_section,
)
from benchmarks.serve import CHAOS_OPTIONS, FULL
from codedinvnet.bench.gaps import ABSENT
from codedinvnet.bench.papers import PUBLISHED
from codedinvnet.bench.tables import JPEG, markdown, training_seconds
from codedinvnet.cli.common import guarded
from codedinvnet.codes.backup import backup_network, backup_width
from codedinvnet.codes.equal_cost import (
    macs,
    plain_network,
    plain_width,
    served_macs,
)
from codedinvnet.codes.invnet import AverageImage, PaperInvNet
from codedinvnet.codes.mean import Evidence
from codedinvnet.errors import UserError
from codedinvnet.evaluation.accuracy import evaluation_report
from codedinvnet.evaluation.cost import info_report
from codedinvnet.evaluation.inversion import inversion_report
from codedinvnet.files import read_json, write_json, write_text
from codedinvnet.models.bundle import Bundle, load_bundle, shipped_bundles, weights_digest
from codedinvnet.models.coded import CodedModel
from codedinvnet.rows import Row, newest, read_rows
from codedinvnet.stages import choose_device, evaluation_images

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
GRID = ROOT / ACCURACY_GRID
BUNDLES = ("mnist", "fashion", "cifar10")
"""In the order of the tables."""
SIZES = (2, 4, 10)
MEASURE = "python -m benchmarks.figures --data-dir data"
AIM = (
    " For cifar10 +2.00 beside the side features was the aim "
    "([what was tried](decisions/25-mosaic.md))."
)
RENDERED = (
    *("README.md", "docs/overview.md", "docs/training.md", "docs/serving.md"),
    "docs/benchmarks.md",
)
"""What figures go into, between marks."""
EVIDENCE: tuple[Evidence, ...] = ("both", "latent", "side")


def measure(name: str, bundle: Bundle, data_dir: Path | None) -> dict[str, Any]:
    """Run evaluate (with both sanity arms at the largest k) and invert on one bundle."""
    source = evaluation_images(bundle, "test", data_dir)
    largest = SIZES[-1]
    arms: dict[str, list[dict[str, Any]]] = {
        evidence: [
            evaluation_report(bundle, source, split="test", k=k, evidence=evidence) for k in SIZES
        ]
        for evidence in EVIDENCE
    }
    return {
        "evaluate": arms["both"],
        "latent": arms["latent"],
        "side": arms["side"],
        "shuffled": evaluation_report(bundle, source, split="test", k=largest, shuffle_parity=True),
        "pixel_mean": None
        if bundle.model.encoder.keeps_apart  # its recovery head needs more than the average image
        else evaluation_report(bundle, source, split="test", k=largest, pixel_mean=True),
        "invert": inversion_report(bundle.model, source),
        "weights": weights_digest(name),
    }


def update(name: str, found: dict[str, Any]) -> None:
    """Put what was measured into the file of that name beside the rest."""
    path = RESULTS / f"{name}.json"
    write_json(path, {**(read(path) or {}), **found})


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def number(value: float | None, digits: int = 1) -> str:
    """A number; of requests that were never answered, null in a report, infinity."""
    return "∞" if value is None else f"{value:.{digits}f}"


def share(report: Mapping[str, Any] | None, key: str) -> str:
    """A share of a report in %, or that it was not measured."""
    return ABSENT if report is None else percent(report[key])


def by_k(reports: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {report["k"]: report for report in reports}


class Paper(NamedTuple):
    """What the paper's objective gives of a bundle's network, by k."""

    trained: Mapping[int, dict[str, Any]]
    """What `reproduce` printed of a training from the start."""
    on_bundle: Mapping[int, Row]
    """Finished rows of `bench accuracy`: an encoder for the bundle's own f and g."""
    failed: frozenset[int]
    """Where such a row is one with an error."""

    def cell(self, k: int) -> str:
        """The recovered accuracy in %; with a star if it is with the bundle's own f and g."""
        if k in self.trained:
            return share(self.trained[k][f"test_k{k}"], "recovered_accuracy")
        if k in self.on_bundle:
            return f"{percent(self.on_bundle[k]['recovered'])} *"
        return "failed *" if k in self.failed else ABSENT


def bundle_rows(name: str, result: Mapping[str, Any], paper: Paper) -> list[list[str]]:
    """The cells of a bundle's rows, a row a k; those of the paper's objective in the end."""
    latent, side = by_k(result.get("latent", ())), by_k(result.get("side", ()))
    rows = []
    for row in result.get("evaluate", ()):
        k = row["k"]
        rows.append(
            [
                name,
                str(k),
                f"{100 / k:.0f} %",
                extra_cell(result, k),
                percent(row["normal_accuracy"]),
                f"{percent(row['recovered_accuracy'])} ± {percent(row['recovered_accuracy_std'])}",
                percent(row["worst_position_accuracy"]),
                percent(row["agreement"]),
                share(latent.get(k), "recovered_accuracy"),
                share(side.get(k), "recovered_accuracy"),
                paper.cell(k),
            ]
        )
    return rows


BUNDLE_COLUMNS = (
    *("bundle", "k", "extra queries", "extra multiply-adds"),
    *("normal", "recovered", "worst position", "agreement"),
    *("latent alone", "side alone", "paper's objective"),
)


def bundle_table(
    results: Mapping[str, Mapping[str, Any]],
    papers: Mapping[str, Paper],
    seeds: Mapping[str, Mapping[str, Any]],
) -> str:
    """Accuracy of every bundle at every k, and what each kind of evidence is worth.

    Args:
        results: what was measured of each bundle; all of it may be missing.
        papers: bundle -> what the paper's objective gives.
        seeds: bundle -> what `reproduce` printed of another seed.
    """
    measured = {name: result for name, result in results.items() if "evaluate" in result}
    if not measured:
        return f"Not measured in this version; `{MEASURE}` measures it."
    rows = [
        row for name, result in measured.items() for row in bundle_rows(name, result, papers[name])
    ]
    machines = dict.fromkeys(result["evaluate"][0]["machine"] for result in measured.values())
    lines = [
        markdown(BUNDLE_COLUMNS, rows),
        "Accuracy in % on the whole test split, against the labels. Extra multiply-adds: those of "
        "a parity query, over those of k queries. Recovered: mean over all erasure positions and 5 "
        "random groupings, ± the standard deviation of a bootstrap over groups; worst position: "
        "the place in the group where it is lowest (of mnist and fashion, whose E averages, all "
        "places are equivalent, and differ by chance); agreement: how many decoded answers are the "
        "direct ones. "
        "Beside it, the same recovery head answers from the decoded latent alone (of cifar10: from "
        "the member's cell of z_p), and from the missing member's side features alone (E's "
        "by-product; not the rival `small-backup`). g' was trained for all three. "
        f"{f'{JPEG} ' if 'cifar10' in measured else ''}Measured on {'; '.join(machines)}.",
        "",
        *(line for name, result in measured.items() if (line := evidence_line(name, result))),
        "",
        "Of one training each, so without an interval." + (AIM if "cifar10" in measured else ""),
        "",
        paper_training({name: papers[name] for name in measured}),
        "",
    ]
    lines += [seed_line(name, seeds[name]) for name in measured if name in seeds]
    if other := [name for name in measured if name not in seeds]:
        lines.append(f"Another seed of {', '.join(other)}: {ABSENT}; `make bench-seeds` trains it.")
    for name in results:
        if name not in measured:
            lines.append(f"Not measured: {name}; `{MEASURE} {name}` measures it.")
    return "\n".join(lines)


def evidence_line(name: str, result: Mapping[str, Any]) -> str:
    """What each kind of evidence adds to the other at the largest k; empty if not measured."""
    k = SIZES[-1]
    arms = [by_k(result.get(arm, ())).get(k) for arm in ("evaluate", "latent", "side")]
    if None in arms:
        return ""
    both, latent, side = (arm["recovered_accuracy"] for arm in arms if arm is not None)
    return (
        f"- {name}, k = {k}: the latent is worth {100 * (both - side):+.2f} points beside the side "
        f"features, which are worth {100 * (both - latent):+.2f} beside the latent."
    )


def head_g(name: str, k: int, folder: Path) -> str:
    """What g reads from the average image, and from an encoder of the paper's objective."""
    found = {
        words: method_rows(name, method, folder).get(k)
        for words, method in (
            ("by g, `average-image` of `bench accuracy`,", AverageImage.name),
            ("with an encoder of the paper's objective, by g,", PaperInvNet.name),
        )
    }
    told = [
        f"{words} {percent(row['recovered'])} %"
        for words, row in found.items()
        if row and row["error"] is None
    ]
    return f" ({'; '.join(told)})" if told else ""


def bundle_checks(results: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """The sanity arms of every bundle; empty if nothing was measured.

    Args:
        results: what was measured of each bundle.
        folder: where the rows of `bench accuracy` lie, if they are there.
    """
    measured = {name: result for name, result in results.items() if "evaluate" in result}
    lines = []
    for name, result in measured.items():
        shuffled, mean = result.get("shuffled"), result.get("pixel_mean")
        k = next((report["k"] for report in (shuffled, mean) if report), SIZES[-1])
        words = [
            ABSENT if report is None else f"{share(report, 'recovered_accuracy')} %"
            for report in (shuffled, mean)
        ]
        if "pixel_mean" in result and mean is None:
            words[1] = "nothing, since it reads a cell of each member"
        lines.append(
            f"- {name}, k = {k}: recovered accuracy with another group's parity output {words[0]}, "
            f"with the average image in place of E, and no side features, by the recovery head g' "
            f"{words[1]}{head_g(name, k, folder)}."
        )
    if lines:
        lines += [
            "",
            "g and g' answer the same average images; g' was trained on decoded latents, g on the "
            "images' own.",
        ]
    if "cifar10" in measured:
        lines += ["", JPEG]
    return "\n".join(lines)


def paper_training(papers: Mapping[str, Paper]) -> str:
    """How long training by the paper's objective took, beside the bundles' own."""

    def minutes(seconds: float) -> str:
        return f"{seconds / 60:.0f} minutes"

    failed = any(paper.failed for paper in papers.values())
    trained = any(paper.trained for paper in papers.values())
    text = (
        "Paper's objective: recovered accuracy with a lean encoder that was trained on pixels, for "
        "each k one of its own"
        + (
            ", for an f and g that were trained as the bundle's are before it "
            "(`configs/NAME-pixels.json`)"
            if trained
            else ""
        )
        + "; *: for the bundle's own f and g, of the cost of the "
        "bundle's E (`coded-invnet-paper` of `bench accuracy`), in as many epochs on every set "
        "(900 steps of E, with five of the discriminator for each) and not in equal time"
        + (" ([what failed](results.md#failed-trials))" if failed else "")
        + "."
    )
    (published,) = [f for f in PUBLISHED if f.label == PaperInvNet.name]
    text += (
        f" Published ({published.source}): {published.recovered} at k = {published.k}, of a data "
        "set that the abstract does not name."
    )
    parts = []
    machines: set[str] = set()
    for name, paper in papers.items():
        theirs = [
            f"{minutes(paper.trained[k]['seconds'])} (k = {k}, with f and g)"
            if k in paper.trained
            else f"{minutes(training_seconds(paper.on_bundle[k]))} (k = {k}, E alone)"
            for k in SIZES
            if k in paper.trained or k in paper.on_bundle
        ]
        if theirs and name in shipped_bundles():
            own = load_bundle(name).info.provenance
            theirs.append(f"all of the bundle, which serves every k, {minutes(own.seconds)}")
            machines |= {row["machine"] for row in paper.on_bundle.values()} | {own.machine}
        if theirs:
            parts.append(f"{name} {', '.join(theirs)}")
    if parts:
        text += f" Training took: {'; '.join(parts)}."
    if len(machines) > 1:
        text += (
            f" These are times of {len(machines)} kinds of machines, which differ in speed: "
            f"{'; '.join(sorted(machines))}."
        )
    if any(k not in paper.trained for paper in papers.values() for k in SIZES):
        text += (
            f" `{COMMANDS['accuracy.jsonl']} --method {PaperInvNet.name} "
            "--out docs/results/accuracy.jsonl` measures those with a star; "
            "`make bench-pixels` trains f, g and E for every place anew, in many hours."
        )
    return text


def seed_line(name: str, found: Mapping[str, Any]) -> str:
    """What the bundle's training reached from another seed."""
    sizes = [k for k in SIZES if f"test_k{k}" in found]
    reports = [found[f"test_k{k}"] for k in sizes]
    recovered = " / ".join(percent(report["recovered_accuracy"]) for report in reports)
    seed = f"seed {found['training_seed']}" if "training_seed" in found else "another seed"
    return (
        f"With {seed}, {name} reaches {percent(reports[0]['normal_accuracy'])} normal and "
        f"{recovered} recovered at k = {' / '.join(map(str, sizes))}."
    )


class Cost(NamedTuple):
    """A row of the table of costs."""

    label: str
    section: str
    """Of a bundle's file."""
    needed: str
    """What must be in it; a null stands for what could not be measured."""
    form: Callable[[Any], str]
    """Writes a cell from the section."""

    def cell(self, found: Mapping[str, Any]) -> str:
        """The cell of a bundle's file."""
        figures = found.get(self.section, {})
        return ABSENT if figures.get(self.needed) is None else self.form(figures)


def extra_macs(info: Mapping[str, Any], k: int) -> float:
    """Return E's and f's multiply-adds for a parity query of k over those of the k."""
    extra = info["embedding_macs"] + info[f"encoder_macs_k{k}"] + info["reading_macs"]
    return float(extra / (k * info["embedding_macs"]))


def extra_cell(result: Mapping[str, Any], k: int) -> str:
    """The same of a bundle's file, if its costs were measured."""
    info = result.get("info", {})
    return f"{extra_macs(info, k):.0%}" if f"encoder_macs_k{k}" in info else ABSENT


COSTS = (
    Cost(
        "embedding f, one image",
        "info",
        "embedding_macs",
        lambda i: f"{i['embedding_macs'] / 1e6:.1f} M",
    ),
    Cost(
        "encoder E, ten images",
        "info",
        "encoder_macs_k10",
        lambda i: f"{i['encoder_macs_k10'] / 1e6:.1f} M",
    ),
    Cost(
        "extra multiply-adds for a group of ten",
        "info",
        "encoder_macs_k10",
        lambda i: f"{extra_macs(i, 10):.0%}",
    ),
    Cost(
        "recovery head",
        "info",
        "recovery_head_macs",
        lambda i: f"{i['recovery_head_macs'] / 1e6:.2f} M",
    ),
    Cost(
        "reading z_p for the recovery head, once a group",
        "info",
        "reading_macs",
        lambda i: f"{i['reading_macs'] / 1e6:.2f} M" if i["reading_macs"] else "none",
    ),
    Cost(
        "embedding f, time",
        "info",
        "embedding_ms",
        lambda i: f"{i['embedding_ms']:.1f} ms",
    ),
    Cost(
        "encoder E, ten images, time",
        "info",
        "encoder_ms_k10",
        lambda i: f"{i['encoder_ms_k10']:.1f} ms",
    ),
    Cost(
        "training, with one or two threads of a shared machine",
        "info",
        "provenance",
        lambda i: f"{i['provenance']['seconds'] / 60:.0f} min",
    ),
    Cost(
        "largest inversion error (pixels in 0..1)",
        "invert",
        "largest_error",
        lambda i: f"{i['largest_error']:.1e}",
    ),
    Cost(
        "fixed-point iterations, mean",
        "invert",
        "iterations",
        lambda i: f"{i['iterations']:.1f}" if "coefficient" in i else "none",
    ),
    Cost(
        "largest singular value (bound)",
        "invert",
        "images",
        lambda i: (
            f"{i['largest_singular_value']:.4f} ({i['coefficient']})"
            if "coefficient" in i
            else "no bound"
        ),
    ),
)


def cost_table(results: Mapping[str, Mapping[str, Any]], costs: Sequence[Cost] = COSTS) -> str:
    """Multiply-adds and times of the parts, and what `invert` found."""
    if not any("info" in result or "invert" in result for result in results.values()):
        return f"Not measured in this version; `{MEASURE}` measures it."
    cells = [[cost.label, *(cost.cell(found) for found in results.values())] for cost in costs]
    return markdown(("", *results), cells).strip()


@cache
def rival_costs(names: tuple[str, ...]) -> str:
    """Multiply-adds of the classifiers in the tables of the methods, for one image each."""
    shipped = {name: load_bundle(name).model for name in names if name in shipped_bundles()}
    k = SIZES[-1]
    counts: dict[str, Callable[[CodedModel], int]] = {
        "g(f(x))": served_macs,
        "the plain ResNet": lambda m: macs(plain_network(m, plain_width(m)).eval(), m),
        f"the small backup, k = {k}": lambda m: macs(
            backup_network(m, backup_width(m, k)).eval(), m
        ),
    }
    cells = [
        [label, *(f"{count(model) / 1e6:.1f} M" for model in shipped.values())]
        for label, count in counts.items()
    ]
    return markdown(("multiply-adds of one image", *shipped), cells).strip()


def paper_table(result: dict[str, Any], config: str) -> str:
    """What the paper's four commands reached with a settings file, and how long each took."""
    seconds = result["seconds"]
    minutes = ", ".join(f"{stage} {value / 60:.1f}" for stage, value in seconds.items())
    return (
        f"`{config}`, k = {result['k']}: normal accuracy "
        f"{percent(result['normal_accuracy'])} %, recovered accuracy "
        f"{percent(result['recovered_accuracy'])} ± {percent(result['recovered_accuracy_std'])} % "
        f"(worst position {percent(result['worst_position_accuracy'])} %), agreement "
        f"{percent(result['agreement'])} %, on the {result['images']:,} test images. "
        f"Minutes: {minutes}. Measured on {result['machine']}."
    )


POLICIES = ("uncoded", "hedge", "coded", "coded+hedge")


def tail_ratios(result: dict[str, Any], kind: str, policies: Sequence[str]) -> str:
    """Return the ratios of p99.9, with their intervals; the quick version has not all policies."""
    parts = []
    for policy in policies:
        name = f"{kind}p999_ratio_{policy.replace('+', '_')}"
        if name not in result:
            continue
        low, high = result[f"{name}_95"]
        parts.append(f"{policy} {number(result[name], 2)} ({number(low, 2)} to {number(high, 2)})")
    return ", ".join(parts)


def least(result: dict[str, Any]) -> int:
    """Return how many requests each arm with stragglers had, at least."""
    return min(int(arm["requests"]) for arm in result["straggler_arms"].values())


def beyond(result: dict[str, Any]) -> str:
    """Return a sentence on how many requests lie beyond p99.9, and a space."""
    requests = least(result)
    return (
        f"(Of {requests:,} requests each, {requests // 1000} beyond p99.9; these intervals, of a "
        "bootstrap, cannot reach above the slowest.) "
    )


def held_tails(result: dict[str, Any]) -> str:
    """Return the p99 of requests of ten and of single images, with held answers."""
    arms = {**result.get("straggler_arms", {}), **result.get("variant_arms", {})}
    texts = []
    for kind, words in (("held", "p99"), ("single", "p99 of single images")):
        own = {
            policy: arms[f"{kind}/{policy}"] for policy in POLICIES if f"{kind}/{policy}" in arms
        }
        values = ", ".join(f"{policy} {number(arm['p99_ms'])}" for policy, arm in own.items())
        if values:
            texts.append(f"{words} with held answers: {values} ms.")
    return " ".join(texts)


PART_FIGURES = {
    "chaos": "answered",
    "pool": "pool_first_10_of_11_ms",
    "overhead": "front_end_ms",
    "light": "light_p50_ratio",
    "stragglers": "straggler_arms",
    "variants": "variant_arms",
    "soak": "soak_seconds",
}
"""Part of `benchmarks serve` -> a figure that it leaves."""
SERVE_COMMAND = "python -m benchmarks serve mnist --data-dir data --out docs/results/serve.json"
FEWEST_FOR_P999 = 3000
"""Of fewer requests one or two would lie beyond it."""


def serve_headline(result: dict[str, Any]) -> str:
    """What `benchmarks serve` found of failures (a paragraph) and of held answers (a table)."""
    parts = {part for part, figure in PART_FIGURES.items() if figure in result}
    kept = [chaos_text(result)] if "chaos" in parts else []
    if "stragglers" in parts:
        kept += [
            held_table(result),
            f"Of {least(result):,} requests of ten each, {least(result) // 1000} lie beyond p99.9.",
        ]
    if not kept:
        return f"Not measured in this version; `{SERVE_COMMAND}` measures it."
    kept.append(
        f"Measured by `{SERVE_COMMAND}` ([more](results.md#the-service)) on "
        f"{result['machine']}, {result['cores']} cores, which {SHARING}"
    )
    return "\n\n".join(kept)


def held_table(result: dict[str, Any]) -> str:
    """The tails with held answers, policies across; those of too few requests are left out."""
    arms = {**result["straggler_arms"], **result.get("variant_arms", {})}
    kinds = {
        "none": "requests of ten, nobody straggles",
        "held": "requests of ten, one answer of one request in ten held back 100 ms",
        "single": "single images, one answer in a hundred held back",
    }
    policies = [name for name in POLICIES if f"held/{name}" in arms]
    cells = [
        [words, *(tails(arms.get(f"{kind}/{name}")) for name in policies)]
        for kind, words in kinds.items()
        if any(f"{kind}/{name}" in arms for name in policies)
    ]
    return markdown(("p99 / p99.9, ms", *policies), cells).strip()


def tails(arm: Mapping[str, Any] | None) -> str:
    """The p99 and p99.9 of an arm; the latter as a dash, if it has too few requests."""
    return "" if arm is None else f"{number(arm['p99_ms'])} / {far_tail(arm)}"


def far_tail(arm: Mapping[str, Any]) -> str:
    """The p99.9 of an arm, if it has enough requests; else a dash."""
    return number(arm["p999_ms"]) if arm["requests"] >= FEWEST_FOR_P999 else "–"


def serve_table(result: dict[str, Any]) -> str:
    """What `benchmarks serve` found; parts that it was not asked for are called not measured."""
    parts = {part for part, figure in PART_FIGURES.items() if figure in result}
    lines = [chaos_text(result), ""] if "chaos" in parts else []
    if parts & {"stragglers", "variants"}:
        lines += [*arms_table(result), ""]
    text = [TEXTS[part](result) for part in TEXTS if part in parts]
    text.append(f"Measured on {result['machine']}, {result['cores']} cores, which {SHARING}")
    lines.append(" ".join(text))
    missing = [part for part in PART_FIGURES if part not in parts]
    if missing:
        words = " ".join(f"--part {part}" for part in missing)
        command = SERVE_COMMAND.replace("mnist", f"mnist {words}")
        lines += [
            "",
            f"Not measured in this version: {', '.join(missing)}; `{command}` measures it.",
        ]
    return "\n".join(lines)


SHARING = (
    "eleven workers, the front end and the client share: of requests that come at random, one in a "
    "thousand waits for three or four others, whoever straggles; evenly spaced ones hardly wait, "
    "as behind the paper's barrier."
)
TEXTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "stragglers": lambda r: (
        "p99.9 with held answers over p99.9 without stragglers (uncoded), with 95 % intervals: "
        f"{tail_ratios(r, '', POLICIES)}; with evenly spaced requests "
        f"{tail_ratios(r, 'even_', POLICIES)}. {beyond(r)}{held_tails(r)}"
    ),
    "light": lambda r: (
        f"When nobody straggles, at 30 % of capacity ({r['capacity_qps']:.0f} single images a "
        f"second), coded costs {100 * (r['light_p50_ratio'] - 1):+.1f} % of p50."
    ),
    "overhead": lambda r: (
        f"The front end adds {r['front_end_ms']:.2f} ms to a forward pass of "
        f"{r['forward_ms']:.2f} ms."
    ),
    "pool": lambda r: f"Ten of eleven instant answers take {r['pool_first_10_of_11_ms']:.2f} ms.",
    "soak": lambda r: (
        f"After {duration(r['soak_seconds'])} of load the front end's memory had grown by "
        f"{100 * r['soak_front_end_growth']:.1f} %, the workers' by "
        f"{100 * r['soak_workers_growth']:.1f} % since the first minute."
    ),
}
"""Part -> a sentence."""


def duration(seconds: float) -> str:
    """Return it in words."""
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def chaos_text(result: dict[str, Any]) -> str:
    """What came of killing and stopping workers."""
    harm, spared = "", ""
    seconds = result.get("harm_seconds", FULL.harm_seconds)
    if "least_loaded" in result:  # the quick version has the workers take turns alone
        lazy = result["least_loaded"]
        spared = (
            f"; with the default routing {lazy['decoded']} decoded, p99 {number(lazy['p99_ms'])} ms"
        )
    if "killed" in result:
        harm = f", {result['killed']} times and {result['stopped']} times in all"
    right = "none to score"
    if result["decoded_accuracy"] is not None:
        low, high = result["decoded_accuracy_95"]
        right = (
            f"{percent(result['decoded_accuracy'])} % right (95 % interval {percent(low)} to "
            f"{percent(high)}; offline {percent(result['evaluated_recovered_accuracy'])} % at "
            "k = 10)"
        )
    return (
        f"{result['queries']:,} single images at 100 a second while a worker is killed every "
        f"{seconds:g} s and another stopped every {2 * seconds:g} s{harm} (k = 10, "
        f"11 workers in turn, `{' '.join(CHAOS_OPTIONS)}`): "
        f"{result['answered']:,} answers, {result['errors']} errors, "
        f"{result['mismatched_ids']} mismatched ids, "
        f"{result['decoded']} decoded with {right}, "
        f"{result['direct_labels_differ']} direct labels and "
        f"{result['direct_probabilities_differ']} direct probabilities off the offline ones. "
        f"p50 {number(result['p50_ms'])} ms, p99 {number(result['p99_ms'])} ms{spared}."
    )


def arms_table(result: dict[str, Any]) -> list[str]:
    """The lines of the table of policies, under each kind of straggling."""
    words = {
        "none": "nobody straggles",
        "held": "one answer in ten requests held back 100 ms",
        "blocked": "at {blocked_rate_rps:.1f} a second, the worker blocked for 100 ms instead",
        "even none": "evenly spaced requests, nobody straggles",
        "even held": "evenly spaced requests, one answer in ten held back",
        "single": "single images at {single_rate_qps:.0f} a second, one in a hundred held back",
    }
    rate = f" ({result['batch_rate_rps']:.1f} a second)" if "batch_rate_rps" in result else ""
    arms = {**result.get("straggler_arms", {}), **result.get("variant_arms", {})}
    order, cells = list(words), []
    for name in sorted(arms, key=lambda name: order.index(name.split("/")[0])):
        (kind, policy), arm = name.split("/"), arms[name]
        cells.append(
            [
                words[kind].format_map(result),
                policy,
                number(arm["p50_ms"]),
                number(arm["p99_ms"]),
                far_tail(arm),
                f"{percent(arm['decoded_share'])} %",
                percent(arm["accuracy"]),
            ]
        )
    columns = ("", "policy", "p50", "p99", "p99.9", "decoded", "accuracy")
    return [
        f"Requests of ten images at Poisson times, open loop at half of capacity{rate}, latency of "
        f"the last image in ms, p99.9 of {FEWEST_FOR_P999:,} requests or more:",
        "",
        markdown(columns, cells).strip(),
    ]


def render(text: str, sections: dict[str, str]) -> str:
    """Replace what stands between `<!-- figures:NAME -->` and `<!-- end -->`, where that is."""
    for name, content in sections.items():
        start = f"<!-- figures:{name} -->"
        head, mark, rest = text.partition(start)
        if not mark:
            continue
        _, end, tail = rest.partition("<!-- end -->")
        text = f"{head}{start}\n{content}\n{end}{tail}"
    return text


def read(path: Path) -> dict[str, Any] | None:
    """Return what a file holds; None if it is not there."""
    return read_json(path) if path.is_file() else None


def bundle_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what was measured of each bundle; of one that ships and was not, nothing."""
    shipped = shipped_bundles()
    results = {}
    for name in dict.fromkeys((*BUNDLES, *shipped)):
        found = read(folder / f"{name}.json")
        if found is not None or name in shipped:
            results[name] = found or {}
    return results


def method_rows(name: str, method: str, folder: Path) -> dict[int, Row]:
    """Return k -> `bench accuracy`'s row of a method on a bundle, with one worker missing.

    One that failed has an error.
    """
    path = folder / "accuracy.jsonl"
    rows = read_rows(path, "accuracy") if path.is_file() and name in shipped_bundles() else ()
    wanted = (method, weights_digest(name) if rows else "", 1, 0)
    return {
        row["k"]: row
        for row in sorted(newest(rows).values(), key=lambda row: not row["settings"].get("quick"))
        if (row["label"], row["settings"].get("bundle"), row["missing"], row["corrupt"]) == wanted
    }


def paper_of(name: str, folder: Path) -> Paper:
    """Return what a folder of results says of the paper's objective and a bundle's network."""
    trained = {k: found for k in SIZES if (found := read(folder / f"pixels-{name}-k{k}.json"))}
    rows = method_rows(name, PaperInvNet.name, folder)
    finished = {k: row for k, row in rows.items() if row["error"] is None}
    return Paper(trained, finished, frozenset(rows) - frozenset(finished))


def engine_table(folder: Path) -> str:
    """What a worker's tasks take by either engine; that nothing was measured, if so."""
    found = {n: one for n in BUNDLES if (one := read(folder / f"engine-{n}.json")) is not None}
    if not found:
        return "What they take has not been measured in this version."

    def cell(report: Mapping[str, Any], task: str) -> str:
        before, after = (arm["median"] for arm in report[f"engine_ms_{task}"].values())
        low, high = report[f"engine_ratio_{task}_spread"]
        ratio = report[f"engine_ratio_{task}"]
        return f"{before:.1f} → {after:.1f} ms ({ratio:.1f} times, {low:.1f} to {high:.1f})"

    rows = [
        [task, *(cell(report, key) for report in found.values())]
        for task, key in (("a query", "query"), ("the parity of ten", "parity"))
    ]
    machines = dict.fromkeys(f"{one['machine']}, {one['cores']} cores" for one in found.values())
    return (
        f"{markdown(['PyTorch → ONNX Runtime', *found], rows)}\n"
        f"Medians, and their ratio over the rounds. Measured on {'; '.join(machines)}."
    )


def sections(folder: Path = RESULTS) -> dict[str, str]:
    """Return every section of README and the pages in docs from the files in a folder."""
    results = bundle_results(folder)
    papers = {name: paper_of(name, folder) for name in results}
    seeds = {name: found for name in results if (found := read(folder / f"seed-{name}.json"))}
    paper, serve = read(folder / "paper-mnist-k2.json"), read(folder / "serve.json")
    return {
        "bundles": bundle_table(results, papers, seeds),
        "costs": cost_table(results),
        "rivals": rival_costs(tuple(results)),
        "engines": engine_table(folder),
        "serve": serve_headline(serve or {}),
        "paper": paper_table(paper, "configs/mnist.json")
        if paper
        else "What they reach has not been measured in this version.",
        **headlines(folder, GRID),
    }


def cuda_times(folder: Path) -> str:
    """The times of the parts on a GPU; empty if none was measured."""
    paths = {name: folder / f"{name}-cuda.json" for name in shipped_bundles()}
    results = {name: found for name, path in paths.items() if (found := read(path))}
    if not results:
        return ""
    machines = dict.fromkeys(found["info"]["machine"] for found in results.values())
    times = [cost for cost in COSTS if "_ms" in cost.needed]
    return f"{cost_table(results, times)}\n\nMeasured on {'; '.join(machines)}."


def cuda_speed(folder: Path) -> str:
    """The tables of `benchmarks inverse`, `embed` and `train` on a GPU; empty if there are none."""
    path = folder / "speed-cuda.json"
    return speed_section(path) if path.is_file() else ""


def full_paper(folder: Path) -> str:
    """What the paper's settings reach with all their epochs; empty if that was not measured."""
    found = [read(folder / f"paper-full-mnist-k{k}.json") for k in SIZES]
    return "\n\n".join(paper_table(one, "configs/paper/mnist.json") for one in found if one)


def results_page(folder: Path, pictures: str) -> str:
    """The page of a folder of results: the benchmarks', and what only some machines can measure.

    Args:
        folder: where the results lie.
        pictures: the folder's path as seen from the page.
    """
    serve = read(folder / "serve.json")
    more = {
        "The service": serve_table(serve) if serve else "",
        "Checks of the shipped bundles": bundle_checks(bundle_results(folder), folder),
        "Times on a CUDA machine": cuda_times(folder),
        "Speed of the invertible network on a CUDA machine": cuda_speed(folder),
        "The paper's settings with all their epochs": full_paper(folder),
    }
    return page(
        folder,
        pictures,
        GRID,
        ROOT / LATENCY_GRID,
        {title: text for title, text in more.items() if text},
    )


def write_page(folder: Path, path: Path) -> None:
    """Render a folder of results into a page; its pictures are linked relative to it."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    write_text(path, results_page(folder, folder.relative_to(path.parent).as_posix()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="*", default=shipped_bundles(), help="which (all)")
    parser.add_argument("--data-dir", type=Path, help="where the image sets lie; measures on them")
    parser.add_argument(
        "--measure", action="store_true", help="without --data-dir: measure, look for images"
    )
    parser.add_argument(
        "--costs", action="store_true", help="measure the times, on a quiet machine"
    )
    parser.add_argument("--device", default="cpu", help="that the costs are measured on (cpu)")
    parser.add_argument("--page", type=Path, help="render this folder's results.md alone")
    arguments = parser.parse_args(argv)
    return guarded(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Measure what was asked for, then render.

    Raises:
        UserError: before anything is measured, if a bundle does not ship or a folder is not there.
    """
    if arguments.page is not None:
        measures = arguments.measure or arguments.data_dir or arguments.costs
        if measures or arguments.bundle != shipped_bundles():
            raise UserError("--page renders what is there: no bundle, nothing to measure with it")
        write_page(arguments.page, arguments.page / "results.md")
        return
    unknown = [name for name in arguments.bundle if name not in shipped_bundles()]
    if unknown:
        ship = ", ".join(shipped_bundles())
        raise UserError(f"no bundle {', '.join(unknown)} ships; these do: {ship}")
    everything = arguments.measure or arguments.data_dir is not None
    if arguments.bundle != shipped_bundles() and not (everything or arguments.costs):
        raise UserError("a bundle is measured with --measure or --costs; without, all are rendered")
    device = choose_device(arguments.device)
    if device.type != "cpu" and (everything or not arguments.costs):
        raise UserError("--device goes with --costs alone: all else is measured on the CPU")
    for name in arguments.bundle if everything or arguments.costs else ():
        bundle = load_bundle(name, device)
        found = measure(name, bundle, arguments.data_dir) if everything else {}
        file = name if device.type == "cpu" else f"{name}-{device.type}"
        update(file, {**found, "info": info_report(bundle, SIZES)})
    write_page(RESULTS, PAGE)
    found = sections(RESULTS)
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / name for name in RENDERED)}
    for name in found:
        if not any(f"<!-- figures:{name} -->" in text for text in texts.values()):
            raise UserError(f"none of {', '.join(RENDERED)} has <!-- figures:{name} -->")
    for path, text in texts.items():
        write_text(path, render(text, found))


if __name__ == "__main__":
    sys.exit(main())
