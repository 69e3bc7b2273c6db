"""Checks by a service's own traffic whether its limit on disagreement is kept.

When a group is complete, the answer that would have been decoded can be compared with the direct
one for free. Comparisons whose confidence reaches the threshold stand for the answers that are
released, and go on while none is released.

The extra tasks alone would have answered for all members, which gives many comparisons for one.
If they disagree far more often than in the calibration, inputs *drift*: then less is tolerated.

- A first sum is the number of disagreements above what the limit allows, at most `MOST`. From
  `STRICT` on, until it is 0 again, answers are released *strictly*: by a higher threshold
  (`Curve.strict_threshold`), which soon meets drift that is too weak to tell from chance.
- Inputs drift while the extra tasks' disagreements, discounted by `MEMORY` for each further group,
  exceed `EXCESSIVE` times what the calibration expects by `CHANCE` standard deviations.
- While the watch releases, its sum is the number of disagreements above `excess` times what the
  limit allows. At `stop` nothing is released any more.
- While it doesn't, its sum is the number of disagreements below `credit` times what the limit
  allows. At `resume` answers are released again.

All are cumulative sums that never fall below 0 (Page, Biometrika 1954): disagreement that stays
above `excess` times the limit is detected in the end, and the sooner the higher it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Bars(NamedTuple):
    """What the sums are compared with."""

    excess: float
    """Disagreement above this times the limit counts towards a stop."""
    stop: float
    """Disagreements in excess at which nothing is released any more."""
    credit: float
    """Disagreement below this times the limit counts towards releasing again."""
    resume: float
    """Disagreements below the credit at which answers are released again."""


BARS: Mapping[bool | None, Bars] = {
    None: Bars(1.2, 4.0, 1.5, 4.0),
    False: Bars(1.2, 8.0, 1.5, 4.0),
    True: Bars(1.0, 1.5, 0.5, 4.0),
}
"""By whether inputs drift; None if extra tasks alone can't answer, so that nothing says so."""
STRICT, MOST = 1.0, 2.0
"""Disagreements above what the limit allows from which on releasing is strict, and at most."""
MEMORY = 0.98
"""What a disagreement of the extra tasks weighs after one more group."""
EXCESSIVE, CHANCE = 3.0, 3.0
"""Inputs drift above this times the expected disagreement and by so many standard deviations."""


@dataclass
class Watch:
    """Decides which approximate answers are released.

    Attributes:
        limit: the share of released answers that may disagree.
        releasing: whether traffic lets answers be released.
        strict: whether the strict threshold decides what is released.
        drifting: whether inputs drift; None while that is unknown.
        comparisons: how many comparisons have been seen.
    """

    limit: float
    releasing: bool = True
    strict: bool = False
    drifting: bool | None = None
    comparisons: int = 0
    _sum: float = 0.0
    _above: float = 0.0
    _wrong: float = 0.0
    _expected: float = 0.0

    def guessed(self, wrong: float, expected: float) -> None:
        """Count a group's disagreements of the extra tasks alone, and those of the calibration."""
        self._wrong = MEMORY * self._wrong + wrong
        self._expected = MEMORY * self._expected + expected
        chance = CHANCE * math.sqrt(self._expected + 1)
        self.drifting = self._wrong > EXCESSIVE * self._expected + chance

    def compared(self, reached: bool, agrees: bool, sure: bool | None = None) -> bool:
        """Count a comparison; return whether it stopped releasing, or resumed it.

        Args:
            reached: whether the decoded answer's confidence reaches the threshold.
            agrees: whether it agrees with the direct one.
            sure: whether it reaches the strict threshold; None: there is no such threshold.
        """
        self.comparisons += 1
        if reached:
            self._above = min(MOST, max(0.0, self._above + (not agrees) - self.limit))
            self.strict = self._above >= STRICT or (self.strict and self._above > 0)
        if not (sure if self.strict and sure is not None else reached):
            return False
        bars, wrong = BARS[self.drifting], float(not agrees)
        allowed = self.limit * (bars.excess if self.releasing else bars.credit)
        change = wrong - allowed if self.releasing else allowed - wrong
        self._sum = max(0.0, self._sum + change)
        if self._sum < (bars.stop if self.releasing else bars.resume):
            return False
        self.releasing = not self.releasing
        self._sum = 0.0
        return True
