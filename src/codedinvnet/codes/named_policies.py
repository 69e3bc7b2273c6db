"""Names of policies and methods together, such as METHOD+hedge, and those compared by default.

`scheduler/policies/` has the policies themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.registry import OURS, UnknownMethod, find_method
from codedinvnet.common.errors import UserError
from codedinvnet.scheduler.policies import (
    AUTO,
    AUTO_WITH,
    CODED,
    HEDGE,
    POLICIES,
    WITH_HEDGE,
    Policy,
)


@dataclass(frozen=True)
class Served:
    """How a method is served: the options `--policy` and `--method`."""

    policy: str
    method: str = OURS

    @property
    def rules(self) -> Policy:
        """Its policy."""
        return POLICIES[self.policy]

    @property
    def by_name(self) -> bool:
        """Whether it is named by its method, whose accuracy is its own."""
        return self.method != OURS

    @property
    def scenario(self) -> dict[str, Any]:
        """What a scenario says of it."""
        method, said = find_method(self.method), {"policy": self.policy, "method": self.method}
        own_r = self.by_name and not method.any_stragglers
        return {**said, "r": method.rules(2).r or 1} if own_r else dict(said)


SERVED: Mapping[str, Served] = {
    **{policy: Served(policy) for policy in POLICIES if policy != AUTO.name},
    SmallBackup.name: Served(CODED.name, SmallBackup.name),
    SmallBackup.name + WITH_HEDGE: Served((CODED | HEDGE).name, SmallBackup.name),
    AUTO.name: Served(AUTO.name, SmallBackup.name),
}
"""What is compared by default, on equally many workers: without a code one more plain one."""


def served_as(name: str) -> Served:
    """Return how a policy, or a method as `find_method` takes it, is served.

    `METHOD+hedge` is hedged as well, and `auto+METHOD` has that method at hand (`none`: nothing).
    """
    if name in SERVED:
        return SERVED[name]
    if name.startswith(AUTO_WITH):
        text = name.removeprefix(AUTO_WITH)
        find_method(text)
        return Served(AUTO.name, text)
    text = name.removesuffix(WITH_HEDGE)
    try:
        method = find_method(text)
    except UnknownMethod as error:
        if ":" in name:
            raise
        raise UserError(f"{name!r} is not one of {', '.join(SERVED)}, nor a method") from error
    if method.is_policy or method.name == OURS:
        raise UserError(f"{name!r} is not one of {', '.join(SERVED)}")
    return Served(CODED.name if text == name else (CODED | HEDGE).name, text)


def check_extra(extra: float | None) -> None:
    """Raise UserError if a budget of extra work, None for none, cannot be."""
    if extra is not None and not 0 <= extra < math.inf:
        raise UserError(f"--extra: must be at least 0, got {extra}")


def in_order(labels: Iterable[str]) -> list[str]:
    """Return labels, each once: those of SERVED in its order, others behind."""
    known = list(SERVED)
    return sorted(set(labels), key=lambda x: (known.index(x) if x in SERVED else len(known), x))
