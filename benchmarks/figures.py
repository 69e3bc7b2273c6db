"""Write the figures of README.md and the pages in docs, from the rows in docs/results.

Between `<!-- figures:NAME -->` and `<!-- end -->` of a page stands the table of that name, and
nothing else: what is to be said of it is written by people. Pictures are drawn, too.

    python -m benchmarks.figures                          write what is in docs/results
    python -m benchmarks.figures --data-dir data          measure the bundles (half an hour) before
    python -m benchmarks.figures --data-dir data mnist    measure one bundle
    python -m benchmarks.figures --measure                the same on images from the usual places
    python -m benchmarks.figures --costs                  measure times and multiply-adds alone

`NAME.json` holds what was measured of a bundle; `COMMANDS` says what makes the other files.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pandas import DataFrame, Series

from benchmarks import ablation, drift, engine, equal_cost, liars
from benchmarks.choosing import choosing
from benchmarks.policies import choice, draw_policies
from codedinvnet.bench import plots, tables
from codedinvnet.cli.common import guarded
from codedinvnet.codes.backup import backup_network, backup_width
from codedinvnet.codes.equal_cost import macs, plain_network, plain_width, served_macs
from codedinvnet.codes.invnet import PaperInvNet
from codedinvnet.codes.mean import Evidence
from codedinvnet.codes.registry import OURS, known_method
from codedinvnet.errors import UserError
from codedinvnet.evaluation.accuracy import evaluation_report
from codedinvnet.evaluation.cost import info_report
from codedinvnet.evaluation.inversion import inversion_report
from codedinvnet.files import read_json, write_json, write_text
from codedinvnet.models.bundle import Bundle, load_bundle, shipped_bundles, weights_digest
from codedinvnet.rows import current_accuracy, current_latency, read_rows
from codedinvnet.simulation import measured, sweep
from codedinvnet.simulation.picture import draw_map
from codedinvnet.stages import evaluation_images

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
ABLATION_GRID = ROOT / "configs" / "bench" / "ablation.json"
BUNDLES = ("mnist", "fashion", "cifar10")
"""In the order of the tables."""
SIZES = (2, 4, 10)
HARD = 10
"""The group size of short tables: the hard case, an overhead of a tenth."""
BRIEF = ((10, 0.4, "pareto"), (1, 0.4, "pareto"))
"""Images of a request, load and stragglers of the settings that a short table shows."""
EVIDENCE: tuple[Evidence, ...] = ("both", "latent", "side")
MEASURE = "python -m benchmarks.figures --data-dir data"
COMMANDS = {
    "accuracy.jsonl": "codedinvnet bench accuracy configs/bench/accuracy.json --data-dir data",
    "latency.jsonl": "codedinvnet bench latency configs/bench/latency.json --data-dir data",
    "validation.json": "codedinvnet simulate configs/bench/simulate-measured.json "
    "--measured docs/results/latency.jsonl",
    "map.jsonl": "codedinvnet simulate configs/bench/simulate-map.json",
    "auto.jsonl": "codedinvnet simulate configs/bench/simulate-auto.json",
    "off-map.jsonl": "codedinvnet simulate configs/bench/simulate-off-map.json",
    "policies.jsonl": "codedinvnet simulate configs/bench/simulate-policies.json",
    "two-losses.jsonl": "codedinvnet simulate configs/bench/simulate-two-losses.json",
    "ablation.jsonl": "python -m benchmarks ablation configs/bench/ablation.json --data-dir data",
    "speed.jsonl": "python -m benchmarks engine mnist fashion cifar10",
    "liars.json": "python -m benchmarks liars --data-dir data --json",
    "drift.json": "python -m benchmarks drift --data-dir data --json",
}
Formats = Mapping[str, str]


# The bundles


def measure(name: str, bundle: Bundle, data_dir: Path | None) -> dict[str, Any]:
    """Run evaluate (with both sanity arms at the largest k) and invert on one bundle."""
    source = evaluation_images(bundle, "test", data_dir)
    report = partial(evaluation_report, bundle, source, split="test")
    arms: dict[str, list[dict[str, Any]]] = {
        evidence: [report(k=k, evidence=evidence) for k in SIZES] for evidence in EVIDENCE
    }
    return {
        "evaluate": arms["both"],
        "latent": arms["latent"],
        "side": arms["side"],
        "shuffled": report(k=HARD, shuffle_parity=True),
        "pixel_mean": None
        if bundle.model.encoder.keeps_apart  # its recovery head needs more than the average image
        else report(k=HARD, pixel_mean=True),
        "invert": inversion_report(bundle.model, source),
        "weights": weights_digest(name),
    }


def read(path: Path) -> dict[str, Any]:
    """Return what a file holds; nothing if it is not there."""
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return found


def bundle_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what was measured of each bundle that ships, and of others of a known name."""
    names = dict.fromkeys((*BUNDLES, *shipped_bundles()))
    return {name: found for name in names if (found := read(folder / f"{name}.json"))}


