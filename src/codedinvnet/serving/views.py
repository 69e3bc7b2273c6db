"""What the page shows of queries: the newest coding groups."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from codedinvnet.serving.rules.tasks import Query

SHOWN_GROUPS = 6
"""Groups that the page shows."""


@dataclass
class GroupView:
    """What the page shows of a group."""

    identity: int
    members: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)
    """Query -> its inputs."""
    outcomes: dict[int, str] = field(default_factory=dict)
    """Query -> how it ended."""


class GroupViews:
    """The newest groups, the newest last."""

    def __init__(self) -> None:
        self._views: deque[GroupView] = deque(maxlen=SHOWN_GROUPS)

    def __iter__(self) -> Iterator[GroupView]:
        return iter(self._views)

    def show(self, query: Query | None, inputs: Mapping[str, np.ndarray]) -> None:
        """Add a query to its group, if it is there and of a code."""
        if query is None or query.group.code.k == 1:
            return
        group = query.group.identity
        view = next((view for view in self._views if view.identity == group), None)
        if view is None:
            view = GroupView(group)
            self._views.append(view)
        view.members[query.identity] = inputs

    def note(self, query: int, outcome: str) -> None:
        """Take down how a query ended."""
        for view in self._views:
            if query in view.members:
                view.outcomes[query] = outcome
