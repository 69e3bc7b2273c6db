"""No code, and a copy of everything: what a code is measured against."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from codedinvnet.codes.base import Scheme, ScoresCode
from codedinvnet.codes.method import Given, Method
from codedinvnet.codes.rules import CodeRules, Replicated, Uncoded
from codedinvnet.models.bundle import BundleInfo


class CopyCode(ScoresCode):
    """Task k + i, if there is one, is the copy of task i."""

    def made_up(self, member: int, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        return outputs[self.rules.k + member]


class Plain(Method):
    """No code: a missing prediction is missing."""

    name = "none"
    is_policy = True
    in_brief = False

    def rules(self, k: int, stragglers: int = 1, bundle: BundleInfo | None = None) -> CodeRules:
        return Uncoded(k)

    def build(self, given: Given) -> Scheme:
        return self.scheme(CopyCode(self.rules(given.k)), given)


class Replication(Plain):
    """Every query on two workers, the first answer wins: as many extra tasks as members.

    Dean & Barroso, "The Tail at Scale", CACM 2013, on requests that are hedged at once.
    """

    name = "replication"

    def rules(self, k: int, stragglers: int = 1, bundle: BundleInfo | None = None) -> CodeRules:
        return Replicated(k)
