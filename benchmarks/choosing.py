"""How well `auto` chooses: its p99.9 beside that of the fixed policies, from a sweep's rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from codedinvnet.bench import tables
from codedinvnet.serving.policies import in_order
from codedinvnet.serving.rules.settings import AUTO
from codedinvnet.simulation import sweep

NOTHING = f"{AUTO.name}+none"
"""`auto` with no code at hand."""
NEAR = 1.1
"""A p99.9 of so many times the lowest is as good."""
QUIET = "none"
"""The straggler model in which nobody straggles."""

Place = tuple[str, int, float]


def choosing_section(path: Path) -> str:
    """Return how far policies are from the lowest p99.9 of the fixed ones, over all places."""
    rows = sweep.read_rows(path)
    tails = sweep.tails(rows)
    policies = in_order(name for tail in tails.values() for name in tail)
    fixed = [name for name in policies if not name.startswith(AUTO.name)]
    lowest = {place: _lowest(tail, fixed) for place, tail in tails.items()}
    works: dict[str, list[float]] = {}
    for row in rows:
        works.setdefault(row["cell"]["policy"], []).append(float(row["work_per_query"]))
    lines = []
    for name in policies:
        ratios = _ratios(tails, name, lowest)
        worse = _ratios(tails, name, {p: tail[sweep.BASELINE] for p, tail in tails.items()})
        lines.append(
            [
                name,
                f"{sum(ratio <= NEAR for ratio in ratios.values())} of {len(ratios)}",
                _worst(ratios),
                f"{sum(ratio > NEAR for ratio in worse.values())}",
                f"{min(works[name]):.2f} to {max(works[name]):.2f}",
            ]
        )
    near = f"within {NEAR - 1:.0%} of the lowest"
    heads = ["policy", near, "farthest", f"over {NEAR:g} x {sweep.BASELINE}", "work"]
    text = [
        f"Simulated p99.9 of {len(tails)} places, over the lowest of the fixed policies there "
        f"(`{AUTO.name}` has a small backup at hand, `{NOTHING}` nothing):",
        tables.markdown(heads, lines).strip(),
    ]
    if NOTHING in policies:
        two = {place: _lowest(tail, (sweep.BASELINE, "hedge")) for place, tail in tails.items()}
        ratios = _ratios(tails, NOTHING, two)
        close = sum(ratio <= NEAR for ratio in ratios.values())
        text.append(
            f"`{NOTHING}` is within {NEAR - 1:.0%} of the lower of `{sweep.BASELINE}` and `hedge` "
            f"in {close} of {len(ratios)} places; farthest: {_worst(ratios)}."
        )
    text += _quiet(path)
    return "\n\n".join(text)


def _quiet(path: Path) -> Iterable[str]:
    """Return what `auto` costs where nobody straggles."""
    rows = {
        (sweep.Cell(**row["cell"])._replace(policy=""), row["cell"]["policy"]): row
        for row in sweep.read_rows(path)
        if row["cell"]["stragglers"] == QUIET
    }
    pairs = [
        (row, rows[place, sweep.BASELINE])
        for (place, policy), row in rows.items()
        if policy == AUTO.name and (place, sweep.BASELINE) in rows
    ]
    if not pairs:
        return
    most = [max(own[key] / plain[key] for own, plain in pairs) for key in ("p50_ms", "p99_ms")]
    work = max(own["work_per_query"] / plain["work_per_query"] for own, plain in pairs)
    yield (
        f"Where nobody straggles ({len(pairs)} places), `{AUTO.name}` has at most {most[0]:.3f} "
        f"times the p50 of `{sweep.BASELINE}`, {most[1]:.3f} times its p99, and {work:.3f} times "
        "its work."
    )


def _lowest(tail: Mapping[str, float], names: Iterable[str]) -> float:
    return min(tail[name] for name in names if name in tail)


def _ratios(
    tails: Mapping[Place, Mapping[str, float]], name: str, to: Mapping[Place, float]
) -> dict[Place, float]:
    """Return a policy's p99.9 over another, by place; 1 where both are infinite."""
    return {
        place: 1.0 if tail[name] == to[place] else tail[name] / to[place]
        for place, tail in tails.items()
        if name in tail
    }


def _worst(ratios: Mapping[Place, float]) -> str:
    (model, batch, load), ratio = max(ratios.items(), key=lambda item: item[1])
    return f"{ratio:.2f} ({model}, {batch}, {load:.0%})"
