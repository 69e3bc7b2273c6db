"""`python -m benchmarks drift`: what a service releases while its inputs are not those calibrated.

The held-out images that calibrated, the test images and what is made of them are answered once.
Runs replay random groups of these answers: sound inputs, then a drift, then sound inputs again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pandas import DataFrame
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, rotate

from codedinvnet.data import ImageSet, ImageSource
from codedinvnet.errors import UserError
from codedinvnet.evaluation.comparisons import Comparisons, compare
from codedinvnet.evaluation.tables import markdown
from codedinvnet.evaluation.trust import calibration_of, schemes
from codedinvnet.files import read_json
from codedinvnet.models.bundle import load_bundle
from codedinvnet.provenance import describe_commit, describe_machine
from codedinvnet.stages import evaluation_images
from codedinvnet.trust.bound import Curve
from codedinvnet.trust.calibration import DECODED, GUESSED
from codedinvnet.trust.watch import Watch

K = 10
LIMITS = (0.005, 0.01, 0.02)
IMAGES = 4000
"""Test images that are answered, sound and drifted."""
SOUND, DRIFTED, AFTER = 2000, 2500, 4000
"""Comparisons of each part of a run."""
SETTLED, BACK = 500, 2000
"""Comparisons after which a drift's answers must keep the limit, and coverage be back."""
NEAR = 0.05
"""Coverage is back when it is this close to what the threshold alone would release."""
DEGREES, NOISE = 30.0, 0.2
TWO = (3, 5)
"""The classes that are left of ten."""
OTHER = {"mnist": "fashion", "fashion": "mnist"}


