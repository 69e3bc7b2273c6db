"""The budget of extra work.

Extra work is paid from one budget, in service times of the served model. Every query adds
`Rules.extra` to it, and it holds `bucket` at most. What costs more is sent when that is
full, and paid off before anything else is. What is dropped before a worker has it is paid back.
"""

from __future__ import annotations

from codedinvnet.scheduler.tuning import TUNING, Tuning


class Budget:
    """What extra work may cost, in service times of the served model.

    Args:
        tokens: what may be spent before the first query comes.

    Attributes:
        share: what each query adds.
        tokens: what may be spent now; below 0 if something was sent that cost more than the bucket.
        spent: what was spent in all.
        queries: those that came.
        recent: what was spent for each query, of about `budget_memory` of them.
    """

    def __init__(self, tokens: float = 0.0, tuning: Tuning = TUNING) -> None:
        self._tuning = tuning
        self.share = 0.0
        self.tokens = tokens
        self.spent = 0.0
        self.queries = 0
        self.recent = 0.0
        self._counted = 0.0
        """What of `spent` is in `recent`."""

    def earn(self, work: float = 1.0) -> None:
        """Count a query that has come; such queries take `work` service times on average."""
        self.queries += 1
        counted = min(self.queries, self._tuning.budget_memory)
        self.recent += (self.spent - self._counted - self.recent) / counted
        self._counted = self.spent
        self.tokens = min(self._tuning.bucket, self.tokens + self.share * work)

    def pay(self, work: float, left: float = 0.0) -> bool:
        """Spend `work` if the budget then still holds `left`, or is full; return whether it did."""
        if self.tokens < min(work + left, self._tuning.bucket):
            return False
        self.tokens -= work
        self.spent += work
        return True

    def correct(self, paid: float, work: float) -> None:
        """Charge what was done in place of what was paid for it in advance."""
        self.tokens = min(self._tuning.bucket, self.tokens + paid - work)
        self.spent += work - paid

    def refund(self, work: float) -> None:
        """Take back what was paid for work that was not done."""
        self.tokens = min(self._tuning.bucket, self.tokens + work)
        self.spent -= work
