"""How many workers does it take? For every policy, k and r, the fewest that meet a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pandas import DataFrame

from codedinvnet.codes.method import Tolerance
from codedinvnet.codes.registry import find_method
from codedinvnet.errors import UserError
from codedinvnet.evaluation.quantiles import rank_of
from codedinvnet.models.bundle import weights_digest
from codedinvnet.rows import current_accuracy, read_rows
from codedinvnet.scheduler.auto import workers_for
from codedinvnet.serving.policies import SERVED, served_as
from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.figures import QUANTILES, aligned, no_interval, summarise
from codedinvnet.simulation.releasing import coverages
from codedinvnet.simulation.scenario import Accuracy, Scenario

MOST = 16
"""Times the workers that the search begins with: no more are tried."""
LARGEST = 10_000
"""Workers that are tried, at most, if the load needs no more."""
STAGES = 1000
"""Seeds of a plan: of its search, of the runs that choose, and of those that judge."""
FINE = 0.02
"""The search ends when the number is known to this share of it, or to one worker."""
SEARCH_SHARE = 1 / 3
"""The part of the requests that a step of the search simulates."""
LINE = ("invertible", 1, 0)
"""Base model, missing and corrupt workers of the rows that tell a method's accuracy."""
DRIFT = "requests seem to wait ever longer"
"""What is said of a load that is too high, though the run ends before too many are late."""


class Candidate(NamedTuple):
    """A way to serve. For hedging, 1/k is the share of queries that may be copied."""

    policy: str
    """A name as `served_as` takes it."""
    k: int
    r: int
    extra: float | None = None
    """The share of queries that may be copied, if k does not say it."""

    def __str__(self) -> str:
        served = served_as(self.policy)
        if served.makes_up:
            r = "" if served.by_name else f", r = {self.r}"
            return f"{self.policy}, k = {self.k}{r}"
        if served.rules.hedged and not served.rules.adapts:
            share = 1 / self.k if self.extra is None else self.extra
            return f"{self.policy}, at most {100 * share:.0f} % copies"
        return self.policy

    @property
    def sized(self) -> bool:
        """Whether k means anything to it."""
        served = served_as(self.policy)
        shared = served.rules.hedged and not served.rules.adapts and self.extra is None
        return served.makes_up or shared

    @property
    def fewest(self) -> int:
        """Workers that it needs at any load."""
        served = served_as(self.policy)
        if not served.rules.takes_code:
            return served.rules.copies
        code = find_method(served.method).rules(self.k, Tolerance(self.r))
        return workers_for(served.rules, code)


def calibrated(
    base: Scenario, candidates: Iterable[Candidate]
) -> tuple[list[Candidate], dict[str, str]]:
    """Return the ways to serve whose code is calibrated for a scenario's limit, and why not others.

    Without a limit all are.
    """
    found, left = [], {}
    for candidate in candidates:
        try:
            served = served_as(candidate.policy)
            grouped = candidate.sized or served.rules.takes_code
            sized = {"k": candidate.k, "r": candidate.r} if grouped else {}
            coverages(base.updated(**{**sized, **served.scenario}))
            found.append(candidate)
        except UserError as error:
            left[str(candidate)] = str(error)
    return found, left


@dataclass(frozen=True)
class Target:
    """What answers must meet."""

    p999_ms: float
    accuracy: float


@dataclass(frozen=True)
class Verdict:
    """What was found of a candidate.

    Attributes:
        candidate: the way to serve.
        workers: the fewest that meet the target; None if no number does.
        figures: of the run with that many workers, or with the most that were tried.
        reason: why that many, or what is missed, and why it is unsure.
        unsure: whether the 95 % interval of its p99.9 reaches beyond the target, or there is none.
    """

    candidate: Candidate
    workers: int | None
    figures: dict[str, Any]
    reason: str
    unsure: bool = False


