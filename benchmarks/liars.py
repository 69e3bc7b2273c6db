"""`python -m benchmarks liars`: how soon a worker that answers wrongly is named.

Groups of test images are answered as the service answers them; roles are drawn anew for every
group, and one worker has a fault. Its own answers change; the code's side features do not come from
the served model, so that the extra task's answers stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pandas import DataFrame
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.codes.registry import OURS
from codedinvnet.codes.rules import SERVED
from codedinvnet.data import ImageSource
from codedinvnet.errors import UserError
from codedinvnet.evaluation.erase import (
    answer_kinds,
    direct_answers,
    erase,
    task_outputs,
)
from codedinvnet.evaluation.tables import markdown
from codedinvnet.files import read_json
from codedinvnet.models.bundle import Bundle, load_bundle
from codedinvnet.protect.byzantine import ByzantineDetector, Member
from codedinvnet.protect.calibration import GUESSED, load_calibration
from codedinvnet.provenance import describe_commit, describe_machine
from codedinvnet.stages import evaluation_images

K = 10
WORKERS = (11, 12)
CHANGED = 0.1
"""The share of labels that the noise changes, and that a flipped bit changes at least."""
GLANCE = 20
"""Images by which most flipped bits, which change next to nothing, are passed over."""
PROBE = 200
"""Images on which that is measured of a flipped bit."""
CHUNK = 50
"""Answers of the liar that are computed at a time."""
MOST_ANSWERS = 2_000
"""Answers of the liar after which a run is given up."""
EXPONENT = range(23, 31)
"""The bits of a float's exponent."""

Labels = Callable[[np.ndarray], np.ndarray]
"""Rows of images -> the labels that a faulty worker has for them."""


@dataclass(frozen=True)
class Setting:
    """What runs are made of.

    Attributes:
        scheme: the bundle's code.
        source: the test images.
        outputs: (N, n), of the images' own tasks.
        members: (G, k), rows of the images in groups.
        direct: (G, k), their own answers.
        guessed: (G, k), the answers of the extra task alone.
        expected: (G, k), the calibrated probability that these disagree.
    """

    scheme: Scheme
    source: ImageSource
    outputs: Tensor
    members: np.ndarray
    direct: np.ndarray
    guessed: np.ndarray
    expected: np.ndarray

    def labels(self, outputs: Tensor) -> np.ndarray:
        """Return the labels of outputs (B, n)."""
        return direct_answers(self.scheme, outputs).argmax(1).numpy()


def setting(bundle: Bundle, source: ImageSource, seed: int) -> Setting:
    """Compute what all runs share.

    Raises:
        UserError: if the bundle has no calibration, or its code has no guesses.
    """
    scheme = scheme_for(bundle, K)
    curve = load_calibration(bundle.folder, bundle.digest()).curve(OURS, K, GUESSED)
    outputs = task_outputs(scheme, source)
    lost = tuple(range(K))
    frame = erase(scheme, source, [lost], k=K, groupings=4, seed=seed, own=outputs)
    found = answer_kinds(frame, K).get(GUESSED)
    if curve is None or found is None:
        raise UserError(f"bundle {bundle.info.name!r}: its extra task cannot answer alone")
    names = ("query", "direct", "prediction", "confidence")
    members, direct, guessed, sure = (found[n].to_numpy().reshape(-1, K) for n in names)
    expected = 1 - curve.probability(sure.astype(float))
    return Setting(scheme, source, outputs, members, direct, guessed, expected)


def flipped(at: Setting, random: np.random.Generator) -> Labels:
    """Return the labels after a bit of an exponent has been flipped in one of f's weights.

    Bits are drawn until one changes enough labels, and leaves numbers: the service takes what is
    none for a failure.
    """
    weights = [p for p in at.scheme.models[SERVED].parameters() if p.ndim > 1]
    sizes = np.array([weight.numel() for weight in weights])
    probe = random.choice(len(at.source), PROBE, replace=False)
    sound = at.labels(at.outputs[torch.from_numpy(probe)])
    while True:
        weight = weights[random.choice(len(weights), p=sizes / sizes.sum())]
        place = np.unravel_index(random.integers(weight.numel()), weight.shape)
        bit = int(random.choice(EXPONENT))

        def labels(
            rows: np.ndarray, weight: Tensor = weight, place: Any = place, bit: int = bit
        ) -> np.ndarray:
            values = weight.detach()
            kept = values[place].clone()
            values.view(torch.int32)[place] ^= 1 << bit
            try:
                parts = []
                for some in torch.from_numpy(rows).split(250):
                    images, _ = at.source.batch(some)
                    parts.append(at.scheme.compute(0, images[:, None]).output)
                outputs = torch.cat(parts)
            finally:
                values[place] = kept
            found = at.labels(outputs)
            return np.where(outputs.isfinite().all(1).numpy(), found, -1)

        if not (labels(probe[:GLANCE]) != sound[:GLANCE]).any():
            continue
        changed = labels(probe)
        if (changed >= 0).all() and (changed != sound).mean() >= CHANGED:
            return labels


def noisy(at: Setting, random: np.random.Generator) -> Labels:
    """Return the labels with as much noise on the outputs as changes a tenth of them."""
    probe = at.outputs[:1000]
    noise = torch.from_numpy(random.standard_normal(tuple(probe.shape))).float()
    sound, low, high = at.labels(probe), 0.0, 100.0 * float(probe.std())
    for _ in range(20):
        scale = (low + high) / 2
        share = (at.labels(probe + scale * noise) != sound).mean()
        low, high = (scale, high) if share < CHANGED else (low, scale)

    def labels(rows: np.ndarray) -> np.ndarray:
        outputs = at.outputs[torch.from_numpy(rows)]
        drawn = torch.from_numpy(random.standard_normal(tuple(outputs.shape))).float()
        return at.labels(outputs + high * drawn)

    return labels


