"""Measure the shipped bundles on the whole test splits, and render the figures into README.md.

    python tools/figures.py --data-dir data     measure (about 10 minutes on 2 cores), then render
    python tools/figures.py                     render what is in docs/results

`docs/results/NAME.json` holds what was measured of a bundle. `docs/results/paper-mnist-k2.json` is
a copy of what the paper's four commands left in `runs/mnist/fusion-k2/evaluation.json`; where it is
missing, the README says that it has not been measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from codedinvnet.bundle import load_bundle, shipped_bundles
from codedinvnet.checkpoint import write_json
from codedinvnet.report import evaluation_report, info_report, inversion_report
from codedinvnet.stages import evaluation_images

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
SIZES = (2, 4, 10)


def measure(name: str, data_dir: Path) -> dict[str, Any]:
    """Run evaluate (with both sanity arms at the largest k), invert and info on one bundle."""
    bundle = load_bundle(name)
    source = evaluation_images(bundle, "test", data_dir)
    largest = SIZES[-1]
    return {
        "evaluate": [evaluation_report(bundle, source, split="test", k=k) for k in SIZES],
        "shuffled": evaluation_report(bundle, source, split="test", k=largest, shuffle_parity=True),
        "pixel_mean": evaluation_report(bundle, source, split="test", k=largest, pixel_mean=True),
        "invert": inversion_report(bundle.model, source),
        "info": info_report(bundle, SIZES),
    }


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def bundle_table(results: dict[str, dict[str, Any]]) -> str:
    """Accuracy of every bundle at every k, with the sanity arms."""
    lines = [
        "| bundle | k | overhead | normal | recovered | worst position | agreement |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        for row in result["evaluate"]:
            recovered = f"{percent(row['recovered_accuracy'])} ± "
            recovered += percent(row["recovered_accuracy_std"])
            lines.append(
                f"| {name} | {row['k']} | {100 / row['k']:.0f} % | "
                f"{percent(row['normal_accuracy'])} | {recovered} | "
                f"{percent(row['worst_position_accuracy'])} | {percent(row['agreement'])} |"
            )
    machine = next(iter(results.values()))["evaluate"][0]["machine"]
    lines += [
        "",
        "Accuracy in % on the whole test split, against the labels; recovered is the mean over all "
        "erasure positions and 5 random groupings, ± the standard deviation of a bootstrap over "
        f"groups. Measured on {machine}.",
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
        ("fixed-point iterations, mean", [f"{i['iterations']:.1f}" for i in invert]),
        (
            "largest singular value (bound)",
            [f"{i['largest_singular_value']:.4f} ({i['coefficient']})" for i in invert],
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
        for name in ("mnist", "fashion")
        if (RESULTS / f"{name}.json").is_file()
    }
    paper = RESULTS / "paper-mnist-k2.json"
    return {
        "bundles": bundle_table(results),
        "costs": cost_table(results),
        "paper": paper_table(json.loads(paper.read_text(encoding="utf-8")))
        if paper.is_file()
        else "What they reach has not been measured in this version.",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="where the image sets lie")
    arguments = parser.parse_args()
    if arguments.data_dir:
        for name in shipped_bundles():
            write_json(RESULTS / f"{name}.json", measure(name, arguments.data_dir))
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text(encoding="utf-8"), sections()), encoding="utf-8")


if __name__ == "__main__":
    main()
