"""The policies that a running service can go by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from codedinvnet.codes.rules import is_systematic
from codedinvnet.net.protocol.messages import ProtocolError
from codedinvnet.scheduler.policies import (
    AUTO,
    AUTO_WITH,
    CODED,
    HEDGE,
    POLICIES,
    WITH_HEDGE,
    Policy,
)
from codedinvnet.scheduler.scheduler import code_for

if TYPE_CHECKING:
    from codedinvnet.codes.base import Scheme


def objection(policy: Policy, scheme: Scheme | None) -> str:
    """Return why a policy does not go with the scheme that the workers know; "" if it does."""
    if scheme is not None and not is_systematic(scheme.rules) and policy != CODED:
        return (
            f"{scheme.name} has no direct answers, so that it goes with the policy coded only, "
            f"not with {policy.name}"
        )
    return ""


class Choices:
    """The policies that a running service can go by."""

    def __init__(self, scheme: Scheme | None, workers: int) -> None:
        self.method = None if scheme is None else scheme.name
        self.size = 1 if scheme is None else scheme.rules.k
        self.refused: dict[str, str] = {}
        for name, policy in POLICIES.items():
            why = objection(policy, scheme)
            try:
                code_for(policy, workers, None if scheme is None else scheme.rules)
            except ValueError as error:
                why = why or str(error)
            if why:
                self.refused[name] = why
        self.offered = tuple(name for name in POLICIES if name not in self.refused)

    def named(self, name: str) -> Policy:
        """Return the policy of a name, which may be the method's, `METHOD+hedge` or `auto+METHOD`.

        Raises:
            ProtocolError: if there is none, or the service cannot go by it.
        """
        if self.method is not None and name not in POLICIES:
            own = {
                self.method: CODED,
                self.method + WITH_HEDGE: CODED | HEDGE,
                AUTO_WITH + self.method: AUTO,
            }
            name = own[name].name if name in own else name
        if name not in POLICIES:
            raise ProtocolError(f"policy: {name!r} is not one of {', '.join(POLICIES)}")
        if name in self.refused:
            raise ProtocolError(f"policy: {self.refused[name]}")
        return POLICIES[name]

    def report(self, chosen: Policy) -> dict[str, Any]:
        """Return the answer to `GET /policy`."""
        offered, refused = list(self.offered), self.refused
        own = {"policy": chosen.name, "method": self.method}
        return {**own, "offered": offered, "refused": refused}
