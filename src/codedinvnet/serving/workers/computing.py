"""What a worker loads, and how it computes a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.codes.method import Given
from codedinvnet.codes.registry import OURS, find_method
from codedinvnet.codes.rules import BACKUP, SERVED
from codedinvnet.common.devices import use_whole_float32
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import file_digest
from codedinvnet.models.base import Model, TensorSpec, mixed_tensor, scores_tensor
from codedinvnet.models.bundle import load_bundle
from codedinvnet.models.network import ScoresOf
from codedinvnet.models.source import ModelSource, OpenModel, check_weights
from codedinvnet.serving.served import classified
from codedinvnet.serving.workers.pool import OUTPUT, Computer, copied, floated, zeros


class SchemeComputer:
    """Computes all tasks of a scheme, whose models take one tensor and return one.

    Of a bundle's data tasks the head is computed as well: the answer leaves the worker.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def compute(
        self, number: int, inputs: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, np.ndarray], float]:
        (queries,) = inputs.values()
        rows = torch.from_numpy(queries)
        task = self.scheme.rules.tasks(self.scheme.rules.k)[number]
        one_each = len(task.members) == 1 and not task.encoded  # a call may be of several such
        output, seconds = self.scheme.compute(number, rows[:, None] if one_each else rows[None])
        output = output.float()
        found = {OUTPUT: np.ascontiguousarray(output.cpu().numpy())}
        scores = self.scheme.direct(output) if number < self.scheme.rules.k else None
        return found if scores is None else {**found, **classified(scores)}, seconds


class ModelComputer:
    """Computes tasks of a user's own model, whose outputs are left as they are.

    A scheme is for the tasks that are more than a query to it.
    """

    def __init__(self, model: Model, scheme: Scheme | None = None) -> None:
        self.model, self.scheme = model, scheme
        self.coding = None if scheme is None else SchemeComputer(scheme)
        self.checked = "" if scheme is None else str(scheme.models[SERVED].output)

    def compute(
        self, number: int, inputs: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, np.ndarray], float]:
        if self.scheme is None or self.coding is None:
            return self.model.run(inputs), 0.0
        task = self.scheme.rules.tasks(self.scheme.rules.k)[number]
        if task.model == SERVED and not task.encoded:
            found = self.model.run(inputs)
            if np.isnan(found[self.checked]).any():
                raise ValueError("the model answers NaN")
            return found, 0.0
        taken = copied(inputs) if task.model == BACKUP else floated(inputs)
        if len(inputs) == 1:
            return self.coding.compute(number, taken)
        output = run_module(self.scheme.models[task.model], taken, self.model.signature.inputs)
        return {OUTPUT: output.reshape(1, -1)}, 0.0


def run_module(
    module: nn.Module, inputs: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]
) -> np.ndarray:
    """Return what a module makes of a batch of inputs, as float32."""
    with torch.inference_mode():
        output: Tensor = module(*(torch.from_numpy(inputs[spec.name]) for spec in specs))
    return output.float().numpy()


def scheme_of(model: Model, method: str, k: int) -> Scheme:
    """Return a method's scheme for a user's own classifier, for groups of at most k queries.

    Raises:
        UserError: if the method is not made for any classifier, or the model is none for it.
    """
    found = find_method(method)
    if found.of_bundle or found.part or found.is_policy:
        raise UserError(f"--method: {found.name} is trained together with a bundle")
    shape, classes = mixed_tensor(model.signature).shape, scores_tensor(model.signature).shape[0]
    return found.build(Given(k, ScoresOf(model).eval(), shape, classes))


@dataclass(frozen=True)
class BundleSpec:
    """A bundle, with a method and the checkpoint of its trained part.

    The digests are of the files that the front end has ("": any will do).
    """

    bundle: str | Path
    k: int
    device: str = "cpu"
    threads: int = 1
    method: str = OURS
    part: Path | None = None
    weights: str = ""
    part_weights: str = ""

    def load(self) -> Computer:
        """Load, and compute each kind of task once, so that no query pays for it.

        This is for a worker's own process: its number of threads and its precision are set.

        Raises:
            UserError: if that cannot be, or other weights lie there than the front end has.
        """
        torch.set_num_threads(self.threads)
        use_whole_float32()
        scheme = self._scheme()
        torch.set_num_threads(self.threads)  # the file of a user's method may have set others
        computer = SchemeComputer(scheme)
        rules = scheme.rules
        black = np.zeros((rules.k, *scheme.shape), np.uint8)
        for number, task in rules.tasks(rules.k).items():
            if number in (0, rules.k):
                computer.compute(number, {"": black[: len(task.members)]})
        return computer

    def _scheme(self) -> Scheme:
        bundle = load_bundle(self.bundle, self.device)
        scheme = scheme_for(bundle, self.k, self.method, self.part)
        if self.weights:
            check_weights(self.bundle, bundle.digest(), self.weights)
        if self.part_weights and self.part is not None:
            check_weights(self.part, file_digest(self.part), self.part_weights)
        return scheme


@dataclass(frozen=True)
class ModelSpec:
    """A user's own model, with a method for the tasks that are more than a query to it.

    With a protection the method is one of its table; "" for the recommended one. The digest is that
    of its description which the front end has ("": any will do).
    """

    source: ModelSource
    method: str = ""
    k: int = 1
    protection: Path | None = None
    protection_digest: str = ""

    @property
    def device(self) -> str:
        """What to compute on."""
        return self.source.device

    @property
    def threads(self) -> int:
        """How many a worker computes with."""
        return self.source.threads

    def load(self) -> Computer:
        """See `BundleSpec.load`; the model's own task is computed as it is opened."""
        model = self.source.open()
        computer = self.computer(model)
        if computer.scheme is not None:
            use_whole_float32()
            rules = computer.scheme.rules
            extra = rules.tasks(rules.k).get(rules.k)
            if extra is not None:
                computer.compute(rules.k, zeros(model.signature.inputs, len(extra.members)))
        return computer

    def computer(self, model: OpenModel) -> ModelComputer:
        """Return what computes tasks with the model, once it is open."""
        if self.protection is not None:
            from codedinvnet.protection.folder import load_protection

            scheme = load_protection(self.protection, model, self.method, self.protection_digest)
            return ModelComputer(model, scheme)
        if not self.method:
            return ModelComputer(model)
        scheme = scheme_of(model, self.method, self.k)
        torch.set_num_threads(self.threads)  # as for a bundle
        return ModelComputer(model, scheme)


WorkerSpec: TypeAlias = BundleSpec | ModelSpec
"""What every worker loads; plain values, for another process."""
