"""`codedinvnet advise`: what each policy would give, by what a running service has seen lately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from codedinvnet.codes.rules import CodeRules, Uncoded, from_json
from codedinvnet.errors import UserError
from codedinvnet.evaluation.quantiles import percentile, rank_of, rounded
from codedinvnet.progress import Progress
from codedinvnet.scheduler.sending import code_for
from codedinvnet.scheduler.settings import POLICIES
from codedinvnet.simulation.doubts import left_out, overload
from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.figures import SAME, aligned, counted, latency_of, summarise
from codedinvnet.simulation.recorded import FEWEST_REQUESTS, scenario_of
from codedinvnet.simulation.scenario import Accuracy, Scenario
from codedinvnet.simulation.traffic import Recorded, read_traffic

QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
OFF = 0.25
"""A simulation of the policy of now that is off by more is told to be doubtful."""


@dataclass(frozen=True)
class AdviseOptions:
    """What `codedinvnet advise` was asked for; the command line explains the fields."""

    url: str
    by: str = "p99"
    queries: int = 60_000
    seconds: float | None = None
    seed: int = 0
    token_file: str = ""
    """As it goes into the command that is printed; "": none."""
    extra: float | None = None
    """The budget of every policy; None: the service's own."""


def advise(raw: Any, options: AdviseOptions, *, progress: bool = False) -> dict[str, Any]:
    """Simulate every policy that a service offers; return a report.

    Args:
        raw: the answer of `GET /traffic`.
        options: see there.
        progress: show a bar.

    Raises:
        UserError: if it is another program's answer, or too little was seen; or if a gateway shall
            have another budget.
    """
    seen = read_traffic(raw, options.url)
    if options.extra is not None and seen.rules.upstream_hang_timeout_ms is not None:
        raise UserError("--extra: a gateway has none")
    if options.seconds is not None:
        seen = seen.after(seen.seconds - options.seconds)
    try:
        code = None if seen.code is None else from_json(seen.code)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{options.url}: a code of another release: {seen.code}") from error
    base = scenario_of(seen, options.queries, options.seed)
    if options.extra is not None:
        base = base.updated(extra=options.extra)
    offered = {name: POLICIES[name] for name in seen.offered if name in POLICIES}
    left = dict(seen.refused)
    left |= dict.fromkeys(
        (name for name in seen.offered if name not in POLICIES), "this release does not know it"
    )
    if code is None and seen.method is not None:
        unknown = f"the rules of {seen.method} are the service's own"
        left |= {name: unknown for name, policy in offered.items() if policy.takes_code}
    wanted = [name for name in offered if name not in left]
    rows = []
    for name in Progress(wanted, desc="advise", unit="policy", disable=not progress, leave=False):
        try:
            rows.append(simulated(under(base, name, code), code, seen))
        except UserError as error:
            left[name] = str(error)
    now = measured(seen.after(seen.since_s))
    own = next((row for row in rows if row["policy"] == seen.policy), None)
    best = None if own is None else chosen(rows, seen.policy, options.by)
    notes = overload(base, drifting=False)
    if drifting := [row["policy"] for row in rows if row["drifting"]]:
        notes.append(
            f"Requests seem to wait ever longer under {', '.join(drifting)}: the workers are too "
            "few, and no such policy is advised."
        )
    notes += left_out(len(seen.requests), [why for _, why in seen.unserved])
    if own is None:
        why = left.get(seen.policy, "the service does not offer it")
        notes.append(f"The policy of now, {seen.policy}, is not simulated: {why}.")
    elif base.extra == seen.rules.extra:
        notes += doubts(now, own, options.by)
    if base.extra != seen.rules.extra:
        notes.append(f"The service has another budget: start it with --extra {base.extra:g}.")
    return {
        "schema_version": 1,
        "kind": "advice",
        "policy": seen.policy,
        "method": seen.method,
        "by": options.by,
        "measured": now,
        "simulated": rows,
        "not_simulated": left,
        "advice": None if best is None else best["policy"],
        "stragglers": [s.model_dump(mode="json", exclude_defaults=True) for s in base.stragglers],
        "service_ms": round(base.service.mean_ms, 3),
        "load": round(base.arrivals.qps / base.capacity_qps, 4),
        "right_by": None if seen.right is None else seen.right.by,
        "notes": notes,
    }


def percentiles(latency: np.ndarray) -> dict[str, Any]:
    """Return the percentiles of latencies (n,) in ms; None beyond the last but one, or if lost."""
    found = {}
    for name, share in QUANTILES.items():
        deep = len(latency) > 0 and rank_of(len(latency), share) < len(latency) - 1
        found[f"{name}_ms"] = rounded(percentile(latency, share), 2) if deep else None
    return found


