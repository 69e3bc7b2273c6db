"""`python -m benchmarks figures`: the tables and pictures of README.md and docs, from their rows.

Between `<!-- figures:NAME -->` and `<!-- end -->` of a page stands the table of that name, and
nothing else: what is to be said of it is written by people. Pictures are drawn, too.

`NAME.json` holds what was measured of a bundle; `COMMANDS` says what makes the other files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pandas import DataFrame

from benchmarks import bundles, frontier, policies, protected, sessions, sweep
from benchmarks.bundles import BUNDLES, HARD
from benchmarks.peers import pages as peers
from benchmarks.stale import NOTE, note
from codedinvnet.codes.registry import known_method
from codedinvnet.common.errors import UserError
from codedinvnet.common.grid import read_rows
from codedinvnet.evaluation import tables
from codedinvnet.models.bundle import shipped_bundles

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
MEASURE = "python -m benchmarks figures --data-dir data"
SIMULATE = "python -m benchmarks sweep configs/bench/simulate-{}.json --out"
COMMANDS = {
    "accuracy.jsonl": "codedinvnet bench accuracy --data-dir data --out",
    "frontier.jsonl": "python -m benchmarks frontier configs/bench/frontier.json --data-dir data "
    "--out",
    "peers.jsonl": "python -m benchmarks peers --out",
    "several.jsonl": "python -m benchmarks peers --several --out",
    "sessions.jsonl": "python -m benchmarks sessions --out",
    "policies.jsonl": SIMULATE.format("policies"),
    "auto.jsonl": SIMULATE.format("auto"),
    "off-map.jsonl": SIMULATE.format("off-map"),
    "two-losses.jsonl": SIMULATE.format("two-losses"),
    "few-workers.jsonl": SIMULATE.format("few-workers"),
    "spread.jsonl": SIMULATE.format("spread"),
    "members.jsonl": SIMULATE.format("members"),
    "protect/digits-mlp.json": "python -m benchmarks protected digits-mlp --out FOLDER, for",
    "paper-mnist-k2.json": "python ./main.py --config_file configs/mnist.json -fusion --nactors 2 "
    "-test_fusion && cp runs/mnist/fusion-k2/evaluation.json",
}
"""File of docs/results -> the command that makes it, up to the file's name."""


# Accuracy


def accuracy_frame(path: Path) -> DataFrame:
    """Return the frame of a file of rows."""
    return tables.accuracy_frame(read_rows(path, "accuracy"))


def late(path: Path) -> str:
    """Return how often direct and late answers are right with one of ten workers missing.

    Every method is on f; where it was measured on the plain ResNet, too, it has a second line.
    """
    frame = accuracy_frame(path)
    one = (frame["k"] == HARD) & (frame["missing"] == 1)
    here = frame[one & frame["recovered"].notna()]
    here = here[[_is_brief(name) for name in here["method"]]]
    lines: dict[str, dict[str, str]] = {}
    for base, title in (("invertible", "direct, f"), ("resnet", "direct, plain ResNet")):
        own = frame[frame["base"] == base].groupby("dataset")["normal"].first()
        if len(own):
            lines[title] = {"extra workers": "none", **own.map("{:.2f}".format)}
    for base, end in (("invertible", ""), ("resnet", ", plain ResNet")):
        for line in here[here["base"] == base].to_dict("records"):
            workers = f"{line['extra'] * HARD / 100:.0f}"
            found = lines.setdefault(line["method"] + end, {"extra workers": workers})
            found[line["dataset"]] = f"{line['recovered']:.2f}"
    columns = ["extra workers", *here["dataset"].unique()]
    table = DataFrame.from_dict(lines, orient="index").reindex(columns=columns)
    return tables.markdown(table.reset_index(names="answer, % right"))


def _is_brief(name: str) -> bool:
    method = known_method(name)
    return method is not None and method.in_brief


def one_set(name: str, path: Path) -> str:
    """Return the table of all methods and settings of one data set."""
    frame = accuracy_frame(path)
    own = frame[frame["dataset"] == name]
    if own.empty:
        return f"Not measured yet; `codedinvnet bench accuracy` of a grid with {name} measures it."
    return tables.accuracy_table(own)


# The pages


def rows_in(file: str, render: Callable[[Path], str]) -> tuple[list[str], Callable[[Path], str]]:
    """Return a table that is made of one file of rows."""
    return [file], lambda folder: render(folder / file)


def swept(file: str) -> tuple[list[str], Callable[[Path], str]]:
    """Return the table of a sweep."""
    return rows_in(file, lambda path: policies.table(sweep.read_rows(path)))