def permuted(at: Setting, random: np.random.Generator) -> Labels:
    """Return the labels after every class has got another's name."""
    classes = len(at.source.classes)
    cycle = random.permutation(classes)
    names = np.empty(classes, int)
    names[cycle] = np.roll(cycle, 1)
    return lambda rows: names[at.labels(at.outputs[torch.from_numpy(rows)])]


def zeroed(at: Setting, random: np.random.Generator) -> Labels:
    """Return the labels of a worker whose last layer sends zeros."""
    return lambda rows: at.labels(torch.zeros_like(at.outputs[torch.from_numpy(rows)]))


FAULTS = {
    "flipped exponent bit": flipped,
    "noise changes 10 % of labels": noisy,
    "labels permuted": permuted,
    "last layer zeroed": zeroed,
}


def roles(
    at: Setting, workers: int, random: np.random.Generator, count: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield random groups, and their tasks' workers: the last one's is the extra task."""
    for group in random.integers(len(at.members), size=count):
        yield int(group), random.permutation(workers)[: K + 1]


def until_named(at: Setting, workers: int, fault: str, seed: int) -> tuple[int, int | None]:
    """Return the liar's answers until somebody was named, and by how much it was another."""
    random = np.random.default_rng(seed)
    liar = int(random.integers(workers))
    faulty = FAULTS[fault](at, random)
    drawn = list(roles(at, workers, random, MOST_ANSWERS * workers // (K + 1)))
    places = [np.flatnonzero(who[:K] == liar) for _, who in drawn]
    rows = [at.members[g, p[0]] for (g, _), p in zip(drawn, places, strict=True) if p.size]
    parts = (faulty(np.array(rows[i : i + CHUNK])) for i in range(0, len(rows), CHUNK))
    wrong = (int(label) for part in parts for label in part)
    tests, answers = ByzantineDetector(workers), 0
    for (group, who), place in zip(drawn, places, strict=True):
        direct = at.direct[group].copy()
        if place.size:
            direct[place[0]] = next(wrong)
        answers += bool((who == liar).any())
        agrees = at.guessed[group] == direct
        found = tests.seen(members_of(who, at.expected[group], agrees), int(who[K]))
        if found is not None:
            return answers, found - liar
    return answers, None


def members_of(who: np.ndarray, expected: np.ndarray, agrees: np.ndarray) -> list[Member]:
    """Return a group's members as the tests take them."""
    columns = (who[:K].tolist(), expected.tolist(), agrees.tolist())
    return [Member(*row) for row in zip(*columns, strict=True)]


def false_alarms(at: Setting, workers: int, seed: int, clean: int) -> tuple[int, float]:
    """Return how often a sound worker was named in so many answers, and microseconds a query."""
    random = np.random.default_rng(seed)
    agrees = at.guessed == at.direct
    tests, alarms, seconds = ByzantineDetector(workers), 0, 0.0
    for group, who in roles(at, workers, random, clean // K):
        members = members_of(who, at.expected[group], agrees[group])
        began = time.process_time()
        alarms += tests.seen(members, int(who[K])) is not None
        seconds += time.process_time() - began
    return alarms, 1e6 * seconds / clean


def run(
    bundles: Sequence[str], data_dir: Path | None, *, runs: int, clean: int, seed: int
) -> dict[str, Any]:
    """Return a row for each bundle, number of workers and fault."""
    torch.set_num_threads(1)
    rows = []
    for name in bundles:
        bundle = load_bundle(name)
        at = setting(bundle, evaluation_images(bundle, "test", data_dir), seed)
        rows += list(_rows(name, at, runs, clean, seed))
    return {
        "command": "python -m benchmarks liars --data-dir data --json",
        "rows": rows,
        "commit": describe_commit(),
        "machine": describe_machine(),
    }


def _rows(name: str, at: Setting, runs: int, clean: int, seed: int) -> Iterator[dict[str, Any]]:
    for workers in WORKERS:
        alarms, cost = false_alarms(at, workers, seed, clean)
        for fault in FAULTS:
            found = [until_named(at, workers, fault, seed + i) for i in range(runs)]
            right = sorted(answers for answers, off in found if off == 0)
            yield {
                "bundle": name,
                "workers": workers,
                "k": K,
                "runs": runs,
                "fault": fault,
                "named": len(right),
                "another_named": sum(off not in (0, None) for _, off in found),
                "answers_median": right[len(right) // 2] if right else None,
                "answers_most": right[-1] if right else None,
                "named_within_500": sum(answers <= 500 for answers in right),
                "named_within_1000": sum(answers <= 1000 for answers in right),
                "false_alarms": alarms,
                "clean_answers": clean,
                "microseconds_per_query": round(cost, 1),
            }


def table(path: Path) -> str:
    """Return the rows for a reader, as Markdown."""
    rows = DataFrame(read_json(path)["rows"])
    text = rows.astype(str)
    return markdown(
        DataFrame(
            {
                "bundle, workers": text["bundle"] + ", " + text["workers"],
                "fault": rows["fault"],
                "named": text["named"] + " of " + text["runs"],
                "answers until then, median": rows["answers_median"],
                "at most": rows["answers_most"],
                "within 500": rows["named_within_500"],
                "within 1,000": rows["named_within_1000"],
                "another named": rows["another_named"],
                "false alarms": text["false_alarms"]
                + " in "
                + rows["clean_answers"].map("{:,}".format),
                "µs a query": rows["microseconds_per_query"],
            }
        )
    )