def bundles(folder: Path) -> str:
    """Return the accuracy of every bundle at every k, and what each kind of evidence is worth."""
    lines = []
    for name, found in bundle_files(folder).items():
        for place, report in enumerate(found.get("evaluate", ())):
            k = report["k"]
            again = read(folder / f"seed-{name}.json").get(f"test_k{k}", {})
            pixels = read(folder / f"pixels-{name}-k{k}.json").get(f"test_k{k}", {})
            own = pixels.get("recovered_accuracy", _paper(folder, name, k))
            lines.append(
                {
                    "bundle": name,
                    "k": k,
                    "extra queries": 1 / k,
                    "extra multiply-adds": extra_macs(found.get("info", {}), k),
                    "normal": report["normal_accuracy"],
                    "recovered": report["recovered_accuracy"],
                    "another seed": again.get("recovered_accuracy"),
                    "worst position": report["worst_position_accuracy"],
                    "agreement": report["agreement"],
                    "latent alone": found["latent"][place]["recovered_accuracy"],
                    "side alone": found["side"][place]["recovered_accuracy"],
                    "paper's objective": own if isinstance(own, str) else percent(own),
                }
            )
    frame = DataFrame(lines)
    for column in frame.columns[4:-1]:
        frame[column] = [percent(value) for value in frame[column]]
    return tables.markdown(frame, dict.fromkeys(("extra queries", "extra multiply-adds"), ".0%"))


def percent(value: float | None) -> str:
    """Return a share in %; "" for None."""
    return "" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def extra_macs(info: Mapping[str, Any], k: int) -> float:
    """Return E's and f's multiply-adds for a parity query of k over those of the k."""
    if f"encoder_macs_k{k}" not in info:
        return math.nan
    extra = info["embedding_macs"] + info[f"encoder_macs_k{k}"] + info["reading_macs"]
    return float(extra / (k * info["embedding_macs"]))


def _paper(folder: Path, name: str, k: int) -> float | str | None:
    """Return what `bench accuracy` has of the paper's encoder for a bundle's own f and g."""
    for row in current_accuracy(read_rows(folder / "accuracy.jsonl", "accuracy")):
        if (row["label"], row["bundle"], row["k"]) == (PaperInvNet.name, name, k):
            return "failed" if row["error"] else float(row["recovered"])
    return None


def checks(folder: Path) -> str:
    """Return what is left when a part of the evidence is taken away, at the largest k."""
    return tables.markdown(
        DataFrame(
            {
                "bundle": name,
                "k": found["shuffled"]["k"],
                "recovered": percent(found["evaluate"][-1]["recovered_accuracy"]),
                "with another group's parity": percent(found["shuffled"]["recovered_accuracy"]),
                "with the average image": percent(
                    (found.get("pixel_mean") or {}).get("recovered_accuracy")
                ),
            }
            for name, found in bundle_files(folder).items()
            if "shuffled" in found
        )
    )