def drifts(
    bundle: str, source: ImageSource, data_dir: Path | None, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and images (N, C, H, W): sound ones first, then drifted ones."""
    images, labels = source.batch(torch.arange(min(IMAGES, len(source))))
    yield "none", images
    yield "rotated by 30°", rotate(images, DEGREES, InterpolationMode.BILINEAR)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    yield "noise of 0.2", (images + 255 * NOISE * noise).round().clamp(0, 255).to(torch.uint8)
    yield "two classes only", images[(labels == TWO[0]) | (labels == TWO[1])]
    other = load_bundle(OTHER[bundle])
    yield (
        "another image set",
        evaluation_images(other, "test", data_dir).batch(torch.arange(len(images)))[0],
    )


@dataclass(frozen=True)
class Answers:
    """What groups of images were answered.

    Attributes:
        confidences: (G, k), of decoded answers.
        agrees: (G, k), whether these agree.
        wrong: (G,), answers of the extra task alone that disagree.
    """

    confidences: np.ndarray
    agrees: np.ndarray
    wrong: np.ndarray

    @classmethod
    def of(cls, compared: Comparisons) -> Answers:
        """Take them from comparisons."""
        confidences, agrees = compared.kinds()[DECODED]
        wrong = np.zeros(len(agrees), int)
        if compared.guessed is not None:
            wrong = (compared.guessed.labels != compared.direct).sum(1)
        return cls(confidences, agrees, wrong)

    def disagreement(self, threshold: float) -> float:
        """Return the share of the answers of at least this confidence that disagree."""
        wrong = ~self.agrees[self.confidences >= threshold]
        return round(float(wrong.mean()), 5) if wrong.size else 0.0


def play(
    watch: Watch,
    answered: Answers,
    thresholds: tuple[float, float],
    expected: float,
    count: int,
    random: np.random.Generator,
) -> np.ndarray:
    """Compare one member of each of some random groups.

    Args:
        watch: the watch that is given every comparison.
        answered: the answers of all groups, of which some are drawn.
        thresholds: the least confidences at which the calibration lets an answer be released, by
            the limit and strictly.
        expected: how many of a group's guesses disagree on average in the calibration.
        count: the number of groups that are drawn.
        random: the generator that draws groups and members.

    Returns:
        Three numbers for each group, (count, 3): how many answers were released, how many of these
        disagree, and how many the threshold alone would release.
    """
    groups = random.integers(len(answered.wrong), size=count)
    places = random.integers(K, size=count)
    reached = [answered.confidences >= threshold for threshold in thresholds]
    counts = [of.sum(1) for of in reached]
    disagree = [(of & ~answered.agrees).sum(1) for of in reached]
    found = np.zeros((count, 3))
    for number, (group, place) in enumerate(zip(groups.tolist(), places.tolist(), strict=True)):
        if watch.releasing:
            found[number, :2] = counts[watch.strict][group], disagree[watch.strict][group]
        found[number, 2] = counts[0][group]
        watch.guessed(int(answered.wrong[group]), expected)
        plain, sure = (bool(of[group, place]) for of in reached)
        watch.compared(plain, bool(answered.agrees[group, place]), sure)
    return found


def one_run(
    limit: float, curves: Mapping[str, Curve], sound: Answers, drifted: Answers, seed: int
) -> tuple[int, float, bool, float, float]:
    """Return what was released in a run.

    Args:
        limit: the largest share of released answers that may disagree.
        curves: the curves of decoded answers and of guesses.
        sound: answers to inputs like those of the calibration.
        drifted: answers to inputs that have drifted.
        seed: the seed of the random groups.

    Returns:
        The groups of the drift until nothing was released, or all; the share of the answers
        released after `SETTLED` of them that disagree; whether coverage was back after `BACK`
        sound ones; and of what the threshold would have released, the shares that were released
        before the drift and after `SETTLED` groups of it.
    """
    random = np.random.default_rng(seed)
    watch, curve = Watch(limit), curves[DECODED]
    thresholds = curve.threshold(limit), curve.strict_threshold(limit)
    expected = K * curves[GUESSED].disagreement
    before = play(watch, sound, thresholds, expected, SOUND, random).sum(0)
    during = play(watch, drifted, thresholds, expected, DRIFTED, random)
    after = play(watch, sound, thresholds, expected, AFTER, random)[BACK:].sum(0)
    stopped = np.flatnonzero((during[:, 0] == 0) & (during[:, 2] > 0))
    released, wrong, could = during[SETTLED:].sum(0)
    return (
        int(stopped[0]) if stopped.size else DRIFTED,
        float(wrong / released) if released else 0.0,
        bool(after[0] >= (1 - NEAR) * after[2]),
        float(before[0] / max(before[2], 1)),
        float(released / max(could, 1)),
    )


def run(bundles: Sequence[str], data_dir: Path | None, *, runs: int, seed: int) -> dict[str, Any]:
    """Return a row for each bundle, method, limit and drift.

    Raises:
        UserError: if there is no other image set for a bundle.
    """
    if unknown := [name for name in bundles if name not in OTHER]:
        raise UserError(f"bundle: {unknown[0]!r} is not one of {', '.join(OTHER)}")
    torch.set_num_threads(1)
    rows = [row for name in bundles for row in _rows(name, data_dir, runs, seed)]
    return {
        "command": "python -m benchmarks drift --data-dir data --json",
        "rows": rows,
        "commit": describe_commit(),
        "machine": describe_machine(),
    }


def _rows(name: str, data_dir: Path | None, runs: int, seed: int) -> Iterator[dict[str, Any]]:
    bundle = load_bundle(name)
    source = evaluation_images(bundle, "test", data_dir)
    sets = dict(drifts(name, source, data_dir, seed))
    for method, k, scheme in schemes(bundle, (K,)):
        stored = calibration_of(bundle.folder, bundle.digest(), method, k)
        curves = {answer: stored.curve(method, k, answer) for answer in (DECODED, GUESSED)}
        known = {answer: curve for answer, curve in curves.items() if curve is not None}
        answers = {}
        for drift, images in sets.items():
            own = ImageSet(name, source.classes, images, torch.zeros(len(images)).long(), drift)
            answers[drift] = Answers.of(compare(scheme, own, k=k, seed=seed))
        for limit in LIMITS:
            for drift in list(sets)[1:]:
                told = [
                    one_run(limit, known, answers["none"], answers[drift], seed + i)
                    for i in range(runs)
                ]
                stops, shares, backs, before, during = zip(*told, strict=True)
                threshold = known[DECODED].threshold(limit)
                yield {
                    "bundle": name,
                    "method": method,
                    "k": k,
                    "limit": limit,
                    "drift": drift,
                    "runs": runs,
                    "sound_disagreement": answers["none"].disagreement(threshold),
                    "unwatched_disagreement": answers[drift].disagreement(threshold),
                    "released_comparisons_median": int(np.median(stops)),
                    "kept_after_500": sum(share <= limit for share in shares),
                    "disagreement_after_500_most": round(max(shares), 5),
                    "back_after_2000": sum(backs),
                    "released_before": round(float(np.mean(before)), 4),
                    "released_after_500": round(float(np.mean(during)), 4),
                }


def table(path: Path) -> str:
    """Return the rows for a reader, as Markdown; shares are in %."""

    def percent(share: float) -> str:
        return f"{100 * share:.2f}"

    lines = [
        {
            "bundle, method": f"{row['bundle']}, {row['method']}",
            "limit": f"{100 * row['limit']:g}",
            "drift": row["drift"],
            "disagree without drift": percent(row["sound_disagreement"]),
            "with it, unwatched": percent(row["unwatched_disagreement"]),
            "stopped after": row["released_comparisons_median"],
            "most after 500": percent(row["disagreement_after_500_most"]),
            "runs that kept the limit": f"{row['kept_after_500']} of {row['runs']}",
            "released then": f"{100 * row['released_after_500']:.0f}",
            "coverage back": f"{row['back_after_2000']} of {row['runs']}",
        }
        for row in read_json(path)["rows"]
    ]
    return markdown(DataFrame(lines))