def candidates(
    accuracy: Accuracy,
    by_method: Mapping[str, Collection[int]] = {},
    policies: Iterable[str] = SERVED,
    sizes: Collection[int] = (),
    extra: float | None = None,
) -> list[Candidate]:
    """Return every policy with every k and r whose accuracy is known.

    Args:
        accuracy: of direct and decoded answers.
        by_method: method -> each k at which its accuracy is known.
        policies: names as `served_as` takes them.
        sizes: k that are wanted alone, of codes between those measured, too; none wants all that
            were measured.
        extra: work that binds copies, instead of 1/k; None if it does not.
    """
    coded = [
        (k, r)
        for r, known in sorted(accuracy.recovered.items())
        for k in sorted(set(sizes or known))
        if 2 <= k <= max(known, default=0)
    ]
    found = []
    for policy in policies:
        served = served_as(policy)
        if served.by_name and served.makes_up:
            known = by_method.get(find_method(served.method).name, ())
            found += [Candidate(policy, k, 1) for k in sorted(known) if not sizes or k in sizes]
        elif served.rules.guessing and accuracy.guessed is None:
            continue
        elif served.makes_up:
            found += [Candidate(policy, k, r) for k, r in coded]
        elif not served.rules.hedged or served.rules.adapts:
            found.append(Candidate(policy, 10, 1))
        elif extra is not None:
            found.append(Candidate(policy, 10, 1, extra))
        else:
            shares = set(sizes) or {k for k, _ in coded} or {10}
            found += [Candidate(policy, k, 1) for k in sorted(shares)]
    return found


class Draws(NamedTuple):
    """How long a run is, and what it draws."""

    queries: int
    seed: int


class Probe(NamedTuple):
    """What one run came to."""

    lack: str
    """What of the target was missed, or that the run drifts; nothing if it was met."""
    figures: dict[str, Any]
    """Empty if the run was stopped early."""


class Found(NamedTuple):
    """A number of workers with which a run met the target."""

    workers: int
    lack: str
    """Of the most workers below that were tried; nothing if none were."""
    figures: dict[str, Any]


