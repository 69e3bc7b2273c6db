"""`python -m benchmarks drift`: what a service releases while its inputs are not those calibrated.

The test images and what is made of them are answered once. Runs replay random groups of these
answers: sound inputs, then a drift, then sound inputs again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from codedinvnet.evaluation.tables import markdown
from codedinvnet.evaluation.trust import approximate, by_group, calibration_of, schemes
from codedinvnet.files import read_json
from codedinvnet.models.bundle import load_bundle
from codedinvnet.protect.calibration import DECODED, GUESSED
from codedinvnet.protect.watch import Watch
from codedinvnet.provenance import describe_commit, describe_machine
from codedinvnet.stages import evaluation_images

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
OTHER = {"mnist": "fashion", "fashion": "mnist"}


def drifts(
    bundle: str, source: ImageSource, data_dir: Path | None, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and images (N, C, H, W): sound ones first, then drifted ones."""
    images, labels = source.batch(torch.arange(min(IMAGES, len(source))))
    yield "none", images
    yield "rotated by 30°", rotate(images, 30.0, InterpolationMode.BILINEAR)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    yield "noise of 0.2", (images + 255 * 0.2 * noise).round().clamp(0, 255).to(torch.uint8)
    yield "two classes only", images[(labels == 3) | (labels == 5)]
    other = evaluation_images(load_bundle(OTHER[bundle]), "test", data_dir)
    yield "another image set", other.batch(torch.arange(len(images)))[0]


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
        answered: the answers of all groups.
        thresholds: the least confidences at which the calibration lets an answer be released, by
            the limit and strictly.
        expected: how many of a group's guesses disagree on average in the calibration.
        count: the number of groups that are drawn.
        random: the generator that draws groups and members.

    Returns:
        For each group (count, 3): how many answers were released, how many of these disagree, and
        how many the threshold alone would release.
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


def run(bundles: Sequence[str], data_dir: Path | None, *, runs: int, seed: int) -> dict[str, Any]:
    """Return a row for each bundle, method, limit and drift.

    Raises:
        UserError: if there is no other image set for a bundle.
    """
    if unknown := [name for name in bundles if name not in OTHER]:
        raise UserError(f"bundle: {unknown[0]!r} is not one of {', '.join(OTHER)}")
    torch.set_num_threads(1)
    return {
        "command": "python -m benchmarks drift --data-dir data --json",
        "rows": [row for name in bundles for row in _rows(name, data_dir, runs, seed)],
        "commit": describe_commit(),
        "machine": describe_machine(),
    }


def _rows(name: str, data_dir: Path | None, runs: int, seed: int) -> Iterator[dict[str, Any]]:
    bundle = load_bundle(name)
    source = evaluation_images(bundle, "test", data_dir)
    sets = dict(drifts(name, source, data_dir, seed))
    for method, k, scheme in schemes(bundle, (K,)):
        stored = calibration_of(bundle.folder, bundle.digest(), method, k)
        decoded, guessed = (stored.curve(method, k, kind) for kind in (DECODED, GUESSED))
        assert decoded is not None
        assert guessed is not None
        expected = K * guessed.disagreement
        answers = {}
        for drift, images in sets.items():
            own = ImageSet(name, source.classes, images, torch.zeros(len(images)).long(), drift)
            kinds = approximate(scheme, own, k, seed=seed)
            wrong = (~by_group(kinds[GUESSED], k)[1]).sum(1)
            answers[drift] = Answers(*by_group(kinds[DECODED], k), wrong)
        sound = answers.pop("none")
        for limit in LIMITS:
            thresholds = decoded.threshold(limit), decoded.strict_threshold(limit)
            for drift, drifted in answers.items():
                frame = DataFrame(
                    one_run(limit, thresholds, expected, sound, drifted, seed + number)
                    for number in range(runs)
                )
                yield {
                    "bundle": name,
                    "method": method,
                    "k": k,
                    "limit": limit,
                    "drift": drift,
                    "runs": runs,
                    "sound_disagreement": sound.disagreement(thresholds[0]),
                    "unwatched_disagreement": drifted.disagreement(thresholds[0]),
                    "released_comparisons_median": int(frame["stopped"].median()),
                    "kept_after_500": int((frame["share"] <= limit).sum()),
                    "disagreement_after_500_most": round(frame["share"].max(), 5),
                    "back_after_2000": int(frame["back"].sum()),
                    "released_before": round(frame["before"].mean(), 4),
                    "released_after_500": round(frame["during"].mean(), 4),
                }


def one_run(
    limit: float,
    thresholds: tuple[float, float],
    expected: float,
    sound: Answers,
    drifted: Answers,
    seed: int,
) -> dict[str, Any]:
    """Return what was released in a run; see `play` for the arguments.

    Returns:
        `stopped`: the groups of the drift until nothing was released, or all; `share`: of the
        answers released after `SETTLED` of them, how many disagree; `back`: whether coverage was
        back after `BACK` sound ones; `before` and `during`: of what the threshold would have
        released, the shares that were released before the drift and after `SETTLED` groups of it.
    """
    random, watch = np.random.default_rng(seed), Watch(limit)
    before, during, after = (
        play(watch, of, thresholds, expected, count, random)
        for of, count in ((sound, SOUND), (drifted, DRIFTED), (sound, AFTER))
    )
    stopped = np.flatnonzero((during[:, 0] == 0) & (during[:, 2] > 0))
    released, wrong, could = during[SETTLED:].sum(0)
    whole, late = before.sum(0), after[BACK:].sum(0)
    return {
        "stopped": int(stopped[0]) if stopped.size else DRIFTED,
        "share": float(wrong / released) if released else 0.0,
        "back": bool(late[0] >= (1 - NEAR) * late[2]),
        "before": float(whole[0] / max(whole[2], 1)),
        "during": float(released / max(could, 1)),
    }


def table(path: Path) -> str:
    """Return the rows for a reader, as Markdown; shares are in %."""
    rows = DataFrame(read_json(path)["rows"])
    runs = " of " + rows["runs"].astype(str)
    percent = "{:.2f}".format
    return markdown(
        DataFrame(
            {
                "bundle, method": rows["bundle"] + ", " + rows["method"],
                "limit": (100 * rows["limit"]).map("{:g}".format),
                "drift": rows["drift"],
                "disagree without drift": (100 * rows["sound_disagreement"]).map(percent),
                "with it, unwatched": (100 * rows["unwatched_disagreement"]).map(percent),
                "stopped after": rows["released_comparisons_median"],
                "most after 500": (100 * rows["disagreement_after_500_most"]).map(percent),
                "runs that kept the limit": rows["kept_after_500"].astype(str) + runs,
                "released then": (100 * rows["released_after_500"]).map("{:.0f}".format),
                "coverage back": rows["back_after_2000"].astype(str) + runs,
            }
        )
    )