TABLES: Mapping[str, tuple[Sequence[str], Callable[[Path], str]]] = {
    "late": rows_in("accuracy.jsonl", late),
    **{f"accuracy-{name}": rows_in("accuracy.jsonl", partial(one_set, name)) for name in BUNDLES},
    "frontier": rows_in("frontier.jsonl", frontier.page),
    "bundles": ([], bundles.table),
    "costs": ([], bundles.costs),
    "paper": (["paper-mnist-k2.json"], bundles.paper),
    "contenders": ([], lambda _: peers.configurations()),
    "peers": rows_in("peers.jsonl", peers.readme),
    "peers-summary": rows_in("peers.jsonl", lambda path: peers.summary(peers.read(path))),
    "peers-several": rows_in("several.jsonl", lambda path: peers.several_of(peers.read(path))),
    "peers-all": rows_in("peers.jsonl", lambda path: peers.table(peers.read(path))),
    "sessions": rows_in("sessions.jsonl", sessions.table),
    "choice": (["policies.jsonl", "accuracy.jsonl"], policies.choice),
    "policies": swept("policies.jsonl"),
    "two-losses": swept("two-losses.jsonl"),
    "few-workers": swept("few-workers.jsonl"),
    "spread": swept("spread.jsonl"),
    "members": rows_in("members.jsonl", policies.members),
    "auto": rows_in("auto.jsonl", policies.choosing),
    "over-hedge": rows_in("auto.jsonl", policies.over_hedge),
    "off-map": rows_in("off-map.jsonl", policies.choosing),
    "protected": (["protect/digits-mlp.json"], lambda folder: protected.table(folder / "protect")),
}
"""Name of a place in the pages -> the files that its table needs, and what renders it from their
folder. Without files it is made of the bundles' own."""


SIMULATED = ("policies", "auto", "off-map", "two-losses", "few-workers", "spread", "members")
"""The files of rows that the simulator makes."""


def section(name: str, folder: Path = RESULTS) -> str:
    """Return a table by its name, or the command that measures it if it was not measured.

    A line below it says if its rows are older than the scheduler.
    """
    files, render = TABLES[name]
    lacks = [file for file in files if not (folder / file).is_file()]
    found = "" if lacks else render(folder)
    if found:
        old = [file for file in files if file.removesuffix(".jsonl") in SIMULATED]
        old = [file for file in old if sweep.is_stale(sweep.read_rows(folder / file))]
        notes = [
            note("rows of an older scheduler", f"{COMMANDS[file]} docs/results/{file}")
            for file in old
        ]
        return "\n\n".join([found.strip(), *notes])
    file = next(iter([*lacks, *files]), None)
    command = f"{COMMANDS[file]} docs/results/{file}" if file else MEASURE
    return f"Not measured yet; `{command}` measures it."


MARKED = re.compile(r"(<!-- figures:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fresh(text: str) -> str:
    """Return a page without its lines about stale rows."""
    return NOTE.sub("", text)


def render(text: str, table: Callable[[str], str] | None = None) -> str:
    """Replace what stands between a page's marks by tables (by default `section`).

    Raises:
        UserError: if a page asks for a table that there is not.
    """

    def replaced(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise UserError(f"there is no table {found[2]!r}")
        return f"{found[1]}{(table or section)(found[2])}\n{found[3]}"

    return MARKED.sub(replaced, text)


def pages() -> Iterable[Path]:
    """Return the pages that may have marks."""
    return (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def shipped(folder: Path = RESULTS) -> str:
    """Return the frame of the shipped rows, with which `bench accuracy` compares, as CSV."""
    frame = tables.accuracy_frame(read_rows(folder / "accuracy.jsonl", "accuracy"))
    return str(frame.to_csv(index=False, float_format="%.6g"))


def draw(folder: Path = RESULTS) -> None:
    """Draw the pictures of the rows next to them."""
    if (folder / "frontier.jsonl").is_file():
        frontier.draw(folder / "frontier.jsonl", folder / "frontier.png")
    if (folder / "peers.jsonl").is_file():
        peers.draw(folder / "peers.jsonl", folder / "peers.png")


def run(
    *, bundle: Sequence[str], data_dir: Path | None, measure: bool, costs: bool
) -> dict[str, Any]:
    """Measure what was asked for, then write all figures; return which pages changed.

    Args:
        bundle: those that are measured.
        data_dir: where the image sets lie; if it is given, bundles are measured.
        measure: measure them on images from the usual places.
        costs: measure times and multiply-adds alone.

    Raises:
        UserError: before anything is measured, if a bundle does not ship; in the end, if a table's
            rows are stale.
    """
    bundle = bundle or shipped_bundles()
    unknown = [name for name in bundle if name not in shipped_bundles()]
    if unknown:
        ship = ", ".join(shipped_bundles())
        raise UserError(f"no bundle {', '.join(unknown)} ships; these do: {ship}")
    everything = measure or data_dir is not None
    for name in bundle if everything or costs else ():
        bundles.write(RESULTS, name, data_dir, costs_alone=not everything)
    draw()
    tables.SHIPPED.write_text(shipped(), encoding="utf-8")
    changed = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (new := render(text)) != text:
            path.write_text(new, encoding="utf-8")
            changed.append(str(path.relative_to(ROOT)))
    notes = [old for path in pages() for old in NOTE.findall(path.read_text(encoding="utf-8"))]
    if notes:
        raise UserError("\n- ".join(["the pages are written, but not all is new:", *{*notes}]))
    return {"changed": changed}