class Planner:
    """Searches the number of workers by simulation.

    All candidates meet the same arrivals in the same step (one seed in the search, one in the runs
    that choose a number near what it found, further ones in those that judge the number), so that
    they differ by what they are, not by luck. A number is taken once it meets the target at once
    with draws that had no part in choosing it, and that run's figures are told: those of a run that
    chose it would flatter. A run is stopped as soon as too many requests were late, so what is
    hopeless costs little.

    Args:
        base: load, times, stragglers, and the accuracy of methods; its queries are those of
            all runs but the search's.
        accuracy: of direct and decoded answers.
        target: what is to be met.
        step: called with a few words after each run.
    """

    def __init__(
        self,
        base: Scenario,
        accuracy: Accuracy,
        target: Target,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.base = base.updated(accuracy=accuracy.model_dump())
        self.accuracy, self.target, self.step = accuracy, target, step

    def judge(self, candidate: Candidate) -> Verdict:
        """Find the fewest workers with which a candidate meets the target."""
        if (most := self._most_accurate(candidate)) < self.target.accuracy:
            reason = f"even its best answers are right in {most:.4f} alone"
            return Verdict(candidate, None, {}, reason)
        low = max(candidate.fewest, fewest_workers(self.base))
        queries, most = self.base.queries, min(MOST * low, max(LARGEST, low))
        draws = Draws(max(1000, round(SEARCH_SHARE * queries)), self._seed(0))
        found = self._climb(candidate, low, max(1, low // 2), most, draws)
        if found is None:
            return self._missed(candidate, most, draws)
        draws = Draws(queries, self._seed(1))
        chosen = self._climb(candidate, found.workers, _fine(found.workers), most, draws)
        while chosen is not None and not chosen.lack and chosen.workers > low:
            fewer = max(low, chosen.workers - _fine(chosen.workers))
            probe = self._probe(candidate, fewer, draws)
            lacks = chosen._replace(lack=probe.lack)
            chosen = lacks if probe.lack else Found(fewer, "", probe.figures)
        lack, at_once, stage = "", False, 2
        while chosen is not None and not at_once:
            lack, start = chosen.lack or lack, chosen.workers
            draws = draws._replace(seed=self._seed(stage))
            chosen = self._climb(candidate, start, _fine(start), most, draws)
            at_once, stage = chosen is not None and chosen.workers == start, stage + 1
        if chosen is None:
            return self._missed(candidate, most, draws)
        if lack == DRIFT:
            why = f"with fewer {lack}"
        elif lack:
            why = f"fewer miss the {lack} target"
        elif chosen.workers == candidate.fewest:
            why = "its tasks need no fewer"
        else:
            why = "the load and the stragglers allow no fewer"
        doubt = self._doubt(chosen.figures)
        return Verdict(candidate, chosen.workers, chosen.figures, why + doubt, bool(doubt))

    def rank(self, wanted: Iterable[Candidate]) -> list[Verdict]:
        """Judge all candidates; fewest workers first, then sure ones, least work, what fails."""
        verdicts = [self.judge(candidate) for candidate in wanted]
        return sorted(
            verdicts,
            key=lambda v: (
                v.workers if v.workers is not None else math.inf,
                v.unsure,
                v.figures.get("work_per_query", math.inf),
            ),
        )

    def _most_accurate(self, candidate: Candidate) -> float:
        """Return the accuracy of the best answers, direct or made up, that a candidate can give."""
        policy, k, r, _ = candidate
        found, served = [self.accuracy.normal], served_as(policy)
        if served.by_name and served.makes_up:
            found.append(self.base.method_accuracy[find_method(served.method).name][k])
        elif served.makes_up:
            found += self.accuracy.recovered.get(r, {}).values()
        return max(found)

    def _seed(self, stage: int) -> int:
        """Return the seed of a step; other plans, with other seeds, share none of it."""
        return (STAGES * self.base.seed + stage) % 2**31

    def _climb(
        self, candidate: Candidate, start: int, step: int, most: int, draws: Draws
    ) -> Found | None:
        """Find the fewest workers from `start` on that meet the target in runs of the same draws.

        By steps that double, then by bisection between the last that fails and the first that does
        not, to FINE. None if as many as `most` do not.
        """
        good, bad, lack = start, start - 1, ""
        while (probe := self._probe(candidate, good, draws)).lack:
            if good >= most:
                return None
            lack, bad = probe.lack, good
            good, step = min(most, good + step), 2 * step
        while good - bad > _fine(good):
            middle = (good + bad) // 2
            trial = self._probe(candidate, middle, draws)
            if trial.lack:
                bad, lack = middle, trial.lack
            else:
                good, probe = middle, trial
        return Found(good, lack, probe.figures)

    def _probe(
        self, candidate: Candidate, workers: int, draws: Draws, *, to_the_end: bool = False
    ) -> Probe:
        """Simulate, and stop as soon as p99.9 cannot be met, unless `to_the_end`."""
        policy, k, r, _ = candidate
        changes = {"k": k, "r": r, "workers": workers, **draws._asdict()}
        scenario = self.base.updated(**{**changes, **served_as(policy).scenario})
        counted = scenario.counted
        over = counted - 1 - rank_of(counted, QUANTILES["p999"])
        limit = None if to_the_end else (self.target.p999_ms / 1000, over)
        records = Simulation(scenario, self.accuracy, limit).run()
        self.step(f"{candidate}: {workers} workers")
        if not records.complete:
            return Probe("p99.9", {})
        figures = {**summarise(records, scenario), "seed": draws.seed}
        late = figures["p999_ms"]
        if late is None or late > self.target.p999_ms:
            return Probe("p99.9", figures)
        if figures["accuracy"] < self.target.accuracy:
            return Probe("accuracy", figures)
        return Probe(DRIFT if figures["drifting"] else "", figures)

    def _doubt(self, figures: dict[str, Any]) -> str:
        """Return why a number that met the target may miss it after all, to end a reason with."""
        interval = figures["p999_ms_95"]
        if interval is not None:
            return ", unsure" if interval[1] > self.target.p999_ms else ""
        return f", unsure: {no_interval(self.base.counted, QUANTILES['p999'])}"

    def _missed(self, candidate: Candidate, workers: int, draws: Draws) -> Verdict:
        """Say what a candidate misses with as many workers as were tried."""
        lack, figures = self._probe(candidate, workers, draws, to_the_end=True)
        late = figures["p999_ms"]
        if lack == "accuracy":
            what = f"accuracy is {figures['accuracy']:.4f}"
        elif lack == DRIFT:
            what = lack
        elif late is None:
            what = "one answer in a thousand never comes"
        else:
            what = f"p99.9 is {late:.0f} ms"
        return Verdict(candidate, None, figures, f"{what} with {workers} workers, the most tried")


def fewest_workers(base: Scenario) -> int:
    """Return the workers that the load and the stragglers need, whatever makes up for late ones."""
    named = [s.worker + 1 for s in base.stragglers if s.worker is not None]
    bursts = [s.workers for s in base.stragglers if s.workers is not None]
    busy = min(base.busy_workers, 1e12)  # of a load that is all but infinite
    return max(math.floor(busy) + 1, *named, *bursts, 1)


def _fine(workers: int) -> int:
    """Return to how many workers a number is found."""
    return max(1, round(FINE * workers))


def runs_expected(count: int) -> int:
    """Return about how many runs the ranking of so many candidates takes, for a progress bar."""
    return 9 * count


def report(verdicts: list[Verdict], base: Scenario, target: Target) -> dict[str, Any]:
    """Return a plan as one JSON object; the base's workers, policy, k and r mean nothing in it."""
    dumped = base.model_dump(mode="json", exclude_defaults=True)
    for key in ("workers", "policy", "k", "r"):
        dumped.pop(key, None)
    return {
        "schema_version": 1,
        "kind": "plan",
        "scenario": dumped,
        "p999_ms": target.p999_ms,
        "min_accuracy": target.accuracy,
        "ranking": [
            {
                "method": str(verdict.candidate),
                **verdict.candidate._asdict(),
                "workers": verdict.workers,
                "reason": verdict.reason,
                "unsure": verdict.unsure,
                "figures": verdict.figures,
            }
            for verdict in verdicts
        ],
    }


def table(plan: dict[str, Any]) -> list[str]:
    """Return the lines of a plan's table."""
    rows = []
    for row in plan["ranking"]:
        figures = row["figures"]
        low, high = figures.get("p999_ms_95") or (None, None)
        rows.append(
            {
                "": row["method"],
                "workers": row["workers"],
                "p99.9 ms": figures.get("p999_ms"),
                "from": low,
                "to": high,
                "accuracy": figures.get("accuracy"),
                "work": figures.get("work_per_query"),
                "reason": row["reason"],
            }
        )
    ms = dict.fromkeys(("p99.9 ms", "from", "to"), ".1f")
    return aligned(rows, {**ms, "workers": ".0f", "accuracy": ".4f", "work": ".2f"})


def check_target(target: Target) -> None:
    """Refuse a target that means nothing.

    Raises:
        UserError: naming the option.
    """
    if not 0 < target.p999_ms < math.inf:
        raise UserError(f"--p999-ms: must be above 0, got {target.p999_ms}")
    if not 0 <= target.accuracy <= 1:
        raise UserError(f"--min-accuracy: must lie in 0..1, got {target.accuracy}")


def accuracy_of_methods(rows: Path, bundle: str) -> dict[str, dict[int, float]]:
    """Return method -> k -> what rows of `bench accuracy` say of the answers that it makes up.

    Args:
        rows: JSONL.
        bundle: whose classifier the methods protect; of other weights no row counts.

    Raises:
        UserError: if there is no such file or bundle, or no row of it.
    """
    if not rows.is_file():
        raise UserError(f"--accuracy-rows: there is no file {rows}")
    weights = weights_digest(bundle)
    own = [
        row
        for row in read_rows(rows, "accuracy")
        if row["settings"].get("bundle") == weights and not row["settings"].get("quick")
    ]
    told = DataFrame(
        {"method": row["method"], "k": row["k"], "recovered": row["recovered"]}
        for row in current_accuracy(own)
        if row["error"] is None
        and (row["base"], row["missing"], row["corrupt"]) == LINE
        and row["label"] == row["method"]
        and row["recovered"] is not None
    )
    if told.empty:
        raise UserError(
            f"--accuracy-rows: {rows} holds no method of the bundle {bundle!r} that was measured "
            "in full (not by --quick)"
        )
    return {
        str(name): own.groupby("k")["recovered"].mean().to_dict()
        for name, own in told.groupby("method")
    }
