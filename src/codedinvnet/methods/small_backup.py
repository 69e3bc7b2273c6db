"""The small backup: a plain classifier of 1/k the cost that answers for everybody."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from codedinvnet.methods.systematic import Systematic


class SmallBackup(Systematic):
    """The cheap rival of a code: no code, but a small classifier on the extra worker.

    It was distilled from the served one (Hinton et al., 2015, section 2) and costs about 1/k of it
    for each query, so that the extra worker does as much as the others. Task k sends its logits of
    all members, and makes up for any number of missing ones.

    Args:
        classifier: the served one, images (B, C, H, W) to logits (B, classes).
        backup: the small one.
        k: the most queries in a group.

    Raises:
        UserError: if k is below 2.
    """

    name = "small-backup"

    def __init__(self, classifier: nn.Module, backup: nn.Module, k: int) -> None:
        super().__init__(classifier, k, backup)
        self.backup = backup

    def extra_tasks(self, size: int) -> Mapping[int, tuple[int, ...]]:
        return {self.k: tuple(range(size))}

    def recovered(self, available: frozenset[int], size: int) -> frozenset[int]:
        missing = frozenset(i for i in range(size) if i not in available)
        return missing if self.k in available else frozenset()

    def compute_extra(self, task: int, queries: Tensor) -> Tensor:
        logits: Tensor = self.backup(queries.flatten(0, 1))
        return logits.view(queries.shape[0], -1)

    def decode_missing(self, member: int, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        logits: Tensor = outputs[self.k].unflatten(1, (size, -1))
        return logits[:, member]
