"""An erasure code, and the rules, whose choice of workers is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from codedinvnet.codes.rules import CodeRules
from codedinvnet.codes.rules import Task as CodeTask
from codedinvnet.scheduler.assigner import TaskAssigner
from codedinvnet.scheduler.queries import Attempt
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules


@dataclass(frozen=True)
class ErasureCode:
    """Any `size` outputs determine a group; systematic: a data task determines its own member."""

    k: int
    r: int = 1
    fixed_size: bool = False
    systematic: bool = True
    guesses: bool = False

    def tasks(self, size: int) -> Mapping[int, CodeTask]:
        assert 1 <= size <= self.k
        assert size == self.k or not self.fixed_size
        everyone = tuple(range(size))
        joint = CodeTask(everyone, encoded=True)
        data = {i: CodeTask((i,)) if self.systematic else joint for i in range(size)}
        return {**data, **{self.k + j: joint for j in range(self.r)}}

    def recoverable(self, available: frozenset[int], size: int) -> frozenset[int]:
        assert available <= set(self.tasks(size))
        if len(available) >= size:
            return frozenset(range(size))
        return frozenset(t for t in available if t < size and self.systematic)


class WatchedAssigner(TaskAssigner):
    """Assigns tasks; which worker takes one is checked."""

    def take(self, now: float) -> tuple[int, Attempt] | None:
        if (taken := super().take(now)) is not None:
            assert self.may_take(*taken), "another worker should take it"
        return taken

    def may_take(self, worker: int, attempt: Attempt) -> bool:
        """Tell whether a worker keeps apart what must be kept apart, as far as workers allow it."""
        if attempt.fallback or worker in self.fallbacks:
            return attempt.fallback and worker in self.fallbacks
        up = self.up - self.fallbacks
        busy = {
            i
            for i, found in enumerate(self.workers)
            for other in found.running.values()
            if other.group is attempt.group and other is not attempt
        }
        own = attempt.query.attempts.values() if attempt.query is not None else ()
        held = {other.worker for other in own if other is not attempt}
        sound = up - held - attempt.group.failed
        return worker in (sound - busy or sound or up - held)

    def is_kept_back(self, worker: int) -> bool:
        """Tell whether a worker computes all it can, and the next task would have to wait there."""
        if not self.concurrency.is_found:
            return False
        its = self.workers[worker]
        stays = [each for each in its.running.values() if its.stuck or not each.late]
        few = self.needed < len(self.up - self.fallbacks) / 2
        return len(stays) >= self.concurrency.computed(worker) and (its.stuck or few)

    @property
    def fallbacks(self) -> set[int]:
        """The workers for late queries alone."""
        return set(range(self._mains, len(self.workers)))


class Watched(Scheduler):
    """The scheduler; which worker takes a task is checked."""

    assigner: WatchedAssigner

    def __init__(self, rules: Rules, code: CodeRules | None = None) -> None:
        super().__init__(rules, code)
        self.assigner.__class__ = WatchedAssigner

    def is_passed_by(self, now: float, worker: int, attempt: Attempt) -> bool:
        """Tell whether a worker is too slow for a task that waits."""
        assigner, slowness = self.assigner, self.stats.slowness(worker)
        up = assigner.up - assigner.fallbacks
        fast = assigner.concurrency.all_computed(up - self.stats.slow)
        free = (other for other in self.attempts.values() if other.worker is None)
        waiting = sorted(
            (other for other in free if not other.fallback),
            key=lambda other: (not other.first, other.identity),
        )
        near = waiting.index(attempt) < (slowness - 1) * fast
        return (
            len(up & self.stats.slow) <= max(1, len(up) / 3)
            and near
            and now < attempt.queued + (slowness - 1) * self.stats.normal
        )
