"""The figures of `python -m benchmarks serve`: what the replies of a service come to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from codedinvnet.bench.load import Reply
from codedinvnet.quantiles import percentile, rank_of, rounded

RESAMPLES = 1000
STRETCH = 50
"""Consecutive requests that a bootstrap keeps together, since queues make neighbours alike."""
STRETCHES = 10
"""A run has at least so many stretches, shorter ones if need be."""


def latencies(replies: Iterable[Reply]) -> list[float]:
    """Return the latency of each request in ms, infinite for one that was not answered."""
    return [1000 * reply.latency if reply.ok else math.inf for reply in replies]


def percentiles(replies: Sequence[Reply]) -> dict[str, float | None]:
    """Return p50, p99 and p99.9 in ms; None for one that so many requests never reached."""
    times = latencies(replies)
    shares = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999}
    return {name: rounded(percentile(times, share), 2) for name, share in shares.items()}


def summary(replies: Sequence[Reply], truth: np.ndarray) -> dict[str, Any]:
    """Return the latency percentiles, decoded share and accuracy of an arm."""
    answered = [reply for reply in replies if reply.ok]
    outcomes = [outcome for reply in answered for outcome in reply.outcomes]
    right = [
        int(label) == int(truth[row])
        for reply in answered
        for label, row in zip(reply.labels, reply.rows, strict=True)
    ]
    return {
        "requests": len(replies),
        "errors": len(replies) - len(answered),
        **percentiles(replies),
        "decoded_share": round(1 - outcomes.count("direct") / max(1, len(outcomes)), 5),
        "accuracy": round(sum(right) / max(1, len(right)), 5),
    }


def tail_ratios(
    replies: Mapping[str, Sequence[Reply]], policies: Sequence[str], kind: str, seed: int
) -> dict[str, Any]:
    """Return p99.9 with held answers over p99.9 of uncoded without, with bootstrap intervals.

    Stretches of consecutive requests are resampled. None stands for a ratio of what is infinite.

    Args:
        replies: of the arms `{kind}none/uncoded` and `{kind}held/{policy}`.
        policies: to compare.
        kind: "" or another word and a space.
        seed: of the resampling.
    """
    generator = np.random.default_rng(seed)
    base = np.array(latencies(replies[f"{kind}none/uncoded"]))
    tail, tails = percentile(base, 0.999), _resampled_tails(base, generator)
    found: dict[str, Any] = {}
    for policy in policies:
        held = np.array(latencies(replies[f"{kind}held/{policy}"]))
        name = f"{kind.replace(' ', '_')}p999_ratio_{policy.replace('+', '_')}"
        with np.errstate(invalid="ignore"):  # infinite by infinite
            ratios = np.sort(_resampled_tails(held, generator) / tails)
        whole = percentile(held, 0.999)
        found[name] = rounded(whole / tail, 3) if math.isfinite(tail) else None
        low, high = ratios[int(0.025 * RESAMPLES)], ratios[math.ceil(0.975 * RESAMPLES) - 1]
        found[f"{name}_95"] = [rounded(low, 3), rounded(high, 3)]
    return found


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a share of n."""
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def _resampled_tails(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return p99.9 (RESAMPLES,) of values (n,) that were drawn in stretches, round the end."""
    count = len(values)
    length = max(1, min(STRETCH, count // STRETCHES))
    starts = generator.integers(count, size=(RESAMPLES, math.ceil(count / length)))
    places = (starts[:, :, None] + np.arange(length)) % count
    draws = values[places.reshape(RESAMPLES, -1)[:, :count]]
    rank = rank_of(count, 0.999)
    return np.asarray(np.partition(draws, rank, axis=1)[:, rank])
