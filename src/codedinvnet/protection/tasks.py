"""What a model's output means: when two answers agree, and how a student learns to give them.

A student returns an answer together with its confidence, the probability by its own account that
the served model's answer agrees. Only the order of confidences matters: `bound` calibrates them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical

from codedinvnet.common.confidence import log_probabilities
from codedinvnet.common.errors import UserError
from codedinvnet.models.probe import kind_of_scores

TEMPERATURES = (2.0, 1.5, 1.0)
"""By which scores are divided before they are compared, so that more than one class counts."""
MOST_ENTROPY = 2.0
"""Nats, on average: above it many classes look alike, and a lower temperature teaches more."""
SPREAD = (0.01, 0.99)
"""The spread of an output is the distance between these quantiles."""
COSINE = 0.9
"""Embeddings agree from this cosine on, unless the user says otherwise."""
MOST_NUMBERS = 4096
"""Numbers of an answer at most: a student has a layer as wide."""
UNIT = 1e-3
"""Embeddings are normalised if their norms differ by no more than this share."""
FLOOR = 1e-6


@dataclass(frozen=True)
class Task(ABC):
    """The meaning of an output, of `size` numbers once it is flattened.

    Answers are (N, size) in the model's own units, and students' raw outputs (N, columns).
    """

    size: int
    name: ClassVar[str]

    @property
    def columns(self) -> int:
        """The width of a student's raw output."""
        return self.size

    @classmethod
    @abstractmethod
    def of(cls, outputs: np.ndarray, kind: str, tolerance: str | None, cosine: float | None) -> Any:
        """Return the task of a model that gave these answers to the training inputs.

        Raises:
            UserError: if there is nothing to learn, or an option is missing or wrong.
        """

    @abstractmethod
    def agree(self, found: np.ndarray, served: np.ndarray) -> np.ndarray:
        """Return whether each answer agrees with the served model's, (N,)."""

    @abstractmethod
    def targets(self, outputs: np.ndarray) -> np.ndarray:
        """Return what students learn of the served model's answers, float32 (N, size)."""

    @abstractmethod
    def loss(self, raw: Tensor, wanted: Tensor) -> Tensor:
        """Return the loss of students' raw outputs on targets."""

    @abstractmethod
    def answer(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return answers (N, size) and their confidences (N,) of raw outputs."""

    def chance(self, outputs: np.ndarray, train: np.ndarray) -> np.ndarray:
        """Return whether the best constant answer to the training inputs agrees, (N,)."""
        constant = np.median(outputs[train], axis=0, keepdims=True)
        return self.agree(np.repeat(constant, len(outputs), 0), outputs)

    def report(self, found: np.ndarray, served: np.ndarray) -> dict[str, Any]:
        """Return what else a user wants to know of answers."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Return the task as plain values, as JSON has them."""
        return {"task": self.name, **asdict(self)}


@dataclass(frozen=True)
class Classify(Task):
    """Answers agree if their highest score is of the same class.

    Attributes:
        kind: whether scores are "logits" or "probabilities".
        temperature: the largest at which the classes do not look too much alike.
    """

    kind: str = "logits"
    temperature: float = 1.0
    name = "classify"

    @classmethod
    def of(
        cls, outputs: np.ndarray, kind: str, tolerance: str | None, cosine: float | None
    ) -> Classify:
        kind = kind or kind_of_scores(outputs)
        if outputs.shape[1] < 2:
            raise UserError(
                "--task classify: the output has one score for a query, and a classifier has one "
                "for each class: if it is the probability of a label, say --task labels"
            )
        answers = outputs.argmax(axis=1)
        if (answers == answers[0]).all():
            raise UserError(f"the model answers class {answers[0]} to all inputs: nothing to learn")
        logs = torch.from_numpy(log_probabilities(outputs, kind))
        for temperature in TEMPERATURES:
            if Categorical(logits=logs / temperature).entropy().mean() <= MOST_ENTROPY:
                break
        return cls(outputs.shape[1], kind, temperature)

    def agree(self, found: np.ndarray, served: np.ndarray) -> np.ndarray:
        return np.asarray(found.argmax(1) == served.argmax(1))

    def targets(self, outputs: np.ndarray) -> np.ndarray:
        return log_probabilities(outputs, self.kind)

    def loss(self, raw: Tensor, wanted: Tensor) -> Tensor:
        soft = (wanted / self.temperature).softmax(1)
        return F.cross_entropy(raw / self.temperature, soft) * self.temperature**2

    def answer(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        likely = raw.softmax(1)
        return likely if self.kind == "probabilities" else raw, likely.amax(1)

    def chance(self, outputs: np.ndarray, train: np.ndarray) -> np.ndarray:
        answers = outputs.argmax(1)
        return np.asarray(answers == np.bincount(answers[train]).argmax())


@dataclass(frozen=True)
class Labels(Task):
    """Answers agree if the same labels have a probability above a half.

    Attributes:
        kind: whether scores are "logits" or "probabilities", of each label by itself.
    """

    kind: str = "logits"
    name = "labels"

    @classmethod
    def of(
        cls, outputs: np.ndarray, kind: str, tolerance: str | None, cosine: float | None
    ) -> Labels:
        within = outputs.min() >= 0 and outputs.max() <= 1
        task = cls(outputs.shape[1], kind or ("probabilities" if within else "logits"))
        sets = task._sets(outputs)
        if (sets == sets[0]).all():
            raise UserError("the model answers the same labels to all inputs: nothing to learn")
        return task

    def _sets(self, outputs: np.ndarray) -> np.ndarray:
        return np.asarray(outputs > (0.5 if self.kind == "probabilities" else 0.0))

    def agree(self, found: np.ndarray, served: np.ndarray) -> np.ndarray:
        return np.asarray((self._sets(found) == self._sets(served)).all(1))

    def targets(self, outputs: np.ndarray) -> np.ndarray:
        if self.kind == "probabilities":
            return outputs.astype(np.float32)
        found: np.ndarray = torch.from_numpy(outputs.astype(np.float32)).sigmoid().numpy()
        return found

    def loss(self, raw: Tensor, wanted: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(raw, wanted)

    def answer(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        sure = F.logsigmoid(raw.abs()).sum(1).exp()
        return raw.sigmoid() if self.kind == "probabilities" else raw, sure


@dataclass(frozen=True)
class Regress(Task):
    """Answers agree if no number is further from the served model's than its tolerance.

    Students add the logarithm of the error that they expect of each number.

    Attributes:
        within: tolerances.
        mean: of each number.
        scale: standard deviation of each number.
    """

    within: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    name = "regress"

    @property
    def columns(self) -> int:
        return 2 * self.size

    @classmethod
    def of(
        cls, outputs: np.ndarray, kind: str, tolerance: str | None, cosine: float | None
    ) -> Regress:
        assert tolerance is not None  # `ask` has seen to it
        low, high = np.quantile(outputs, SPREAD, axis=0)
        if (outputs == outputs[0]).all():
            raise UserError("the model answers the same to all inputs: nothing to learn")
        share = tolerance.endswith("%")
        try:
            number = float(tolerance.removesuffix("%")) / (100 if share else 1)
        except ValueError:
            number = 0.0
        if not 0 < number < math.inf:
            raise UserError(
                f"--tolerance: {tolerance!r} is not a number above 0, such as 0.2 or 5%"
            )
        within = number * (np.maximum(high - low, FLOOR) if share else np.ones(len(low)))
        mean, scale = outputs.mean(0), outputs.std(0)
        scale = np.where(scale > FLOOR, scale, 1.0)
        return cls(outputs.shape[1], *(tuple(map(float, each)) for each in (within, mean, scale)))

    def agree(self, found: np.ndarray, served: np.ndarray) -> np.ndarray:
        return np.asarray((np.abs(found - served) <= np.asarray(self.within)).all(1))

    def targets(self, outputs: np.ndarray) -> np.ndarray:
        found = (outputs - np.asarray(self.mean)) / np.asarray(self.scale)
        return np.asarray(found, np.float32)

    def loss(self, raw: Tensor, wanted: Tensor) -> Tensor:
        values, logs = raw.chunk(2, dim=1)
        error = (values - wanted).abs().detach()  # what is expected doesn't change what is said
        return F.smooth_l1_loss(values, wanted) + (error * (-logs).exp() + logs).mean()

    def answer(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        values, logs = raw.chunk(2, dim=1)
        scale = torch.tensor(self.scale)
        expected = logs.exp() * scale  # of a Laplace distribution
        sure = -torch.expm1(-torch.tensor(self.within) / expected.clamp_min(1e-30))
        return torch.tensor(self.mean) + scale * values, sure.clamp_min(FLOOR).log().sum(1).exp()

    def report(self, found: np.ndarray, served: np.ndarray) -> dict[str, Any]:
        """Return the correlation of each number, and its mean absolute error."""
        with np.errstate(invalid="ignore"):
            pairs = zip(found.T, served.T, strict=True)
            correlation = [float(np.corrcoef(ours, theirs)[0, 1]) for ours, theirs in pairs]
        return {
            "correlation": [each if math.isfinite(each) else None for each in correlation],
            "error": np.abs(found - served).mean(0).tolist(),
        }


NEAREST, RANKED = 10, 1000
"""Neighbours that are compared, among so many inputs."""


@dataclass(frozen=True)
class Embed(Task):
    """Answers agree if the cosine between them is at least so high.

    Students add the logarithm of the distance, 1 - cosine, that they expect.

    Attributes:
        cosine: the least.
        unit: whether embeddings have a norm of 1.
        scale: their typical norm.
    """

    cosine: float = COSINE
    unit: bool = False
    scale: float = 1.0
    name = "embed"

    @property
    def columns(self) -> int:
        return self.size + 1

    @classmethod
    def of(
        cls, outputs: np.ndarray, kind: str, tolerance: str | None, cosine: float | None
    ) -> Embed:
        if outputs.shape[1] < 2 or (outputs == outputs[0]).all():
            raise UserError("the model answers the same to all inputs: nothing to learn")
        norms = np.linalg.norm(outputs, axis=1)
        unit = bool(np.abs(norms - 1).max() <= UNIT)
        least = COSINE if cosine is None else cosine
        if not 0 < least < 1:
            raise UserError(f"--cosine: must lie between 0 and 1, got {least}")
        return cls(outputs.shape[1], least, unit, max(float(np.median(norms)), FLOOR))

    def agree(self, found: np.ndarray, served: np.ndarray) -> np.ndarray:
        return np.asarray((normalised(found) * normalised(served)).sum(1) >= self.cosine)

    def targets(self, outputs: np.ndarray) -> np.ndarray:
        return (outputs / self.scale).astype(np.float32)

    def loss(self, raw: Tensor, wanted: Tensor) -> Tensor:
        values, logs = raw[:, :-1], raw[:, -1]
        distance = 1 - F.cosine_similarity(values, wanted)
        error = (values - wanted).square().sum(1)
        told = distance.detach() * (-logs).exp() + logs
        return (distance + error + told / 10).mean()

    def answer(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        values = F.normalize(raw[:, :-1]) if self.unit else raw[:, :-1] * self.scale
        sure = -torch.expm1((self.cosine - 1) * (-raw[:, -1]).exp())
        return values, sure

    def report(self, found: np.ndarray, served: np.ndarray) -> dict[str, Any]:
        """Return the mean cosine, and the share of nearest neighbours that stay.

        The backup's embedding of each input is the query, and the served model's of all others are
        what is searched, as a user's index is (LEAF, Vujanic and Rueckstiess, arXiv 2509.12539).
        """
        ours, theirs = normalised(found), normalised(served)
        cosine = float((ours * theirs).sum(1).mean())
        ours, theirs = ours[:RANKED], theirs[:RANKED]
        count = min(NEAREST, len(theirs) - 1)
        nearest = []
        for queries in (ours, theirs):
            near = queries @ theirs.T
            np.fill_diagonal(near, -2)
            nearest.append(np.argpartition(-near, count - 1, axis=1)[:, :count])
        kept = [len(np.intersect1d(*pair)) for pair in zip(*nearest, strict=True)]
        return {"cosine": cosine, "neighbours": float(np.mean(kept)) / count}


def normalised(rows: np.ndarray) -> np.ndarray:
    """Return vectors (N, n) of length 1; those of length 0 stay."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


TASKS: Mapping[str, type[Task]] = {task.name: task for task in (Classify, Labels, Regress, Embed)}


def task_of(described: Mapping[str, Any]) -> Task:
    """Return the task that `Task.describe` described.

    Raises:
        ValueError: if there is none like that.
    """
    kind = TASKS.get(str(described.get("task")))
    if kind is None or set(described) != {"task", *(field.name for field in fields(kind))}:
        raise ValueError(f"no task {described}")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in described.items()
        if key != "task"
    }
    return kind(**values)


PASSING = ("Identity", "Cast", "Reshape", "Squeeze", "Flatten", "Normalizer")
PROOFS = ("Softmax", "LogSoftmax")
CLASSIFIERS = ("LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier")


def is_classifier(model: Any, output: str) -> bool:
    """Return whether an `onnx.ModelProto` ends in an operator that only classifiers end in.

    Outputs that sum to 1 prove nothing, and neither does a sigmoid: scores in 0..1 may be anything.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    while output in made:
        node = made[output]
        if node.op_type in CLASSIFIERS:
            return True
        if node.op_type in PROOFS:
            return all(a.i in (-1, 1) for a in node.attribute if a.name == "axis")
        if node.op_type not in PASSING:
            return False
        output = node.input[0]
    return False
