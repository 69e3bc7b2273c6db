"""Sweeps: every policy at every load under every straggler model, one row each, resumable."""

from __future__ import annotations

import itertools
import json
import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, field_validator

from codedinvnet import rows as results
from codedinvnet.config import Positive, Section, validated
from codedinvnet.errors import UserError
from codedinvnet.files import check_writable
from codedinvnet.progress import Progress
from codedinvnet.serving.policies import SERVED, served_as
from codedinvnet.simulation.engine import accuracy_of
from codedinvnet.simulation.figures import SAME, latency_of, simulate
from codedinvnet.simulation.scenario import Scenario, as_now, can_guess, check_code
from codedinvnet.simulation.stragglers import stragglers

BASELINE = "uncoded"
NOBODY = "none"
"""Wins where one answer in a thousand never comes, whatever the policy."""


class Cell(NamedTuple):
    """One place in the grid."""

    stragglers: str
    batch: int
    load: float
    policy: str


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

    def scenarios(self) -> Iterator[tuple[Cell, Scenario]]:
        """Yield every cell with its scenario.

        The policies of a place (stragglers, batch, load) meet the same draws, which are its own.

        Raises:
            UserError: if one cannot be simulated.
        """
        grid = itertools.product(self.stragglers, self.batches, self.loads, self.policies)
        for model, batch, load, policy in grid:
            causes = stragglers(model, self.base.service.mean_ms, batch)
            place = json.dumps([self.base.seed, model, batch, load])
            scenario = self.base.updated(
                **served_as(policy).scenario,
                seed=zlib.crc32(place.encode()) // 2,  # below 2³¹
                batch=batch,
                queries=max(self.base.queries, self.requests * batch),
                qps=load * self.base.capacity_qps,
                stragglers=[cause.model_dump() for cause in causes],
            )
            yield Cell(model, batch, load, policy), scenario


def parse_sweep(raw: Any, path: Path) -> Sweep | None:
    """Validate what a file holds as a sweep; None if it is a single scenario.

    Raises:
        UserError: if it is wrong.
    """
    if not isinstance(raw, dict) or "base" not in raw:
        return None
    return validated(Sweep, raw, path)


def _without_guesses(sweep: Sweep) -> Sweep:
    """Leave out the policies that guess, if the code of the bundle cannot.

    Raises:
        UserError: if the file names one.
    """
    if sweep.base.bundle is None or can_guess(sweep.base.bundle):
        return sweep
    for policy in sweep.policies:
        if served_as(policy).rules.guessing and "policies" in sweep.model_fields_set:
            raise UserError(
                f"policies: {policy} needs a bundle that guesses, which {sweep.base.bundle} does "
                "not, or does so under coded, too: leave it out"
            )
    kept = tuple(policy for policy in sweep.policies if not served_as(policy).rules.guessing)
    return sweep.model_copy(update={"policies": kept})


def run_sweep(sweep: Sweep, out: Path, provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Simulate every cell whose row is not in the file yet, and return all rows of the grid.

    Args:
        sweep: the grid.
        out: JSONL; each row is appended as soon as it is known. A line that an interrupted sweep
            left unfinished is simulated again.
        provenance: written into every row.

    Raises:
        UserError: if a scenario cannot be simulated, or `out` not be written; before any work.
    """
    check_code(sweep.base)
    sweep = _without_guesses(sweep)
    accuracy = accuracy_of(sweep.base)
    # In the rows, too: a bundle of that name may have others one day.
    sweep = sweep.model_copy(update={"base": sweep.base.updated(accuracy=accuracy.model_dump())})
    wanted = list(sweep.scenarios())
    for _, scenario in wanted:
        scenario.check_accuracy(accuracy)
    done = {}
    for row in read_rows(out):
        done[json.dumps([row["cell"], row["scenario"]], sort_keys=True)] = row
    check_writable(out)
    rows = []
    with Progress(wanted, desc="sweep", unit="run", dynamic_ncols=True) as bar:
        for cell, scenario in bar:
            dumped = scenario.model_dump(mode="json", exclude_defaults=True)
            key = json.dumps([cell._asdict(), dumped], sort_keys=True)
            if key not in done:
                bar.set_postfix_str(f"{cell.stragglers}, {cell.policy} at {cell.load:.0%}")
                row = simulate(scenario, accuracy)
                stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
                row = {"cell": cell._asdict(), **row, **provenance, "time": stamp}
                results.append_row(out, row)
                done[key] = row
            rows.append(done[key])
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a sweep; [] if there is no file.

    Raises:
        UserError: if the file holds anything else.
    """
    rows = results.read_rows(path)
    for number, row in enumerate(rows, start=1):
        if "cell" not in row or not isinstance(row.get("scenario"), dict):
            raise UserError(f"{path}, line {number} is no row of a sweep")
    return [{**row, "scenario": as_now(row["scenario"])} for row in rows]


def tails(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int, float], dict[str, float]]:
    """Return p99.9 in ms (inf: more than one request in a thousand is lost) by place and policy."""
    return {
        place: {row["cell"]["policy"]: _late(row) for row in here}
        for place, here in _places(rows).items()
    }


def _places(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, int, float], list[Mapping[str, Any]]]:
    """Return the rows of all policies by (stragglers, batch, load)."""
    found: dict[tuple[str, int, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        cell = Cell(**row["cell"])
        found.setdefault((cell.stragglers, cell.batch, cell.load), []).append(row)
    return found


def winners(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int, float], str]:
    """Return for each (stragglers, batch, load) the policy that wins.

    Of those whose p99.9 is the lowest, or higher by 5 % at most, it is the one with the least work;
    NOBODY where none has a finite one.
    """
    found = {}
    for place, here in _places(rows).items():
        lowest = min(map(_late, here))
        if not math.isfinite(lowest):
            found[place] = NOBODY
            continue
        good = [row for row in here if _late(row) <= (1 + SAME) * lowest]
        found[place] = min(good, key=lambda row: float(row["work_per_query"]))["cell"]["policy"]
    return found


def contested(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return in how many places the lowest p99.9 may be another policy's, and of how many.

    It may where their 95 % intervals overlap. Places count where the lowest is finite and has one.
    """
    found = []
    for here in _places(rows).values():
        lowest = min(here, key=_late)
        if lowest["p999_ms_95"] is None:
            continue
        highest = lowest["p999_ms_95"][1]
        others = [row["p999_ms_95"] for row in here if row is not lowest]
        found.append(any(other is not None and other[0] <= highest for other in others))
    return sum(found), len(found)


def helps_up_to(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int, str], float | None]:
    """Return for each (stragglers, batch, policy) the highest load up to which it helps.

    It helps where its p99.9 is more than 5 % below that of doing nothing, at this and every lower
    load; None if it does not at the lowest one.
    """
    late = {Cell(**row["cell"]): _late(row) for row in rows}
    found: dict[tuple[str, int, str], float | None] = {}
    for cell in sorted(late, key=lambda cell: cell.load):
        place = (cell.stragglers, cell.batch, cell.policy)
        baseline = late.get(cell._replace(policy=BASELINE))
        if cell.policy == BASELINE or baseline is None:
            continue
        lower = [c.load for c in late if c._replace(load=0) == cell._replace(load=0)]
        previous = max((load for load in lower if load < cell.load), default=None)
        if late[cell] < (1 - SAME) * baseline and found.get(place) == previous:
            found[place] = cell.load
        else:
            found.setdefault(place, None)
    return found


def _late(row: Mapping[str, Any]) -> float:
    return latency_of(row["p999_ms"])
