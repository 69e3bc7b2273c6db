"""The methods of a protection, measured: their answers, what they cost, and how they are served."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from codedinvnet.codes.base import Scheme
from codedinvnet.models import OpenModel
from codedinvnet.models.scores import ScoresOf
from codedinvnet.protect import codes, costs
from codedinvnet.protect.coding import decoded_logits
from codedinvnet.protect.distil import student_scores
from codedinvnet.protect.folder import CODE, EVIDENCE, OWN
from codedinvnet.protect.frozen import FrozenCode, FrozenCoder, encoder_macs
from codedinvnet.protect.measure import Answers, Candidate, answers_of
from codedinvnet.protect.setting import ProtectOptions, Setting
from codedinvnet.protect.students import Student, tensors
from codedinvnet.protect.teacher import BATCH, scores_of
from codedinvnet.trust.confidence import log_probabilities

Scores = Callable[[np.ndarray], np.ndarray]
"""Rows of the inputs -> scores."""


class Measured:
    """Measures methods on the inputs that nothing was trained on.

    Args:
        options: the options of the command.
        setting: the model and its inputs.
    """

    def __init__(self, options: ProtectOptions, setting: Setting) -> None:
        self.options, self.setting = options, setting
        self.parts: dict[str, Any] = {}
        """What each part costs, as JSON has it."""

    def student(self, name: str, student: Student, exported: OpenModel | None) -> Candidate:
        """Measure a small backup, as ONNX Runtime computes it if it was exported."""
        macs = costs.student_macs(student)
        if exported is not None:
            return self._model(name, exported, macs)
        inputs = tensors(student.shape, self._group())

        def call() -> torch.Tensor:
            with torch.inference_mode():
                found: torch.Tensor = student(*inputs)
            return found

        def scores(rows: np.ndarray) -> np.ndarray:
            return student_scores(student, self.setting.inputs, rows)

        return self._backup(name, call, macs, scores, "logits")

    def own(self, other: OpenModel) -> Candidate:
        """Measure the user's own smaller model."""
        macs = costs.model_macs(other, self.setting.inputs.batch(np.arange(1)))
        return self._model(OWN, other, macs)

    def _model(self, name: str, other: OpenModel, macs: int | None) -> Candidate:
        setting, group = self.setting, self._group()
        assert other.signature.scores is not None

        def scores(rows: np.ndarray) -> np.ndarray:
            batches = np.split(rows, range(BATCH, len(rows), BATCH))
            return np.concatenate([scores_of(other, setting.inputs.batch(b)) for b in batches])

        kind = other.signature.scores.kind
        return self._backup(name, lambda: other.run(group), macs, scores, kind)

    def untrained(self, scheme: Scheme) -> Candidate:
        """Measure a code that needs no training."""
        setting, k = self.setting, self.options.k
        outputs = {task: self._zeros(1) for task in list(scheme.rules.tasks(k))[1:]}
        self._timed_code(scheme.name, scheme, outputs)
        found = []
        for number, rows in enumerate(self._tested()):
            seed = self.options.seed + number
            those, scores, groups = codes.decoded(scheme, setting.inputs, rows, seed)
            logs = log_probabilities(scores, setting.kind)
            found.append(answers_of(logs, those, setting.answers, setting.inputs.labels, groups))
        calibration, test = found
        return Candidate(scheme.name, 1 / k, calibration, test, k)

    def coded(self, coder: FrozenCoder) -> Iterator[Candidate]:
        """Measure the code around the frozen model, by all it has and by each evidence alone."""
        setting, k = self.setting, self.options.k
        served, code = ScoresOf(setting.model), FrozenCode(coder, k)
        outputs: dict[int, torch.Tensor] = {task: self._zeros(1) for task in range(1, k)}
        macs = encoder_macs(coder, k)
        assert setting.macs is not None
        scheme = Scheme(CODE, code, {"served": served}, setting.model.signature.inputs[0].shape)
        (array,) = self._group().values()
        queries = torch.from_numpy(array)[None]
        outputs[k] = scheme.compute(k, queries).output
        self._timed_code(CODE, scheme, outputs, macs)
        levels = coder.level(torch.from_numpy(setting.scores))
        for name, evidence in EVIDENCE.items():
            found = []
            for number, rows in enumerate(self._tested()):
                order = np.random.default_rng(self.options.seed + number).permutation(rows)
                order = order[: len(order) // k * k]
                logits = decoded_logits(coder, served, setting.inputs, order, levels, k, evidence)
                groups = np.repeat(np.arange(len(order) // k), k)
                found.append(self._answers(logits, order, "logits", groups))
            calibration, test = found
            yield Candidate(name, (1 + macs / setting.macs) / k, calibration, test, k)

    def _tested(self) -> tuple[np.ndarray, np.ndarray]:
        return self.setting.rows.calibration, self.setting.rows.test

    def _group(self) -> dict[str, np.ndarray]:
        return self.setting.inputs.batch(np.arange(self.options.k))

    def _zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count, self.setting.scores.shape[1])

    def _answers(
        self, scores: np.ndarray, rows: np.ndarray, kind: str, groups: np.ndarray | None = None
    ) -> Answers:
        setting = self.setting
        logs = log_probabilities(scores, kind)
        return answers_of(logs, rows, setting.answers, setting.inputs.labels, groups)

    def _timed_code(
        self,
        name: str,
        scheme: Scheme,
        outputs: dict[int, torch.Tensor],
        macs: int | None = None,
    ) -> None:
        """Time a code's encoding and its decoding of a group whose first member is missing."""
        k = self.options.k
        (array,) = self._group().values()
        queries = torch.from_numpy(array)[None]

        def encode() -> object:
            with torch.inference_mode():
                return scheme.code.encode(k, queries)

        encoding, decoding = f"{name}: encode a query", f"{name}: decode a group"
        times = costs.milliseconds({encoding: encode, decoding: lambda: scheme.decode(outputs, k)})
        self.parts[encoding] = {"ms": times[encoding], **({"macs": macs} if macs else {})}
        self.parts[decoding] = {"ms": times[decoding]}

    def _backup(
        self, name: str, call: Callable[[], Any], macs: int | None, scores: Scores, kind: str
    ) -> Candidate:
        """Measure what answers for members by itself.

        Args:
            name: the name of the method's row.
            call: answers a group of k.
            macs: its multiply-adds for a query; None if they cannot be counted.
            scores: its answers.
            kind: the kind of its scores, "logits" or "probabilities".
        """
        setting, k = self.setting, self.options.k
        one = setting.inputs.batch(np.arange(1))
        label = f"{name}: a group of {k}"
        times = costs.milliseconds({"model": lambda: setting.model.run(one), label: call})
        self.parts.setdefault("the model: a query", {"ms": times["model"], "macs": setting.macs})
        self.parts[label] = {"ms": times[label], "macs": None if macs is None else macs * k}
        if macs is not None and setting.macs is not None:
            work = macs / setting.macs
        else:
            work = times[label].median / k / self.parts["the model: a query"]["ms"].median
        calibration, test = (self._answers(scores(r), r, kind) for r in self._tested())
        return Candidate(name, work, calibration, test, k, *_workers(name, work, k))


def _workers(name: str, work: float, k: int) -> tuple[int, str]:
    """Return how many backup workers a group of k needs, and what a reader must know of that."""
    if work * k <= 1.001:
        return 1, ""
    count = min(k, math.ceil(work * k - 1e-9))
    return count, f"{name} costs more than 1/{k} of the model: it needs {count} backup workers"
