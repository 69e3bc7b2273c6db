"""`python -m benchmarks sweep`: every policy at every load under every straggler model, simulated.

A sweep file has a scenario as its `base`, and what is varied in it. Each cell is a row of the file
of rows, and finished rows in it are kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pandas import DataFrame
from pydantic import Field, field_validator

from benchmarks.stale import simulated_digest
from codedinvnet.codes.named_policies import SERVED, in_order, served_as
from codedinvnet.codes.registry import find_method
from codedinvnet.common import grid
from codedinvnet.common.config import Positive, Section, validated
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import check_writable, read_json
from codedinvnet.simulation.figures import simulate
from codedinvnet.simulation.scenario import Scenario, parse_scenario
from codedinvnet.simulation.stragglers import stragglers
from codedinvnet.simulation.warnings import overload, rarest, too_short

KIND = "simulation"
"""The experiment of a sweep's rows."""
QUICK_QUERIES = 2000
PLACE = ["stragglers", "batch", "load"]


class Point(NamedTuple):
    """One place in the grid."""

    stragglers: str
    batch: int
    load: float
    policy: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Point:
        """Return the place of a row."""
        return cls(*(row[name] for name in cls._fields))


class Sweep(Section):
    """The contents of a sweep file: a scenario and what is varied in it."""

    base: Scenario
    loads: Annotated[tuple[float, ...], Field(min_length=1)]
    """Shares of the capacity of the base's workers."""
    policies: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(SERVED)
    """Policies, and methods as `find_method` takes them."""
    stragglers: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names or faults files."""
    batches: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1,)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> what of the base it changes, as {"workers": 33}; places of a variant are named after
    it, behind their stragglers. None: the base alone."""
    requests: Positive = 1
    """The fewest of a cell: the base's queries are raised where `batch` makes fewer of them."""

    @field_validator("policies")
    @classmethod
    def _known(cls, policies: tuple[str, ...]) -> tuple[str, ...]:
        for policy in policies:
            try:
                served_as(policy)
            except UserError as error:
                raise ValueError(str(error)) from error
        return policies

    def scenarios(self) -> Iterator[tuple[Point, Scenario]]:
        """Yield every cell with its scenario.

        The policies of a place (stragglers, batch, load) meet the same draws, which are its own.

        Raises:
            UserError: if one cannot be simulated.
        """
        bases = {name: self.base.updated(**changes) for name, changes in self.variants.items()}
        places = itertools.product(self.stragglers, bases or [""], self.batches, self.loads)
        for (model, variant, batch, load), policy in itertools.product(places, self.policies):
            base = bases.get(variant, self.base)
            causes = stragglers(model, base.service.mean_ms, batch)
            named = f"{model}, {variant}" if variant else model
            scenario = base.updated(
                **served_as(policy).scenario,
                seed=grid.seed_of(base.seed, named, batch, load),
                batch=batch,
                queries=max(base.queries, self.requests * batch),
                qps=load * base.capacity_qps,
                stragglers=[cause.model_dump() for cause in causes],
            )
            yield Point(named, batch, load, policy), scenario


def run(*, sweep: Path, out: Path, quick: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """Simulate what a sweep's file of rows lacks, and return the table of p99.9 in ms by policy.

    Args:
        sweep: the sweep's file.
        out: the file of rows.
        quick: few queries a place: it shows that the sweep runs, and no tails.
        only: words such as `policy=hedge` that choose cells.

    Raises:
        UserError: if the sweep is wrong or `out` cannot be written, before any work; in the end, if
            a run failed.
    """
    made = validated(Sweep, read_json(sweep), sweep)
    if quick:
        few = made.base.updated(queries=min(made.base.queries, QUICK_QUERIES))
        made = made.model_copy(update={"base": few, "requests": 1})
    rows = run_sweep(made, out, only)
    table = by_policy(frame_of(rows)).to_string(float_format="%.4g")
    return {"rows": rows, "table": "\n".join([str(table), "", *warnings_of(rows)])}


def run_sweep(sweep: Sweep, out: Path, only: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Simulate every cell whose row is not in the file yet, and return all rows of the grid.

    Args:
        sweep: the grid.
        out: JSONL; each row is appended as soon as it is known.
        only: words such as `policy=hedge` that choose cells.

    Raises:
        UserError: if a scenario cannot be simulated, or `out` not be written, before any work; in
            the end, if a run failed.
    """
    cells = []
    for point, scenario in sweep.scenarios():
        settings: dict[str, Any] = {
            "scenario": scenario.model_dump(mode="json", exclude_defaults=True),
            "source": simulated_digest(),
        }
        if digest := find_method(scenario.method).digest:
            settings["method_digest"] = digest  # its rules may be others one day
        measure = partial(simulate, scenario)
        name = f"{point.stragglers}, {point.policy} at {point.load:.0%}"
        cells.append(grid.Cell(KIND, point._asdict(), settings, measure, name))
    cells = grid.select(cells, only, lambda cell: cell.place)
    check_writable(out)
    counts = grid.resume(cells, out)
    grid.refuse_failures(counts["failed"], "of the runs", out)
    found = {row["key"]: row for row in read_rows(out)}
    return [found[cell.key] for cell in cells]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a sweep; [] if there is no file.

    Raises:
        UserError: if the file holds anything else.
    """
    return grid.read_rows(path, KIND)


def is_stale(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether the newest row of any place is of an older scheduler or simulator."""
    newest = {Point.of(row): row["settings"].get("source") for row in rows}
    return any(source != simulated_digest() for source in newest.values())


def warnings_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for what a place's runs cannot be trusted for: overload, or few rare events."""
    points = {Point.of(row): row for row in rows}
    found: dict[str, list[str]] = {}
    for point, row in points.items():
        scenario = parse_scenario(row["settings"]["scenario"], "a row's scenario")
        seconds = scenario.queries / scenario.arrivals.qps  # the same for all policies
        place = f"{point.stragglers}, {point.batch}, {point.load:.0%}: "
        for note in (
            *overload(scenario, row["drifting"]),
            *too_short(seconds, rarest(scenario, scenario.workers)),
        ):
            found.setdefault(place + note, []).append(point.policy)
    every = {point.policy for point in points}
    return [
        line if {*own} == every else f"{line} ({', '.join(own)})" for line, own in found.items()
    ]


def frame_of(rows: Iterable[Mapping[str, Any]]) -> DataFrame:
    """Return the frame of a sweep: a line a cell, p99.9 in ms, infinite if more is lost.

    `approximate` is the share of answers that are approximate. Of rows of one cell the last one
    counts.
    """
    lines = {}
    for row in rows:
        low, high = row["p999_ms_95"] or (math.nan, math.nan)
        lines[Point.of(row)] = {
            **Point.of(row)._asdict(),
            "p999": math.inf if row["p999_ms"] is None else row["p999_ms"],
            "low": low,
            "high": high,
            "work": float(row["work_per_query"]),
            "approximate": float(row["decoded_share"]),
        }
    return DataFrame(list(lines.values()))


def by_policy(frame: DataFrame, column: str = "p999") -> DataFrame:
    """Return a figure by place and policy: a row a place, a column a policy."""
    table = frame.pivot(index=PLACE, columns="policy", values=column)
    return table.reindex(
        index=frame[PLACE].drop_duplicates().itertuples(index=False, name=None),
        columns=in_order(frame["policy"]),
    )