COSTS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "embedding f, one image": ("info", lambda i: f"{i['embedding_macs'] / 1e6:.1f} M"),
    "encoder E, ten images": ("info", lambda i: f"{i['encoder_macs_k10'] / 1e6:.1f} M"),
    "extra multiply-adds for a group of ten": ("info", lambda i: f"{extra_macs(i, 10):.0%}"),
    "recovery head": ("info", lambda i: f"{i['recovery_head_macs'] / 1e6:.2f} M"),
    "reading z_p for the recovery head, once a group": (
        "info",
        lambda i: f"{i['reading_macs'] / 1e6:.2f} M" if i["reading_macs"] else "none",
    ),
    "embedding f, time": ("info", lambda i: f"{i['embedding_ms']:.1f} ms"),
    "encoder E, ten images, time": ("info", lambda i: f"{i['encoder_ms_k10']:.1f} ms"),
    "training": ("info", lambda i: f"{i['provenance']['seconds'] / 60:.0f} min"),
    "largest inversion error (pixels in 0..1)": ("invert", lambda i: f"{i['largest_error']:.1e}"),
    "fixed-point iterations, mean": (
        "invert",
        lambda i: f"{i['iterations']:.1f}" if "coefficient" in i else "none",
    ),
    "largest singular value (bound)": (
        "invert",
        lambda i: (
            f"{i['largest_singular_value']:.4f} ({i['coefficient']})"
            if "coefficient" in i
            else "no bound"
        ),
    ),
}
"""Line of the table of costs -> the section of a bundle's file, and what writes the cell."""


def costs(folder: Path) -> str:
    """Return multiply-adds and times of the parts, and what `invert` found."""

    def cell(found: Mapping[str, Any], section: str, form: Callable[[Any], str]) -> str:
        try:
            return form(found[section])
        except (KeyError, TypeError):  # a null stands for what could not be measured
            return "not measured"

    files = bundle_files(folder)
    lines = [
        {"": label, **{name: cell(found, *cost) for name, found in files.items()}}
        for label, cost in COSTS.items()
    ]
    return tables.markdown(DataFrame(lines))


def rivals(folder: Path) -> str:
    """Return multiply-adds of the classifiers in the tables of the methods, for one image each."""
    models = {name: load_bundle(name).model for name in BUNDLES if name in shipped_bundles()}
    lines = [
        {
            "multiply-adds of one image": name,
            "g(f(x))": served_macs(model),
            "the plain ResNet": macs(plain_network(model, plain_width(model)).eval(), model),
            f"the small backup, k = {HARD}": macs(
                backup_network(model, backup_width(model, HARD)).eval(), model
            ),
        }
        for name, model in models.items()
    ]
    frame = DataFrame(lines).set_index("multiply-adds of one image")
    return tables.markdown((frame / 1e6).map("{:.1f} M".format).T.reset_index(names=""))


def paper(folder: Path) -> str:
    """Return what the paper's four commands reached, and the minutes that each took."""
    found = read(folder / "paper-mnist-k2.json")
    if not found:
        return ""
    names = ("normal_accuracy", "recovered_accuracy", "worst_position_accuracy", "agreement")
    line = {"k": found["k"]} | {
        name.replace("_accuracy", "").replace("_", " "): percent(found[name]) for name in names
    }
    minutes = {f"{stage}, min": f"{s / 60:.1f}" for stage, s in found["seconds"].items()}
    return tables.markdown(DataFrame([line | minutes | {"machine": found["machine"]}]))


# Accuracy


def accuracy_frame(path: Path) -> DataFrame:
    """Return the frame of a file of rows."""
    return tables.accuracy_frame(read_rows(path, "accuracy"))


def hard(frame: DataFrame) -> DataFrame:
    """Keep the best base model of each method where one of ten workers is missing."""
    best = tables.best_bases(frame)
    return best[(best["k"] == HARD) & (best["missing"] == 1) & (best["corrupt"] == 0)]


