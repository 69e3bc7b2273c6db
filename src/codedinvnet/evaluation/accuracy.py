"""Evaluation of a method: every erasure position, against labels and direct answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.invnet import CodedInvNet, own_code
from codedinvnet.codes.mean import Evidence
from codedinvnet.codes.method import given_by
from codedinvnet.codes.rules import is_systematic
from codedinvnet.data import Groups, ImageSource, random_groups
from codedinvnet.devices import whole_float32
from codedinvnet.errors import UserError
from codedinvnet.evaluation.outputs import BATCH, each_missing, group_outputs
from codedinvnet.models.bundle import Bundle
from codedinvnet.progress import Progress
from codedinvnet.provenance import describe_machine

KEPT_BYTES = 4 << 30
"""Outputs of data tasks that are kept in memory. Of more, as of many large images, none is, and
each is computed again wherever it is needed."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; accuracies in 0..1.

    Attributes:
        images: how many images; each is erased once in each grouping.
        k: data queries in a group.
        groupings: how many random groupings were averaged.
        normal_accuracy: the accuracy of g(f(x)).
        recovered_accuracy: of decoded answers against the labels, mean over erasure positions.
        position_accuracies: recovered accuracy by erased position.
        agreement: share of decoded answers equal to the direct one.
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
    source: ImageSource,
    *,
    k: int,
    groupings: int = 5,
    seed: int = 0,
    shuffle_parity: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Erase every member of every group in turn and decode it.

    Args:
        scheme: the scheme of a systematic code that serves groups of k.
        source: the images.
        k: the group size.
        groupings: how many random groupings.
        seed: the seed of the random groupings.
        shuffle_parity: decode each group with the whole parity output of another, as a check
            that the parity matters.
        progress: show a progress bar.

    Raises:
        UserError: if the images are too few for a group or the shuffling of parities, if groupings
            is below 1, or if the method does not serve groups of k, has no direct answers, or
            cannot decode a member.
    """
    if groupings < 1:
        raise UserError(f"groupings must be at least 1, got {groupings}")
    if shuffle_parity and len(source) < 2 * k:
        raise UserError(f"shuffling parities needs two groups: {2 * k} images, got {len(source)}")
    rules = scheme.rules
    if k > rules.k or (rules.fixed_size and k != rules.k):
        served = f"of {rules.k} only" if rules.fixed_size else f"of up to {rules.k}"
        raise UserError(f"{scheme.name} serves groups {served}, got k = {k}")
    if not is_systematic(rules):
        raise UserError(f"{scheme.name} has no direct answers to compare with")
    count = len(source)
    generator = torch.Generator().manual_seed(seed)
    drawn = [random_groups(count, k, generator) for _ in range(groupings)]
    per_batch = max(1, BATCH // k)
    batches = sum(-(-len(g.members) // per_batch) for g in drawn)
    with (
        whole_float32(),
        Progress(
            total=-(-count // BATCH) + batches,
            desc=f"evaluate k={k}",
            unit="batch",
            dynamic_ncols=True,
            disable=not progress,
        ) as bar,
    ):
        kept, answers, labels = [], [], []
        for rows in torch.arange(count).split(BATCH):
            images, truth = source.batch(rows)
            outputs = scheme.compute(0, images[:, None]).output
            logits = scheme.direct(outputs)
            assert logits is not None
            answers.append(logits.argmax(1).cpu())
            labels.append(truth)
            if count * outputs[0].nbytes <= KEPT_BYTES:
                kept.append(outputs.cpu())
            bar.update()
        data_outputs = torch.cat(kept) if kept else None
        direct, truth = torch.cat(answers), torch.cat(labels)
        hits, agrees, masks = [], [], []
        for groups in drawn:
            predictions = _decoded_predictions(
                scheme, source, data_outputs, groups, k, shuffle_parity, bar
            )
            hits.append(predictions == truth[groups.members])
            agrees.append(predictions == direct[groups.members])
            masks.append(groups.counted)
    mask = torch.cat(masks)
    hit, agree = torch.cat(hits) & mask, torch.cat(agrees) & mask
    erased = mask.sum()
    return Evaluation(
        images=count,
        k=k,
        groupings=groupings,
        normal_accuracy=float((direct == truth).float().mean()),
        recovered_accuracy=float(hit.sum() / erased),
        position_accuracies=tuple((hit.sum(0) / mask.sum(0)).tolist()),
        agreement=float(agree.sum() / erased),
    )


def _decoded_predictions(
    scheme: Scheme,
    source: ImageSource,
    data_outputs: Tensor | None,
    groups: Groups,
    k: int,
    shuffle_parity: bool,
    bar: Progress,
) -> Tensor:
    """Return the decoded class of every member when it alone is erased, (G, k)."""
    encoded = groups.members.roll(1, 0) if shuffle_parity else groups.members
    size = max(1, BATCH // k)
    found = []
    for rows, others in zip(groups.members.split(size), encoded.split(size), strict=True):
        own, places = data_outputs, rows
        if own is None:
            own = scheme.compute(0, source.batch(rows.flatten())[0][:, None]).output.cpu()
            places = torch.arange(rows.numel()).view_as(rows)
        everyone = torch.arange(len(rows))
        outputs = {
            task: output[everyone].to(scheme.device)
            for task, output in group_outputs(scheme, source, places, own, others).items()
        }
        found.append(each_missing(scheme, outputs, k).argmax(2))
        bar.update()
    return torch.cat(found)


def scheme_resting_on(evidence: Evidence, bundle: Bundle, k: int) -> Scheme:
    """Return the scheme of a bundle's own code, whose decoded answers rest on some evidence.

    Raises:
        UserError: if the bundle does not serve groups of k, or has no such evidence.
    """
    scheme = CodedInvNet().build(given_by(bundle, k))
    return replace(scheme, code=own_code(bundle.model, k, evidence))


def evaluation_report(
    bundle: Bundle,
    source: ImageSource,
    *,
    split: str,
    k: int,
    groupings: int = 5,
    seed: int = 0,
    evidence: Evidence = "both",
    pixel_mean: bool = False,
    shuffle_parity: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a bundle at one group size and return what `evaluate --json` prints.

    Raises:
        UserError: if the bundle cannot be evaluated so.
    """
    if pixel_mean and evidence == "side":
        raise UserError("the average image has no side features, so that nothing would be left")
    used = bundle.with_pixel_mean() if pixel_mean else bundle
    result = evaluate(
        scheme_resting_on(evidence, used, k),
        source,
        k=k,
        groupings=groupings,
        seed=seed,
        shuffle_parity=shuffle_parity,
        progress=progress,
    )
    arm = "pixel mean" if pixel_mean else "encoder"
    return {
        "bundle": bundle.info.name,
        "dataset": source.name,
        "split": split,
        "evidence": evidence,
        "parity": arm + (", shuffled" if shuffle_parity else ""),
        "seed": seed,
        **figures(result),
        "position_accuracies": [round(a, 6) for a in result.position_accuracies],
        "machine": describe_machine(),
    }


def figures(result: Evaluation) -> dict[str, Any]:
    """Return an evaluation's figures, rounded to what they can carry."""
    return {
        "images": result.images,
        "k": result.k,
        "groupings": result.groupings,
        "normal_accuracy": round(result.normal_accuracy, 6),
        "recovered_accuracy": round(result.recovered_accuracy, 6),
        "worst_position_accuracy": round(result.worst_position_accuracy, 6),
        "agreement": round(result.agreement, 6),
    }
