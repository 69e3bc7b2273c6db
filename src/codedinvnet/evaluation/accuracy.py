"""Evaluation of a bundle: every erasure position, against labels and direct answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.codes.erase import NO_ANSWER, Queries, erase, single_losses
from codedinvnet.codes.registry import OURS
from codedinvnet.codes.rules import is_systematic
from codedinvnet.common.errors import UserError
from codedinvnet.common.provenance import describe_machine
from codedinvnet.models.bundle import Bundle


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; accuracies in 0..1.

    Attributes:
        images: how many images; each is erased once in each grouping.
        k: data queries in a group.
        groupings: how many random groupings were averaged.
        normal_accuracy: the accuracy when nobody is missing, of direct answers if there are any.
        recovered_accuracy: of decoded answers against the labels, mean over erasure positions.
        position_accuracies: recovered accuracy by erased position; of a code without direct
            answers by erased worker, of everybody's answers.
        agreement: share of decoded answers equal to those when nobody is missing.
    """

    images: int
    k: int
    groupings: int
    normal_accuracy: float
    recovered_accuracy: float
    position_accuracies: tuple[float, ...]
    agreement: float

    @property
    def worst_position_accuracy(self) -> float:
        """The lowest recovered accuracy of all erased positions."""
        return min(self.position_accuracies)


def evaluate(
    scheme: Scheme,
    source: Queries,
    *,
    k: int,
    groupings: int = 5,
    seed: int = 0,
    shuffle_parity: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Erase every worker of every group in turn and decode what that concerns.

    Args:
        scheme: a scheme that serves groups of k.
        source: the images.
        k: the group size.
        groupings: how many random groupings.
        seed: the seed of the random groupings.
        shuffle_parity: decode each group with the whole parity output of another, as a check
            that the parity matters.
        progress: show a progress bar.

    Raises:
        UserError: if the images are too few, or the method cannot be evaluated so.
    """
    if groupings < 1:
        raise UserError(f"groupings must be at least 1, got {groupings}")
    if shuffle_parity and len(source) < 2 * k:
        raise UserError(f"shuffling parities needs two groups: {2 * k} images, got {len(source)}")
    rules = scheme.rules
    if k > rules.k or (rules.fixed_size and k != rules.k):
        served = f"of {rules.k} only" if rules.fixed_size else f"of up to {rules.k}"
        raise UserError(f"{scheme.name} serves groups {served}, got k = {k}")
    how: dict[str, Any] = {"groupings": groupings, "seed": seed, "progress": progress}
    systematic = is_systematic(rules)
    lost = single_losses(k) if systematic else [(), *((task,) for task in rules.tasks(k))]
    frame = erase(scheme, source, lost, k=k, shuffle_parity=shuffle_parity, **how)
    if not systematic:
        nobody = frame["lost"].map(len).astype(int) == 0
        whole = frame[nobody].set_index(["grouping", "query"])["prediction"]
        frame = frame[~nobody]
        frame = frame.drop(columns="direct").join(whole.rename("direct"), ["grouping", "query"])
    position = frame["lost"].map(lambda tasks: min(tasks, default=-1)).astype(int)
    answered = frame["prediction"].groupby(position).max() != NO_ANSWER
    for member in answered.index[~answered]:
        raise UserError(f"{scheme.name} cannot decode member {member} of a group of {k}")
    hit = frame["prediction"] == frame["label"]
    return Evaluation(
        images=len(source),
        k=k,
        groupings=groupings,
        normal_accuracy=float((frame["direct"] == frame["label"]).mean()),
        recovered_accuracy=float(hit.mean()),
        position_accuracies=tuple(hit.groupby(position).mean()),
        agreement=float((frame["prediction"] == frame["direct"]).mean()),
    )


def evaluation_report(
    bundle: Bundle,
    source: Queries,
    *,
    split: str,
    k: int,
    method: str = OURS,
    seed: int = 0,
    shuffle_parity: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Evaluate a bundle at one group size and return what `evaluate --json` prints."""
    scheme = scheme_for(bundle, k, method)
    result = evaluate(scheme, source, k=k, seed=seed, shuffle_parity=shuffle_parity, **how)
    found = asdict(result) | {"worst_position_accuracy": result.worst_position_accuracy}
    positions = found.pop("position_accuracies")
    return {
        "bundle": bundle.info.name,
        "dataset": getattr(source, "name", ""),
        "split": split,
        "method": scheme.name,
        "shuffled_parity": shuffle_parity,
        "seed": seed,
        **{key: round(value, 6) for key, value in found.items()},
        "position_accuracies": [round(a, 6) for a in positions],
        "machine": describe_machine(),
    }