def under(base: Scenario, name: str, code: CodeRules | None) -> Scenario:
    """Return the scenario of a policy, by the service's own code, which a scenario cannot name.

    Raises:
        UserError: if the policy does not go with that code, or needs more workers.
    """
    try:
        code_for(POLICIES[name], base.workers, code)
    except ValueError as error:
        raise UserError(str(error)) from error
    return base.model_copy(update={"policy": name})


def simulated(scenario: Scenario, code: CodeRules | None, seen: Recorded) -> dict[str, Any]:
    """Return the figures of one policy."""
    right = seen.right
    known = Accuracy(
        normal=1.0 if right is None else right.normal,
        recovered={scenario.r: {scenario.k: 1.0} if right is None else right.made_up},
        guessed=None,
    )
    records = Simulation(scenario, known, code=code or Uncoded()).run()
    figures = summarise(records, scenario)
    return {
        "policy": scenario.policy,
        **percentiles(counted(records, scenario)),
        "p99_ms_95": figures["p99_ms_95"],
        **{name: figures[name] for name in ("missing_share", "missing_share_95", "drifting")},
        "made_up_share": figures["decoded_share"],
        "work": figures["work_per_query"],
        "right": None if right is None else figures["accuracy"],
    }


def measured(seen: Recorded) -> dict[str, Any]:
    """Return what a service's requests took under the policy of now."""
    latency = np.array([latency_of(row[2]) for row in seen.requests])
    return {"requests": len(latency), **percentiles(latency)}


def chosen(rows: Sequence[Mapping[str, Any]], now: str, by: str) -> Mapping[str, Any] | None:
    """Return the row of the policy to go by; None if every one drifts, or loses too many requests.

    As good as the lowest are those that are within SAME of it, and do not lose more requests than
    another of them, as far as their intervals tell. Of these it is that of now, or else the one
    with the least work.
    """
    key = f"{by}_ms"
    told = [row for row in rows if row[key] is not None and not row["drifting"]]
    if not told:
        return None
    lowest = min(row[key] for row in told)
    good = [row for row in told if row[key] <= (1 + SAME) * lowest]
    lost = [row["missing_share_95"] or 2 * [row["missing_share"]] for row in good]
    most = min(high for _, high in lost)
    good = [row for row, (low, _) in zip(good, lost, strict=True) if low <= most]
    stay = next((row for row in good if row["policy"] == now), None)
    return stay or min(good, key=lambda row: float(row["work"]))


def doubts(now: Mapping[str, Any], row: Mapping[str, Any], by: str) -> list[str]:
    """Return what speaks against a prediction, by that of the policy of now."""
    key = f"{by}_ms"
    if now["requests"] < FEWEST_REQUESTS or None in (now[key], row[key]):
        return ["Too few requests have come under the policy of now to check the simulation by."]
    if abs(row[key] / now[key] - 1) <= OFF:
        return []
    return [
        f"The policy of now is simulated with a {by} of {row[key]:.0f} ms, and {now[key]:.0f} were "
        "measured: something is at work here that the simulation does not know."
    ]


def lines(report: Mapping[str, Any], options: AdviseOptions) -> list[str]:
    """Return what people are told."""
    rows = [{"policy": "measured now", **report["measured"]}, *report["simulated"]]
    formats = {**dict.fromkeys((f"{name}_ms" for name in QUANTILES), ".1f"), "work": ".2f"}
    if report["right_by"] is not None:
        formats["right"] = ".4f"
    if any(row.get("missing_share") for row in rows):
        formats["missing_share"] = ".2%"
    told = [{name: row.get(name) for name in ("policy", *formats)} for row in rows]
    return [
        *report["notes"],
        *([""] if report["notes"] else []),
        *aligned(told, formats),
        *([] if report["right_by"] is None else [f"right: by {report['right_by']}"]),
        *(f"not simulated: {name}, {why}" for name, why in report["not_simulated"].items()),
        "",
        *_advice(report, options),
    ]


def _advice(report: Mapping[str, Any], options: AdviseOptions) -> list[str]:
    by, now, best = options.by, report["policy"], report["advice"]
    rows = {row["policy"]: row for row in report["simulated"]}
    if now not in rows:
        return [f"No advice: what {now}, the policy of now, would give is not known."]
    if best is None:
        why = "too many requests are lost or wait ever longer, or too few were simulated"
        return [f"No policy has a {by}: {why}."]
    if best == now:
        why = f"has a {by} that is lower by more than {SAME:.0%}"
        return [f"Stay with {now}: none that lasts, and does not lose more requests, {why}."]
    new, old = rows[best], rows[now]
    key = f"{by}_ms"
    than = ""
    if old[key] is not None:
        than = f" instead of {old[key]:.0f} ms, work {new['work']:.2f} instead of {old['work']:.2f}"
    token = f" --token-file {options.token_file}" if options.token_file else ""
    return [
        f"Switch to {best}: {by} {new[key]:.0f} ms{than}:",
        f"  codedinvnet policy {options.url} {best}{token}",
    ]
