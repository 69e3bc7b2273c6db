"""Watches what a service's own traffic says of its limit on disagreement, and stops releasing.

A complete group tells for nothing whether an answer that would have been decoded agrees with the
direct one. Of these comparisons those count whose confidence reaches the threshold: they stand for
the answers that are released, and go on while none is released.

The rules, with no clock and no chance in them:

- While it releases, the sum is the number of disagreements above `EXCESS` times what the limit
  allows. It is never below 0. At `STOP` nothing is released any more.
- While it does not, the sum is the number of disagreements below `CREDIT` times what the limit
  allows, and never below 0. At `RESUME` answers are released again.

Both are cumulative sums (Page, Biometrika 1954): disagreement that stays above `EXCESS` times the
limit is met in the end, and the sooner the higher it is.
"""

from __future__ import annotations

from dataclasses import dataclass

EXCESS = 1.2
"""Disagreement above this times the limit counts towards a stop."""
STOP = 4.0
"""Disagreements in excess at which nothing is released any more."""
CREDIT = 1.5
"""Disagreement below this times the limit counts towards releasing again."""
RESUME = 4.0
"""Disagreements to the credit at which answers are released again."""


@dataclass
class Watch:
    """Decides which approximate answers are released.

    Attributes:
        limit: the share of released answers that may disagree.
        releasing: whether traffic lets answers be released.
        comparisons: how many comparisons have been seen.
        counted: those of them that reached the threshold.
        disagreed: those of these that disagreed.
        stops: how often releasing was stopped.
    """

    limit: float
    releasing: bool = True
    comparisons: int = 0
    counted: int = 0
    disagreed: int = 0
    stops: int = 0
    _sum: float = 0.0

    def compared(self, reached: bool, agrees: bool) -> bool:
        """Take a comparison; return whether releasing was stopped or taken up by it.

        Args:
            reached: whether the decoded answer's confidence reaches the threshold.
            agrees: whether it agrees with the direct one.
        """
        self.comparisons += 1
        if not reached:
            return False
        self.counted += 1
        self.disagreed += not agrees
        wrong = float(not agrees)
        change = wrong - EXCESS * self.limit if self.releasing else CREDIT * self.limit - wrong
        self._sum = max(0.0, self._sum + change)
        if self._sum < (STOP if self.releasing else RESUME):
            return False
        self.releasing = not self.releasing
        self.stops += not self.releasing
        self._sum = 0.0
        return True
