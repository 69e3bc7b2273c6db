"""What systematic codes over a classifier's logits share: uncoded, replication, parity tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from codedinvnet.devices import first_tensor
from codedinvnet.methods.base import check_k


class Systematic(ABC):
    """A code whose data task i sends the logits of member i, whatever the group.

    Args:
        classifier: maps images (B, C, H, W) to logits (B, classes); in evaluation mode.
        k: the most queries in a group.
        more: other modules that a worker holds.

    Raises:
        UserError: if k is below 2.
    """

    name: str
    r: int = 1
    fixed_size = False
    guesses = False

    def __init__(self, classifier: nn.Module, k: int, *more: nn.Module) -> None:
        check_k(k)
        self.classifier, self.k = classifier, k
        self.device = first_tensor(classifier).device
        self.parameters = sum(p.numel() for m in (classifier, *more) for p in m.parameters())
        self.encode_seconds = 0.0

    @abstractmethod
    def extra_tasks(self, size: int) -> Mapping[int, tuple[int, ...]]:
        """Return the tasks that are not members' own, and what they need."""

    @abstractmethod
    def recovered(self, available: frozenset[int], size: int) -> frozenset[int]:
        """Return the missing members that the outputs of these tasks determine."""

    @abstractmethod
    def compute_extra(self, task: int, queries: Tensor) -> Tensor:
        """Do an extra task on queries (B, members, C, H, W) that lie on the device."""

    @abstractmethod
    def decode_missing(self, member: int, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        """Return logits (B, classes) of a missing member that is determined."""

    def tasks(self, size: int) -> Mapping[int, tuple[int, ...]]:
        """Return one task a member, and the code's own behind them."""
        least = self.k if self.fixed_size else 1
        if not least <= size <= self.k:
            served = f"{self.k}" if self.fixed_size else f"1 to {self.k}"
            raise ValueError(f"a group of {self.name} has {served} members, got {size}")
        return {**{i: (i,) for i in range(size)}, **self.extra_tasks(size)}

    def recoverable(self, available: frozenset[int], size: int) -> frozenset[int]:
        """Return the members that answered, and those that the code makes up for."""
        here = frozenset(i for i in range(size) if i in available)
        return here | self.recovered(available, size)

    @torch.inference_mode()
    def compute(self, task: int, queries: Tensor) -> Tensor:
        """Classify one member (B, 1, C, H, W), or do one of the code's own tasks."""
        queries = queries.to(self.device)
        if task < self.k:
            logits: Tensor = self.classifier(queries[:, 0])
            return logits
        return self.compute_extra(task, queries)

    def direct(self, output: Tensor) -> Tensor | None:
        """Return the output: it is the logits."""
        return output

    @torch.inference_mode()
    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Answer the members whose logits are here, and the missing ones that are determined."""
        found = self.recoverable(frozenset(outputs), size)
        return {
            i: outputs[i] if i in outputs else self.decode_missing(i, outputs, size)
            for i in sorted(found)
        }

    @torch.inference_mode()
    def residual(self, outputs: Mapping[int, Tensor], size: int) -> Tensor | None:
        """Return the largest root mean square, (B,), between direct and decoded logits.

        Every member is decoded as if it alone were missing.
        """
        if any(task not in outputs for task in self.tasks(size)):
            return None
        distances = []
        for i in range(size):
            rest = {task: output for task, output in outputs.items() if task != i}
            if i in self.recovered(frozenset(rest), size):
                difference = self.decode_missing(i, rest, size) - outputs[i]
                distances.append(difference.square().mean(dim=1).sqrt())
        return torch.stack(distances).amax(dim=0) if distances else None


class Uncoded(Systematic):
    """No code: a missing prediction is missing."""

    name = "none"
    r = 0

    def extra_tasks(self, size: int) -> Mapping[int, tuple[int, ...]]:
        return {}

    def recovered(self, available: frozenset[int], size: int) -> frozenset[int]:
        return frozenset()

    def compute_extra(self, task: int, queries: Tensor) -> Tensor:
        raise ValueError(f"{self.name} has no task {task}")

    def decode_missing(self, member: int, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        raise ValueError(f"{self.name} cannot make up for member {member}")


class Replication(Systematic):
    """Every query on two workers, the first answer wins: as many extra tasks as members.

    Dean & Barroso, "The Tail at Scale", CACM 2013, on requests that are hedged at once.
    Task k + i is the copy of task i.
    """

    name = "replication"

    def __init__(self, classifier: nn.Module, k: int) -> None:
        super().__init__(classifier, k)
        self.r = k

    def extra_tasks(self, size: int) -> Mapping[int, tuple[int, ...]]:
        return {self.k + i: (i,) for i in range(size)}

    def recovered(self, available: frozenset[int], size: int) -> frozenset[int]:
        return frozenset(i for i in range(size) if self.k + i in available)

    def compute_extra(self, task: int, queries: Tensor) -> Tensor:
        logits: Tensor = self.classifier(queries[:, 0])
        return logits

    def decode_missing(self, member: int, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        return outputs[self.k + member]


class OneParity(Systematic):
    """One parity task, k, over all members, which makes up for one missing member."""

    def extra_tasks(self, size: int) -> Mapping[int, tuple[int, ...]]:
        return {self.k: tuple(range(size))}

    def recovered(self, available: frozenset[int], size: int) -> frozenset[int]:
        missing = [i for i in range(size) if i not in available]
        alone = len(missing) == 1 and self.k in available
        return frozenset(missing) if alone else frozenset()