def accuracy(path: Path) -> str:
    """Return recovered accuracies of the hard case, methods down and data sets across.

    In brackets is what codes without direct answers give when nobody is missing.
    """
    frame = accuracy_frame(path)
    best = hard(frame)
    texts = tables.plus_minus(best["recovered"], best["recovered ±"])
    whole = best["complete"].map(lambda value: "" if math.isnan(value) else f" ({value:.2f})")
    cells = _by_dataset(best, texts + whole)
    failed = {
        (row["label"], row["dataset"]): "failed"
        for row in current_accuracy(read_rows(path, "accuracy"))
        if row["error"] and row["k"] == HARD
    }
    extra = best.groupby("method")["extra"].max()
    lines = [
        {
            "method": method,
            "extra queries": f"{extra[method]:.0f} %",
            **{name: cells.get((method, name), failed.get((method, name))) for name in _sets(best)},
        }
        for method in best["method"].unique()
    ]
    first = {"method": f"no worker missing: {' / '.join(_bases(frame))}", "extra queries": ""}
    return tables.markdown(DataFrame([first | _normal(frame), *lines]))


def _sets(frame: DataFrame) -> list[str]:
    return list(frame["dataset"].unique())


def _by_dataset(frame: DataFrame, texts: Series) -> dict[tuple[str, str], str]:
    return dict(zip(zip(frame["method"], frame["dataset"], strict=True), texts, strict=True))


def _bases(frame: DataFrame) -> list[str]:
    return list(frame["base"].unique())


def _normal(frame: DataFrame) -> dict[str, str]:
    """Return the accuracy of direct answers by data set, base models beside each other."""
    means = frame.groupby(["dataset", "base"])["normal"].first()
    return {
        name: " / ".join(f"{means[name, base]:.2f}" for base in means[name].index)
        for name in _sets(frame)
    }


def late(path: Path) -> str:
    """Return how often direct and late answers are right in the hard case, data sets across."""
    best = hard(accuracy_frame(path))
    cells = _by_dataset(best, best["recovered"].map("{:.2f}".format))
    direct = best[best["method"] == OURS].set_index("dataset")["normal"]
    brief = [name for name in best["method"].unique() if _is_brief(name)]
    lines = [{"answer, % right": "direct", **direct.map("{:.2f}".format)}]
    for name in brief:
        own = {dataset: cells.get((name, dataset)) for dataset in direct.index}
        lines.append({"answer, % right": name, **own})
    return tables.markdown(DataFrame(lines))


def _is_brief(name: str) -> bool:
    method = known_method(name)
    return method is not None and method.in_brief and not method.is_bound


def one_set(name: str, path: Path) -> str:
    """Return the table of all methods and settings of one data set."""
    frame = accuracy_frame(path)
    return tables.accuracy_table(frame[frame["dataset"] == name])


def margins(path: Path) -> str:
    """Return how far our bundles are ahead of each rival."""
    return tables.markdown(tables.margins(accuracy_frame(path)), tables.MARGIN_FORMATS)


def published(path: Path) -> str:
    """Return the papers' figures beside ours."""
    return tables.markdown(tables.published(accuracy_frame(path)), tables.PUBLISHED_FORMATS)


def failed(path: Path) -> str:
    """Return the trials that failed."""
    rows = current_accuracy(read_rows(path, "accuracy"))
    return tables.markdown(tables.failures(rows, tables.FAILED_TRIAL))


# Latency


def latency_frame(path: Path) -> DataFrame:
    """Return the frame of a file of rows."""
    return tables.latency_frame(read_rows(path, "latency"))


def latency_brief(path: Path) -> str:
    """Return the table of two settings."""
    frame = latency_frame(path)
    places = zip(frame["batch"], frame["load"], frame["stragglers"], strict=True)
    return tables.latency_table(frame[[place in BRIEF for place in places]])


