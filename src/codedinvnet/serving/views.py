"""What the page shows of queries: the newest coding groups."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from codedinvnet.scheduler.queries import Query

SHOWN_GROUPS = 6
"""Groups that the page shows."""


@dataclass
class GroupView:
    """What the page shows of a group."""

    identity: int
    members: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)
    """Query -> its input, if that is an image: name -> (1, C, H, W)."""
    outcomes: dict[int, str] = field(default_factory=dict)
    """Query -> how it ended."""


class GroupViews:
    """The newest groups, the newest last.

    Args:
        images: whether queries are images, which the page shows; other inputs are not kept.
    """

    def __init__(self, images: bool) -> None:
        self.images = images
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
        # Copied, since a query's rows are a view of its whole request's.
        kept = {name: rows.copy() for name, rows in inputs.items()} if self.images else {}
        view.members[query.identity] = kept

    def note(self, query: int, outcome: str) -> None:
        """Take down how a query ended."""
        for view in self._views:
            if query in view.members:
                view.outcomes[query] = outcome
