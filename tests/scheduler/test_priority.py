"""Where all workers are busy, queries of higher priority are sent before others."""

from __future__ import annotations

import pytest

from codedinvnet.scheduler.actions import Send
from codedinvnet.scheduler.events import (
    HIGH,
    LOW,
    NORMAL,
    Completed,
    Event,
    Submit,
    TimerDue,
    WorkerLost,
)
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules


class Line:
    """Workers of one slot, all of them busy."""

    def __init__(self, workers: int = 1) -> None:
        rules = Rules(workers, POLICIES["hedge"], hang_timeout=1e6, hedge_share=1.0)
        self.scheduler, self.count, self.now = Scheduler(rules), 0, 0.0
        self.busy = [send for _ in range(workers) for send in self.ask(NORMAL)]

    def tell(self, event: Event) -> list[Send]:
        return [each for each in self.scheduler.handle(self.now, event) if isinstance(each, Send)]

    def ask(self, priority: int, delay: tuple[float, float] | None = None) -> list[Send]:
        self.count += 1
        return self.tell(Submit((self.count,), 1e6, priority=priority, delay=delay))

    def order(self) -> list[int]:
        """Return the queries in the order in which workers get them."""
        found, sends = list[int](), self.busy
        while sends:
            sends = [sent for each in sends for sent in self.tell(Completed(each.attempt))]
            found += [send.members[0] for send in sends]
        return found


@pytest.mark.parametrize(
    ("asked", "order"),
    [
        ([LOW, NORMAL, HIGH], [4, 3, 2]),
        ([NORMAL, LOW, HIGH, LOW, HIGH, NORMAL], [4, 6, 2, 7, 3, 5]),
        ([LOW, LOW, LOW], [2, 3, 4]),
    ],
)
def test_higher_priorities_come_first_and_equals_in_their_order(
    asked: list[int], order: list[int]
) -> None:
    line = Line()
    assert not [sent for priority in asked for sent in line.ask(priority)]
    assert line.order() == order


def test_what_was_lost_waits_before_its_equals_only() -> None:
    line = Line(2)
    line.tell(Completed(line.busy.pop(1).attempt))
    (lost,) = line.ask(LOW)
    for priority in (LOW, NORMAL):
        assert not line.ask(priority)
    line.tell(WorkerLost(lost.worker, "killed"))
    assert line.order() == [5, 3, 4]


def test_a_copy_of_low_priority_waits_for_others_of_higher() -> None:
    line = Line(2)
    line.tell(Completed(line.busy.pop(0).attempt))
    line.ask(LOW, delay=(0.0, 1.0))
    assert not line.ask(NORMAL)
    line.now = 2.0
    assert not line.tell(TimerDue())
    (sent,) = line.tell(Completed(line.busy[0].attempt))
    assert (sent.members, sent.copy) == ((4,), False)
