"""Differences between methods, tested on the groups that both were given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from codedinvnet.bench.erasures import Counts

SAMPLES = 2000


class Difference(NamedTuple):
    """How far one method's recovered accuracy is above another's."""

    margin: float
    """In points (hundredths)."""
    low: float
    high: float
    """Ends of the 95 % interval, in points."""
    p: float
    """Two-sided."""


def paired_difference(
    a: Sequence[Counts], b: Sequence[Counts], *, samples: int = SAMPLES
) -> Difference:
    """Compare two methods by a bootstrap over groups.

    Members of a group share their parity and are not independent, so whole groups are redrawn, the
    same ones for both methods. Groupings of the same images are not independent either: the margin
    is the mean over them, but its spread is taken to be that of a single one, which errs on the
    safe side.

    Args:
        a: right and scored answers by group, for each grouping.
        b: the same for the other method, on the same groups.
        samples: how many redraws, over all groupings.

    Raises:
        ValueError: if the groups are not the same.
    """
    shared = min(len(a), len(b))
    if not shared or any(
        len(x.scored) != len(y.scored) for x, y in zip(a[:shared], b[:shared], strict=True)
    ):
        raise ValueError("the methods were not given the same groups")
    generator = np.random.default_rng(0)
    margins, deviations = [], []
    per_grouping = -(-samples // shared)
    for x, y in zip(a[:shared], b[:shared], strict=True):
        values = torch.stack([x.correct, x.scored, y.correct, y.scored]).double()
        margin = float(_difference(values.sum(1)))
        margins.append(margin)
        # Groups that came out the same are one kind: a redraw is how many it has of each.
        kinds, of_each = values.unique(dim=1, return_counts=True)
        count = values.shape[1]
        redrawn = generator.multinomial(count, of_each.numpy() / count, per_grouping)
        sums = kinds @ torch.from_numpy(redrawn).double().T
        deviations.append(_difference(sums) - margin)
    mean = sum(margins) / shared
    drawn = torch.cat(deviations) + mean
    tails = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    p = min(1.0, 2 * (tails + 1) / (len(drawn) + 1))
    return Difference(100 * mean, 100 * low, 100 * high, p)


def _difference(sums: torch.Tensor) -> torch.Tensor:
    """Return the difference of two shares of (correct, scored, correct, scored)."""
    return sums[0] / sums[1] - sums[2] / sums[3]


def pooled(seeds: Sequence[Sequence[Counts]]) -> list[Counts]:
    """Add the counts of several seeds' trials on the same groups."""
    return [
        Counts(
            torch.stack([c.correct for c in grouping]).sum(0),
            torch.stack([c.scored for c in grouping]).sum(0),
        )
        for grouping in zip(*seeds, strict=True)
    ]
