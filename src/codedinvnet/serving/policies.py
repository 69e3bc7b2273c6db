"""Which policies a service can go by, and what keeps it from others."""

from __future__ import annotations

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import is_systematic
from codedinvnet.serving.rules.sending import code_for
from codedinvnet.serving.rules.settings import POLICIES, Policy


def objection(policy: Policy, scheme: Scheme | None) -> str:
    """Return why a policy does not go with what the workers know; "" if it does.

    Args:
        policy: that is wanted.
        scheme: that the workers know; None if they know none.
    """
    if scheme is not None and not is_systematic(scheme.rules) and policy.name != "coded":
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


def objections(scheme: Scheme | None, workers: int) -> dict[str, str]:
    """Return for each policy what keeps a service with so many workers from it; "" if nothing."""
    found = {name: objection(policy, scheme) for name, policy in POLICIES.items()}
    for name in [name for name, why in found.items() if not why]:
        try:
            code_for(POLICIES[name], workers, None if scheme is None else scheme.rules)
        except ValueError as error:
            found[name] = str(error)
    return found
