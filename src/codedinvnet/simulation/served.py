"""What is compared, simulated and on the real service: the policies, and the small backup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from codedinvnet.methods import CodedInvNet, SmallBackup
from codedinvnet.serving.rules import POLICIES, Policy


@dataclass(frozen=True)
class Served:
    """How a method is served: the options `--policy` and `--method`."""

    policy: str
    method: str = CodedInvNet.name

    @property
    def rules(self) -> Policy:
        """Its policy."""
        return POLICIES[self.policy]

    @property
    def backup(self) -> bool:
        """Whether the extra worker runs a small classifier."""
        return self.method == SmallBackup.name

    @property
    def scenario(self) -> dict[str, Any]:
        """What a scenario says of it."""
        return {"policy": self.policy, "backup": self.backup}


SERVED: Mapping[str, Served] = {
    **{policy: Served(policy) for policy in POLICIES},
    SmallBackup.name: Served("coded", SmallBackup.name),
}
"""By name, on equally many workers: methods without a code have one more plain one."""