def conditions(path: Path) -> str:
    """Return under which conditions the runs were made."""
    kept = [row for row in current_latency(read_rows(path, "latency")) if row["error"] is None]
    commits = dict.fromkeys(row["commit"][:7] for row in kept)
    figures = {
        "mean service time, ms": "mean_service_ms",
        "front end, ms of a processor a query": "front_ms_per_query",
        "processors busy": "processors_busy",
    }
    lines = [
        {"": words, "least": min(values), "most": max(values)}
        for words, name in figures.items()
        if (values := [row[name] for row in kept if row.get(name) is not None])
    ]
    machine = ", ".join(dict.fromkeys(row["machine"] for row in kept))
    frame = DataFrame(lines).map(lambda v: v if isinstance(v, str) else f"{v:.3g}")
    frame.loc[len(frame)] = ["machine, commits", machine, ", ".join(commits)]
    return tables.markdown(frame)


# Simulation


def policies(path: Path) -> str:
    """Return simulated p99.9 and work of the policies, a column for each place."""
    frame = sweep.frame_of(sweep.read_rows(path))
    table = sweep.by_policy(frame).T
    table.columns = [f"{Path(model).stem}, {batch}" for model, batch, _ in table.columns]
    work = frame.groupby("policy")["work"].agg(["min", "max"])
    texts = [f"{low:.2f} to {high:.2f}" for low, high in work.loc[table.index].to_numpy()]
    return tables.markdown(
        table.map("{:.0f}".format).assign(work=texts).reset_index(names="policy")
    )


def map_winners(path: Path) -> str:
    """Return who wins at each load; a star where another policy's interval overlaps the lowest."""
    best = sweep.winners(sweep.frame_of(sweep.read_rows(path)))
    best["policy"] += best["contested"].map({True: " *", False: ""})
    best["load"] = best["load"].map("{:.0%}".format)
    table = best.pivot(index=["stragglers", "batch"], columns="load", values="policy")
    order = best[["stragglers", "batch"]].drop_duplicates().itertuples(index=False, name=None)
    return tables.markdown(table.reindex(order).reset_index())


def map_tails(path: Path) -> str:
    """Return how near every policy's p99.9 comes to the lowest of each place."""
    frame = sweep.frame_of(sweep.read_rows(path))
    work = dict(frame.groupby("policy")["work"].mean())
    return tables.markdown(tables.against_lowest(sweep.by_policy(frame), work))


def validation(path: Path) -> str:
    """Return how well simulated percentiles meet the measured ones.

    Raises:
        UserError: if the file is damaged.
    """
    report = read_json(path)
    if not isinstance(report, dict) or report.get("schema_version") != measured.SCHEMA:
        raise UserError(f"{path} is no comparison of `simulate --measured`: write it again")
    lines = [
        {
            "percentile": tables.TITLES[name],
            "arms": found["compared"],
            f"within {measured.NEAR:.0%}": found["near"],
            "median error": f"{found['median_error']:.1%}",
            "pairs that differ by a quarter": found["pairs"],
            "in the measured order": found["in_order"],
        }
        for name, found in measured.tally(report["arms"]).items()
    ]
    return tables.markdown(DataFrame(lines))


# The pages


