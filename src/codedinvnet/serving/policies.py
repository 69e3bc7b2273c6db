"""The policies, and codes by name: what is compared, and what a service can go by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.registry import METHODS, OURS, find_method
from codedinvnet.codes.rules import BACKUP, is_systematic
from codedinvnet.errors import UserError
from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.decoding import Answerer
from codedinvnet.serving.rules.sending import code_for
from codedinvnet.serving.rules.settings import AUTO, CODED, HEDGE, POLICIES, Policy


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
    def backup(self) -> bool:
        """Whether the extra worker runs a small classifier."""
        tasks = find_method(self.method).rules(2).tasks(2).values()
        return any(task.model == BACKUP for task in tasks)

    @property
    def scenario(self) -> dict[str, Any]:
        """What a scenario says of it."""
        method, said = find_method(self.method), {"policy": self.policy, "method": self.method}
        own_r = self.by_name and not method.chooses
        return {**said, "r": method.rules(2).r or 1} if own_r else dict(said)


WITH_HEDGE, AUTO_WITH = "+hedge", "auto+"
"""End and beginning of names: a method that is hedged as well, and `auto` with a method at hand."""
COMPARED = tuple(name for name, method in METHODS.items() if method.compared)
SERVED: Mapping[str, Served] = {
    **{policy: Served(policy) for policy in POLICIES if policy != AUTO.name},
    **{name: Served(CODED.name, name) for name in COMPARED},
    **{name + WITH_HEDGE: Served((CODED | HEDGE).name, name) for name in COMPARED},
    AUTO.name: Served(AUTO.name, SmallBackup.name),
}
"""What is compared if nobody says, on equally many workers: without a code one more plain one."""


def served_as(name: str) -> Served:
    """Return how a policy, or a method as `find_method` takes it, is served.

    `METHOD+hedge` is hedged as well, and `auto+METHOD` has that method at hand (`none`: nothing).

    Raises:
        UserError: if there is neither.
    """
    if name in SERVED:
        return SERVED[name]
    if name.startswith(AUTO_WITH):
        return Served(AUTO.name, find_method(name.removeprefix(AUTO_WITH)).name)
    text = name.removesuffix(WITH_HEDGE)
    try:
        method = find_method(text)
    except UserError as error:
        if ":" in name:
            raise
        raise UserError(f"{name!r} is not one of {', '.join(SERVED)}, nor a method") from error
    if method.is_policy or method.name == OURS:
        raise UserError(f"{name!r} is not one of {', '.join(SERVED)}")
    return Served(CODED.name if text == name else (CODED | HEDGE).name, text)


def in_order(labels: Iterable[str]) -> list[str]:
    """Return labels, each once: those of SERVED in its order, others behind."""
    known = list(SERVED)
    return sorted(set(labels), key=lambda x: (known.index(x) if x in SERVED else len(known), x))


def objection(policy: Policy, scheme: Scheme | Answerer | None) -> str:
    """Return why a policy does not go with what the workers know; "" if it does.

    Args:
        policy: that is wanted.
        scheme: that the workers know; None if they know none.
    """
    if scheme is not None and not is_systematic(scheme.rules) and policy != CODED:
        return (
            f"{scheme.name} has no direct answers, so that it goes with the policy coded only, "
            f"not with {policy.name}"
        )
    if policy.guessing and not (scheme is not None and scheme.rules.guesses):
        whose = "this service" if scheme is None else scheme.name
        return (
            f"{policy.name} needs a code that can guess, by side features; {whose} has none, or "
            "does so under coded, too"
        )
    return ""


class Choices:
    """The policies that a running service can go by.

    Args:
        scheme: that the workers know; None if they know none.
        workers: how many there are.
        backups: see `Rules`.

    Attributes:
        method: the name of the code; None without one.
        size: of a full group.
        refused: policy -> why it is none of them.
        offered: their names.
    """

    def __init__(self, scheme: Scheme | Answerer | None, workers: int, backups: int = 0) -> None:
        self.method = None if scheme is None else scheme.name
        self.size = 1 if scheme is None else scheme.rules.k
        self.refused: dict[str, str] = {}
        for name, policy in POLICIES.items():
            why = objection(policy, scheme)
            try:
                code_for(policy, workers, None if scheme is None else scheme.rules, backups)
            except ValueError as error:
                why = why or str(error)
            if why:
                self.refused[name] = why
        self.offered = tuple(name for name in POLICIES if name not in self.refused)

    def named(self, name: str) -> Policy:
        """Return the policy of a name, which may be that of the method, as `METHOD+hedge`.

        Raises:
            BadRequest: if there is none, or the service cannot go by it.
        """
        if name not in POLICIES and self.method is not None:
            with suppress(UserError):
                served = served_as(name)
                name = served.policy if served.method == self.method else name
        if name not in POLICIES:
            raise BadRequest(f"policy: {name!r} is not one of {', '.join(POLICIES)}")
        if name in self.refused:
            raise BadRequest(f"policy: {self.refused[name]}")
        return POLICIES[name]

    def told(self, chosen: Policy) -> dict[str, Any]:
        """Return what clients are told of them, and of the one that was chosen."""
        offered, refused = list(self.offered), self.refused
        own = {"policy": chosen.name, "method": self.method}
        return {**own, "offered": offered, "refused": refused}
