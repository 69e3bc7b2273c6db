"""Queries go where their beginning is cached, unless another worker is expected to be quicker."""

from __future__ import annotations

from codedinvnet.scheduler.actions import Send
from codedinvnet.scheduler.events import Completed, Submit, TimerDue, WorkerLost, WorkerUp
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules
from codedinvnet.scheduler.tuning import TUNING

RATE = TUNING.first_rate
DELAY = 1e5
"""Seconds after which a copy is sent, where the policy sends any, before times are known."""
LONG = 3 << 13
"""Bytes of a prompt that has many turns."""


class Line:
    """Three workers of one slot, and an imagined clock."""

    def __init__(self, policy: str = "uncoded") -> None:
        known = Rules(3, POLICIES[policy], hang_timeout=1e6, slots=1, hedge_share=1.0)
        self.scheduler, self.now, self.count = Scheduler(known), 0.0, 0

    def _sent(self, event: object) -> list[Send]:
        actions = self.scheduler.handle(self.now, event)  # type: ignore[arg-type]
        return [action for action in actions if isinstance(action, Send)]

    def ask(self, *keys: int, size: int) -> list[Send]:
        """Ask with a prompt whose beginnings have these keys and are equally long."""
        self.count += 1
        chain = tuple((key, (n + 1) * size // len(keys)) for n, key in enumerate(keys))
        delay = (0.0, DELAY)
        return self._sent(Submit((self.count,), self.now + 1e6, delay=delay, keys=chain, size=size))

    def done(self, *sends: Send) -> list[Send]:
        return [send for each in sends for send in self._sent(Completed(each.attempt))]

    def wait(self, seconds: float) -> list[Send]:
        self.now += seconds
        return self._sent(TimerDue())

    def lose(self, worker: int) -> list[Send]:
        return self._sent(WorkerLost(worker, "killed")) + self._sent(WorkerUp(worker))


def where(sends: list[Send]) -> list[int]:
    return [send.worker for send in sends]


def test_a_session_stays_where_it_was() -> None:
    line = Line()
    for turn in range(1, 6):
        (mine,) = line.ask(1, size=turn * LONG)
        (other,) = line.ask(2, size=turn * LONG)
        assert (mine.worker, other.worker) == (0, 1)
        line.done(other, mine)


def test_new_sessions_are_spread() -> None:
    line = Line()
    assert [where(line.ask(session, size=LONG)) for session in range(3)] == [[0], [1], [2]]


def test_the_longest_known_beginning_counts() -> None:
    line = Line()
    first = line.ask(1, 2, size=LONG)
    line.ask(1, 3, size=LONG)  # waits for the worker that has the first half
    second = line.wait(2 * TUNING.stays * RATE * LONG)
    assert (where(first), where(second)) == ([0], [1])
    line.done(*first, *second)
    for beginning, worker in ((3, 1), (2, 0)):
        assert where(line.ask(1, beginning, 4, size=3 * LONG // 2)) == [worker]


def test_a_session_waits_as_long_as_going_elsewhere_costs() -> None:
    line = Line()
    line.done(*line.ask(1, size=LONG))
    line.ask(1, size=LONG)
    assert line.ask(1, size=LONG + 1) == []
    costs = TUNING.stays * RATE * LONG  # what is new is a byte there, and all of it here
    assert line.wait(0.9 * costs) == []
    assert where(line.wait(0.2 * costs)) == [1]


def test_a_session_does_not_wait_where_little_is_cached() -> None:
    line = Line()
    line.done(*line.ask(1, size=10))
    line.ask(1, size=LONG)
    assert line.ask(1, size=LONG) == []
    assert where(line.wait(TUNING.stays * RATE * LONG * 2.1)) == [1]


def test_a_worker_that_came_back_has_cached_nothing() -> None:
    line = Line()
    line.done(*line.ask(1, size=LONG))
    line.lose(0)
    line.ask(2, size=LONG)  # takes a turn
    assert where(line.ask(1, size=LONG)) == [2]


def test_a_slow_home_is_left() -> None:
    """A prompt is computed anew where that is expected to take less time."""
    line = Line()
    for turn in range(TUNING.times_needed):
        for session in range(6):  # two at each worker
            (sent,) = line.ask(session, size=(turn + 1) * LONG)
            line.now += 3.0 if sent.worker == 0 and turn > 15 else 0.1
            line.done(sent)
    visited = []
    for session in range(6):
        (sent,) = line.ask(session, size=(turn + 2) * LONG)
        visited.append(sent.worker)
        line.done(sent)
    assert visited.count(0) == 0


def test_a_copy_goes_to_the_second_best_cache() -> None:
    line = Line("hedge")
    first = line.ask(1, size=LONG)
    line.ask(1, size=LONG)
    second = line.wait(2 * TUNING.stays * RATE * 2 * LONG)
    assert (where(first), where(second)) == ([0], [1])
    line.done(*first, *second)
    (sent,) = line.ask(1, 2, size=2 * LONG)
    assert where(line.wait(1.1 * DELAY)) == [1 - sent.worker]


def learn(line: Line, *, size: int = LONG, cached: int = 0, rate: float = RATE) -> None:
    """Let prompts take so long a byte, and then some that are cached, which take 10 ms."""
    for number in range(TUNING.times_needed):
        key = 100 * size + number
        for repeated in range(1 + cached):
            (sent,) = line.ask(key, size=size)
            line.now += 0.01 if repeated else rate * size
            line.done(sent)


def test_times_of_short_prompts_say_when_a_long_one_is_late() -> None:
    line, long, rate = Line("hedge"), 32 * LONG, RATE / 4
    learn(line, rate=rate)
    learn(line, size=LONG // 4, rate=rate)
    (sent,) = line.ask(1, size=long)
    assert line.wait(0.9 * rate * long) == []
    (copy,) = line.wait(0.5 * rate * long)
    assert copy.worker != sent.worker


def test_what_began_before_times_were_known_is_copied_too() -> None:
    line = Line("hedge")
    (sent,) = line.ask(1, size=LONG)
    learn(line)
    (copy,) = line.wait(RATE * LONG)
    assert copy.worker != sent.worker


def test_a_copy_waits_as_long_as_it_will_take_itself() -> None:
    line = Line("hedge")
    learn(line, cached=3)
    (home,) = line.ask(1, size=LONG)
    line.now += RATE * LONG
    line.done(home)
    (sent,) = line.ask(1, size=LONG)  # takes 10 ms, and a copy a second
    assert sent.worker == home.worker
    assert line.wait(0.9 * RATE * LONG) == []
    assert len(line.wait(0.2 * RATE * LONG)) == 1


def test_times_of_cached_prompts_say_little_about_others() -> None:
    """A session does not wait for its busy worker as if all others took for ever."""
    line = Line()
    first = line.ask(1, size=LONG)
    line.now += RATE * LONG
    line.done(*first)
    for _ in range(2 * TUNING.times_needed):
        (sent,) = line.ask(1, size=LONG)
        line.now += 0.01
        line.done(sent)
    line.ask(1, size=LONG)
    assert line.ask(1, size=LONG) == []
    assert where(line.wait(2.2 * TUNING.stays * RATE * LONG)) == [1]


def test_a_session_leaves_a_worker_that_is_at_a_prompt_for_long() -> None:
    line = Line()
    learn(line)
    (home,) = line.ask(1, size=LONG)
    line.now += RATE * LONG
    line.done(home)
    line.ask(1, size=LONG + LONG // 4)
    line.now += RATE * LONG  # four times as long as that takes
    (sent,) = line.ask(1, size=LONG + LONG // 2)
    assert sent.worker != home.worker


def test_what_a_slow_worker_is_at_is_not_cached_there() -> None:
    line = Line()
    learn(line)
    (slow,) = line.ask(1, size=LONG)
    line.now += 3 * RATE * LONG
    (sent,) = line.ask(1, size=LONG)
    assert sent.worker != slow.worker
