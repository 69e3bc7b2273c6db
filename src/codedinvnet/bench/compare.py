"""Differences between methods, judged on the groups that both were given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from codedinvnet.bench.erasures import Counts


class Difference(NamedTuple):
    """How far one method's recovered accuracy is above another's."""

    margin: float
    """In points (hundredths)."""
    low: float
    high: float
    """The ends of the 95 % interval, in points."""
    p: float
    """The two-sided probability of such a margin without a difference."""


def paired_difference(a: Sequence[Counts], b: Sequence[Counts]) -> Difference:
    """Compare two methods on the same groups.

    Members of a group share their parity and are not independent, so whole groups are the sample:
    the variance is that of a difference of two ratio estimates over clusters (Cochran, Sampling
    Techniques, 1977, section 6.3), with the normal distribution. Groupings of the same images are
    not independent either: the margin is the mean over them, but its variance is taken to be that
    of a single one, which errs on the safe side.

    Args:
        a: right and scored answers by group, for each grouping.
        b: the same for the other method, on the same groups.

    Raises:
        ValueError: if the groups are not the same.
    """
    pairs = list(zip(a, b, strict=False))
    if not pairs or any(len(x.scored) != len(y.scored) for x, y in pairs):
        raise ValueError("the methods were not given the same groups")
    margins, variances = [], []
    for x, y in pairs:
        (share, own), (other, its) = _ratio(x), _ratio(y)
        margins.append(share - other)
        groups = len(own)
        variances.append(float((own - its).square().sum()) * groups / max(1, groups - 1))
    margin = sum(margins) / len(margins)
    error = math.sqrt(sum(variances) / len(variances))
    half = 1.959964 * error
    p = math.erfc(abs(margin) / error / math.sqrt(2)) if error else float(margin == 0)
    return Difference(100 * margin, 100 * (margin - half), 100 * (margin + half), p)


def _ratio(counts: Counts) -> tuple[float, Tensor]:
    """Return the share of right answers, and what each group adds to its error (G,)."""
    correct, scored = counts.correct.double(), counts.scored.double()
    share = float(correct.sum() / scored.sum())
    return share, (correct - share * scored) / scored.sum()


def pooled(seeds: Sequence[Sequence[Counts]]) -> list[Counts]:
    """Add the counts of several seeds' trials on the same groups."""
    return [
        Counts(
            torch.stack([c.correct for c in grouping]).sum(0),
            torch.stack([c.scored for c in grouping]).sum(0),
        )
        for grouping in zip(*seeds, strict=True)
    ]
