"""The policies: what is done about answers that are late or missing.

A policy is a value with behaviour. It turns each event into launches, which the dispatcher sends if
the budget allows. `a | b` does both: each event goes to `a` first. To add a policy, write a
subclass of `Policy` in a file of this package, and list its value in `POLICIES`.
"""

from __future__ import annotations

from codedinvnet.scheduler.policies.auto import AUTO
from codedinvnet.scheduler.policies.coded import CODED
from codedinvnet.scheduler.policies.hedge import HEDGE
from codedinvnet.scheduler.policies.policy import Launch, Policy, Sender, Then
from codedinvnet.scheduler.policies.replicate import REPLICATE
from codedinvnet.scheduler.policies.uncoded import UNCODED

__all__ = [
    "AUTO",
    "AUTO_WITH",
    "CODED",
    "HEDGE",
    "POLICIES",
    "UNCODED",
    "WITH_HEDGE",
    "Launch",
    "Policy",
    "Sender",
    "Then",
]

POLICIES = {
    policy.name: policy for policy in (UNCODED, REPLICATE, HEDGE, CODED, CODED | HEDGE, AUTO)
}
"""What a service is started with, by name."""
AUTO_WITH = "auto+"
"""The beginning of the name of `auto` with a method at hand."""
WITH_HEDGE = "+hedge"
"""The end of the name of a method that is hedged as well."""