FROM_FOLDER: Mapping[str, Callable[[Path], str]] = {
    "choice": choice,
    "bundles": bundles,
    "checks": checks,
    "costs": costs,
    "rivals": rivals,
    "paper": paper,
    "equal-cost": equal_cost.table,
    "equal-margins": equal_cost.margins,
}
FROM_FILE: Mapping[str, tuple[str, Callable[[Path], str]]] = {
    "late": ("accuracy.jsonl", late),
    "accuracy": ("accuracy.jsonl", accuracy),
    **{f"accuracy-{name}": ("accuracy.jsonl", partial(one_set, name)) for name in BUNDLES},
    "margins": ("accuracy.jsonl", margins),
    "published": ("accuracy.jsonl", published),
    "failed": ("accuracy.jsonl", failed),
    "tails": ("latency.jsonl", lambda path: tables.tails_table(latency_frame(path))),
    "latency": ("latency.jsonl", latency_brief),
    "latency-all": ("latency.jsonl", lambda path: tables.latency_table(latency_frame(path))),
    "conditions": ("latency.jsonl", conditions),
    "policies": ("policies.jsonl", policies),
    "two-losses": ("two-losses.jsonl", policies),
    "map": ("map.jsonl", map_winners),
    "map-tails": ("map.jsonl", map_tails),
    "auto": ("auto.jsonl", choosing),
    "off-map": ("off-map.jsonl", choosing),
    "validation": ("validation.json", validation),
    "liars": ("liars.json", liars.table),
    "drift": ("drift.json", drift.table),
    "ablation": (
        "ablation.jsonl",
        lambda path: ablation.table(read_rows(path), ablation.load_grid(ABLATION_GRID)),
    ),
    "engines": ("speed.jsonl", lambda path: engine.table(read_rows(path))),
}
"""Name of a place in the pages -> the file that its table is made of, and how."""


def section(name: str, folder: Path = RESULTS) -> str:
    """Return a table by its name, or that it was not measured, with the command that does it."""
    if name in FROM_FOLDER:
        return FROM_FOLDER[name](folder).strip() or f"Not measured yet; `{MEASURE}` measures it."
    file, render = FROM_FILE[name]
    path = folder / file
    if not path.is_file() or not path.stat().st_size:
        into = ">" if COMMANDS[file].endswith("--json") else "--out"
        return f"Not measured yet; `{COMMANDS[file]} {into} docs/results/{file}` measures it."
    return render(path).strip()


MARKED = re.compile(r"(<!-- figures:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, table: Callable[[str], str] = section) -> str:
    """Replace what stands between a page's marks.

    Raises:
        UserError: if a page asks for a table that there is not.
    """

    def replaced(found: re.Match[str]) -> str:
        if found[2] not in {*FROM_FOLDER, *FROM_FILE}:
            raise UserError(f"there is no table {found[2]!r}")
        return f"{found[1]}{table(found[2])}\n{found[3]}"

    return MARKED.sub(replaced, text)


def pages() -> Iterable[Path]:
    """Return the pages that may have marks."""
    return (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def draw(folder: Path = RESULTS) -> None:
    """Draw the pictures of the rows beside them."""
    plots.draw_accuracy(folder / "accuracy.jsonl")
    plots.draw_latency(folder / "latency.jsonl")
    if (folder / "map.jsonl").is_file():
        draw_map(sweep.frame_of(sweep.read_rows(folder / "map.jsonl")), folder / "map.png")
    if (folder / "policies.jsonl").is_file():
        draw_policies(folder / "policies.jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m benchmarks.figures`; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", nargs="*", default=shipped_bundles(), help="which (all)")
    parser.add_argument("--data-dir", type=Path, help="where the image sets lie; measures on them")
    parser.add_argument(
        "--measure", action="store_true", help="without --data-dir: measure, look for images"
    )
    parser.add_argument(
        "--costs", action="store_true", help="measure the times, on a quiet machine"
    )
    arguments = parser.parse_args(argv)
    return guarded(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Measure what was asked for, then write all figures.

    Raises:
        UserError: before anything is measured, if a bundle does not ship.
    """
    unknown = [name for name in arguments.bundle if name not in shipped_bundles()]
    if unknown:
        ship = ", ".join(shipped_bundles())
        raise UserError(f"no bundle {', '.join(unknown)} ships; these do: {ship}")
    everything = arguments.measure or arguments.data_dir is not None
    for name in arguments.bundle if everything or arguments.costs else ():
        bundle, path = load_bundle(name), RESULTS / f"{name}.json"
        found = measure(name, bundle, arguments.data_dir) if everything else {}
        write_json(path, {**read(path), **found, "info": info_report(bundle, SIZES)})
    draw()
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (new := render(text)) != text:
            write_text(path, new)


if __name__ == "__main__":
    sys.exit(main())
