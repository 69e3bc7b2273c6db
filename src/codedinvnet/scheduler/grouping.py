"""How queries join coding groups, and when groups are sealed."""

from __future__ import annotations

from codedinvnet.scheduler.completion import Completion
from codedinvnet.scheduler.dispatch import Dispatcher
from codedinvnet.scheduler.group import CodingGroup
from codedinvnet.scheduler.policies import Launch
from codedinvnet.scheduler.queries import Query


class Grouping:
    """Makes groups: a request fills whole ones, and what is left of it joins the open one.

    Args:
        dispatcher: sends tasks, and knows all that is in flight.
        completion: ends queries.
    """

    def __init__(self, dispatcher: Dispatcher, completion: Completion) -> None:
        self._on, self._completion = dispatcher, completion
        self._flying = dispatcher.flying

    def new(self) -> CodingGroup:
        """Open a group that only one request fills."""
        group = CodingGroup(self._flying.number(), self._on.code)
        self._flying.groups[group.identity] = group
        return group

    def joinable(self) -> CodingGroup:
        """Return the group that any query may join."""
        flying, on = self._flying, self._on
        if flying.open_group is None:
            flying.open_group = self.new()
            if on.code.k > 1:
                at = on.now + on.rules.group_timeout
                on.timers.set(at, "group", flying.open_group.identity)
        return flying.open_group

    def joined(self, query: Query) -> None:
        """Send what is sent for a query at once."""
        on = self._on
        self._flying.queries[query.identity] = query
        on.timers.set(query.deadline, "deadline", query.identity)
        on.budget.earn(max(1.0, on.stats.mean))
        on.send_own(query)
        on.policy.taken(on, query)

    def seal(self, group: CodingGroup) -> None:
        """Fix a group's size, and send its extra tasks if the policy does."""
        on, k = self._on, group.code.k
        if group is self._flying.open_group:
            self._flying.open_group = None
        missing = group.seal()
        if on.systematic:
            extra = [t for t in missing if t >= k and self._flying.is_wanted(group, t)]
            on.policy.sealed(on, group, extra)
        else:
            for task in missing:
                on.send(group, task)
        if k > 1:
            if on.decider is not None and on.policy.coded:
                on.decider.sealed(group.size / k)
            self._completion.settle(group)

    def timeout(self, group: CodingGroup) -> None:
        """Seal an open group with the members that have no answer yet."""
        on, flying = self._on, self._flying
        if not on.systematic:
            self.seal(group)
            return
        flying.open_group = None
        late = list(flying.pending(group))
        on.forget(group, [each for each in group.members if each not in flying.queries])
        group.keep([query.identity for query in late])
        for member, query in enumerate(late):
            query.member = member
        if len(late) > 1 or (late and not on.policy.coded):
            self.seal(group)
            return
        group.uncode()
        for query in late:  # a group of one is plainly copied
            on.launch(Launch(group, query.member, query))
        on.close_if_over(group)
