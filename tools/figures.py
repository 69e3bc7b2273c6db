"""Measure the shipped bundles on the whole test splits, and render all figures.

They go into README.md, between its marks, and into docs/results.md.

    python tools/figures.py --data-dir data          measure (half an hour on 2 cores), then render
    python tools/figures.py --data-dir data mnist    measure one bundle
    python tools/figures.py --costs                  measure times and multiply-adds alone
    python tools/figures.py                          render what is in docs/results
    python tools/figures.py --page results/quick     render the page of another folder into it

In `docs/results`, `NAME.json` holds what was measured of a bundle, `serve.json` what
`codedinvnet bench serve mnist --data-dir data --out docs/results/serve.json` wrote, and
`paper-mnist-k2.json` is a copy of what the paper's four commands left in
`runs/mnist/fusion-k2/evaluation.json`; the rows of the other benchmarks are `make bench`'s. What is
missing is called not measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codedinvnet.bench.results import headlines, page
from codedinvnet.bundle import load_bundle, shipped_bundles
from codedinvnet.checkpoint import write_json
from codedinvnet.methods import Evidence
from codedinvnet.report import evaluation_report, info_report, inversion_report
from codedinvnet.stages import evaluation_images

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
SIZES = (2, 4, 10)
EVIDENCE: tuple[Evidence, ...] = ("both", "latent", "side")


def measure(name: str, data_dir: Path) -> dict[str, Any]:
    """Run evaluate (with both sanity arms at the largest k) and invert on one bundle."""
    bundle = load_bundle(name)
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
        "pixel_mean": evaluation_report(bundle, source, split="test", k=largest, pixel_mean=True),
        "invert": inversion_report(bundle.model, source),
    }


def update(name: str, found: dict[str, Any]) -> None:
    """Put what was measured into the bundle's file beside the rest."""
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**old, **found})


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def bundle_table(results: dict[str, dict[str, Any]]) -> str:
    """Accuracy of every bundle at every k, with the sanity arms."""
    lines = [
        "| bundle | k | overhead | normal | recovered | worst position | agreement | "
        "latent alone | side alone |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        arms = zip(result["evaluate"], result["latent"], result["side"], strict=True)
        for row, latent, side in arms:
            recovered = f"{percent(row['recovered_accuracy'])} ± "
            recovered += percent(row["recovered_accuracy_std"])
            lines.append(
                f"| {name} | {row['k']} | {100 / row['k']:.0f} % | "
                f"{percent(row['normal_accuracy'])} | {recovered} | "
                f"{percent(row['worst_position_accuracy'])} | {percent(row['agreement'])} | "
                f"{percent(latent['recovered_accuracy'])} | {percent(side['recovered_accuracy'])} |"
            )
    machine = next(iter(results.values()))["evaluate"][0]["machine"]
    lines += [
        "",
        "Accuracy in % on the whole test split, against the labels; recovered is the mean over all "
        "erasure positions and 5 random groupings, ± the standard deviation of a bootstrap over "
        "groups. Beside it, the same recovery head answers from the decoded latent alone, and from "
        "the missing member's side features alone, which is a small backup classifier of E's cost; "
        f"it was trained for all three. Measured on {machine}.",
        "",
    ]
    if "cifar10" in results:
        lines += [
            "CIFAR-10 was trained and measured on a JPEG-compressed copy, whose pixels differ "
            "slightly from the original's.",
            "",
        ]
    for name, result in results.items():
        shuffled, mean = result["shuffled"], result["pixel_mean"]
        lines.append(
            f"Checks for {name} at k = {shuffled['k']}: with another group's parity output "
            f"{percent(shuffled['recovered_accuracy'])} %, with the average image in place of E "
            f"{percent(mean['recovered_accuracy'])} %."
        )
    return "\n".join(lines)


def cost_table(results: dict[str, dict[str, Any]]) -> str:
    """Multiply-adds and times of the parts, and what `invert` found."""
    lines = [
        "| | " + " | ".join(results) + " |",
        "| --- |" + " --- |" * len(results),
    ]
    info = [result["info"] for result in results.values()]
    invert = [result["invert"] for result in results.values()]
    rows: list[tuple[str, list[str]]] = [
        ("embedding f, one image", [f"{i['embedding_macs'] / 1e6:.1f} M" for i in info]),
        ("encoder E, ten images", [f"{i['encoder_macs_k10'] / 1e6:.1f} M" for i in info]),
        ("recovery head", [f"{i['recovery_head_macs'] / 1e6:.2f} M" for i in info]),
        ("embedding f, time", [f"{i['embedding_ms']:.1f} ms" for i in info]),
        ("encoder E, ten images, time", [f"{i['encoder_ms_k10']:.1f} ms" for i in info]),
        ("largest inversion error (pixels in 0..1)", [f"{i['largest_error']:.1e}" for i in invert]),
        (
            "fixed-point iterations, mean",
            [f"{i['iterations']:.1f}" if "coefficient" in i else "none" for i in invert],
        ),
        (
            "largest singular value (bound)",
            [
                f"{i['largest_singular_value']:.4f} ({i['coefficient']})"
                if "coefficient" in i
                else "no bound"
                for i in invert
            ],
        ),
    ]
    lines += [f"| {label} | {' | '.join(values)} |" for label, values in rows]
    return "\n".join(lines)


def paper_table(result: dict[str, Any]) -> str:
    """What the paper's four commands reached, and how long each took."""
    seconds = result["seconds"]
    minutes = ", ".join(f"{stage} {value / 60:.1f}" for stage, value in seconds.items())
    return (
        f"`configs/mnist.json`, k = {result['k']}: normal accuracy "
        f"{percent(result['normal_accuracy'])} %, recovered accuracy "
        f"{percent(result['recovered_accuracy'])} ± {percent(result['recovered_accuracy_std'])} % "
        f"(worst position {percent(result['worst_position_accuracy'])} %), agreement "
        f"{percent(result['agreement'])} %, on the {result['images']:,} test images. "
        f"Minutes: {minutes}. Measured on {result['machine']}."
    )


POLICIES = ("coded", "uncoded", "hedge", "coded+hedge")


def tail_ratios(result: dict[str, Any], kind: str, policies: Sequence[str]) -> str:
    """Return the ratios of p99.9, with their intervals."""
    parts = []
    for policy in policies:
        name = f"{kind}p999_ratio_{policy.replace('+', '_')}"
        low, high = result[f"{name}_95"]
        parts.append(f"{policy} {result[name]:.2f} ({low:.2f} to {high:.2f})")
    return ", ".join(parts)


def serve_table(result: dict[str, Any]) -> str:
    """What `bench serve` found."""
    arms = {**result["straggler_arms"], **result["variant_arms"]}
    spared = result["least_loaded"]
    low, high = result["decoded_accuracy_95"]
    lines = [
        f"{result['queries']:,} single images at 100 a second while a worker is killed every 5 s "
        f"and another stopped every 10 s (k = 10, 11 workers in turn): {result['answered']:,} "
        f"answers, {result['errors']} errors, {result['mismatched_ids']} mismatched ids, "
        f"{result['decoded']} decoded with {percent(result['decoded_accuracy'])} % right "
        f"(95 % interval {percent(low)} to {percent(high)}; offline "
        f"{percent(result['evaluated_recovered_accuracy'])} % at k = 10), "
        f"{result['direct_labels_differ']} direct labels and "
        f"{result['direct_probabilities_differ']} direct probabilities off the offline ones. "
        f"p50 {result['p50_ms']:.1f} ms, p99 {result['p99_ms']:.1f} ms; with the default routing "
        f"{spared['decoded']} decoded, p99 {spared['p99_ms']:.1f} ms.",
        "",
        f"Requests of ten images at Poisson times, open loop at half of capacity "
        f"({result['batch_rate_rps']:.1f} a second), latency of the last image in ms:",
        "",
        "| | policy | p50 | p99 | p99.9 | decoded | accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    words = {
        "none": "nobody straggles",
        "held": "one answer in ten requests held back 100 ms",
        "blocked": f"at {result['blocked_rate_rps']:.1f} a second, the worker blocked for 100 ms "
        "instead",
        "even none": "evenly spaced requests, nobody straggles",
        "even held": "evenly spaced requests, one answer in ten held back",
        "single": f"single images at {result['single_rate_qps']:.0f} a second, one in a "
        "hundred held back",
    }
    order = list(words)
    for name in sorted(arms, key=lambda name: order.index(name.split("/")[0])):
        (kind, policy), arm = name.split("/"), arms[name]
        lines.append(
            f"| {words[kind]} | {policy} | {arm['p50_ms']:.1f} | {arm['p99_ms']:.1f} | "
            f"{arm['p999_ms']:.1f} | {percent(arm['decoded_share'])} % | "
            f"{percent(arm['accuracy'])} |"
        )
    lines += [
        "",
        f"p99.9 with held answers over p99.9 without stragglers (uncoded), with 95 % intervals: "
        f"{tail_ratios(result, '', POLICIES)}; with evenly spaced requests "
        f"{tail_ratios(result, 'even_', POLICIES[:2])}. "
        f"When nobody straggles, at 30 % of capacity ({result['capacity_qps']:.0f} single images "
        f"a second), coded costs {100 * (result['light_p50_ratio'] - 1):+.1f} % of p50. The front "
        f"end adds {result['front_end_ms']:.2f} ms to a forward pass of "
        f"{result['forward_ms']:.2f} ms; ten of eleven instant answers take "
        f"{result['pool_first_10_of_11_ms']:.2f} ms. After "
        f"{result['soak_seconds'] / 60:.0f} minutes of load the front end's memory had grown by "
        f"{100 * result['soak_front_end_growth']:.1f} %, the workers' by "
        f"{100 * result['soak_workers_growth']:.1f} % since the first minute. Measured on "
        f"{result['machine']}, {result['cores']} cores, which eleven workers, the front end and "
        "the client share: of requests that come at random, one in a thousand waits for three or "
        "four others, whoever straggles; evenly spaced ones hardly wait, as behind the paper's "
        "barrier.",
    ]
    return "\n".join(lines)


def render(text: str, sections: dict[str, str]) -> str:
    """Replace what stands between `<!-- figures:NAME -->` and `<!-- end -->`."""
    for name, content in sections.items():
        start = f"<!-- figures:{name} -->"
        head, mark, rest = text.partition(start)
        if not mark:
            raise SystemExit(f"README.md has no {start}")
        _, end, tail = rest.partition("<!-- end -->")
        text = f"{head}{start}\n{content}\n{end}{tail}"
    return text


def sections() -> dict[str, str]:
    """Return every rendered section from the files in docs/results."""
    results = {
        name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("mnist", "fashion", "cifar10")
        if (RESULTS / f"{name}.json").is_file()
    }
    paper, serve = RESULTS / "paper-mnist-k2.json", RESULTS / "serve.json"
    return {
        "bundles": bundle_table(results),
        "costs": cost_table(results),
        "serve": serve_table(json.loads(serve.read_text(encoding="utf-8")))
        if serve.is_file()
        else "Not measured in this version.",
        "paper": paper_table(json.loads(paper.read_text(encoding="utf-8")))
        if paper.is_file()
        else "What they reach has not been measured in this version.",
        **headlines(RESULTS),
    }


def write_page(folder: Path, path: Path) -> None:
    """Render a folder of results into a page; its pictures are linked relative to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(folder, folder.relative_to(path.parent).as_posix()), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="*", default=shipped_bundles(), help="which (all)")
    parser.add_argument("--data-dir", type=Path, help="where the image sets lie")
    parser.add_argument(
        "--costs", action="store_true", help="measure the times, on a quiet machine"
    )
    parser.add_argument("--page", type=Path, help="render this folder's results.md alone")
    arguments = parser.parse_args()
    if arguments.page is not None:
        write_page(arguments.page, arguments.page / "results.md")
        return
    for name in arguments.bundle:
        if arguments.data_dir:
            update(name, measure(name, arguments.data_dir))
        if arguments.data_dir or arguments.costs:
            update(name, {"info": info_report(load_bundle(name), SIZES)})
    write_page(RESULTS, PAGE)
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text(encoding="utf-8"), sections()), encoding="utf-8")


if __name__ == "__main__":
    main()
