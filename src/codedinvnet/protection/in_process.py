"""Protections in Python: make one of a model in memory, and answer with its backup."""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from codedinvnet.common.devices import denormals_flushed
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import check_folder, content_digest, read_json
from codedinvnet.models import ModelSource, OpenModel
from codedinvnet.models.checkpoint import tensors_digest
from codedinvnet.models.probe import Opened
from codedinvnet.models.pytorch import inputs_of, open_module
from codedinvnet.protection.bound import Curve
from codedinvnet.protection.calibration import DECODED
from codedinvnet.protection.folder import (
    CONFIDENCE,
    DESCRIPTION,
    backup_row,
    open_backup,
    protection_calibration,
    read_description,
)
from codedinvnet.protection.inputs import Given
from codedinvnet.protection.run import ProtectOptions, make_protection

Array: TypeAlias = "np.ndarray | Tensor"


class Answered(NamedTuple):
    """Approximate answers to a batch.

    Attributes:
        values: of the protected output, (B, *shape).
        released: whether each may be released, (B,).
        agreement: the probability that each agrees with the model's, (B,).
    """

    values: np.ndarray
    released: np.ndarray
    agreement: np.ndarray


@dataclass(frozen=True, eq=False)
class Protection:
    """A backup of a protection, in this process.

    Attributes:
        folder: of the protection.
        backup: an ONNX file that was opened.
        output: the protected one.
        curve: how often answers of each confidence agree.
        limit: on disagreement; None releases everything.
        description: the whole protection, as `protection.json` has it.
    """

    folder: Path
    backup: OpenModel
    output: str
    curve: Curve
    limit: float | None
    description: Mapping[str, Any]

    def answer(self, inputs: Mapping[str, np.ndarray]) -> Answered:
        """Answer a batch, given by the model's inputs."""
        found = self.backup.run(inputs)
        sure = found[CONFIDENCE]
        least = -np.inf if self.limit is None else self.curve.threshold(self.limit)
        return Answered(found[self.output], sure >= least, self.curve.probability(sure))

    def save(self, folder: str | Path) -> None:
        """Copy the protection into a folder, from which `serve` and `open_protection` take it.

        Raises:
            UserError: if the folder already holds one, or cannot be written.
        """
        check_folder(Path(folder), "folder")
        if (Path(folder) / DESCRIPTION).exists():
            raise UserError(f"folder: {folder} already holds a protection: name another folder")
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


def open_protection(
    folder: str | Path, method: str | None = None, limit: float | None = None
) -> Protection:
    """Open a backup of the folder that `codedinvnet protect` wrote.

    Args:
        folder: where it is.
        method: a backup; None: the recommended one.
        limit: on disagreement; None: the suggested one, which only the recommended backup has.

    Raises:
        UserError: if there is no such backup, or it is damaged.
    """
    folder = Path(folder)
    described = read_description(folder)
    row = backup_row(folder, described, method)
    curve = protection_calibration(folder).curve(row.method, row.k, DECODED)
    if curve is None:
        raise UserError(f"{folder} has no calibration of {row.method}: run codedinvnet protect")
    suggested = described.limit if row.method == described.recommended else None
    backup = open_backup(folder, row)
    told = read_json(folder / DESCRIPTION)
    return Protection(folder, backup, described.model.output, curve, limit or suggested, told)


@dataclass(frozen=True)
class _InMemory(ModelSource):
    """A module in memory, and examples of its inputs."""

    module: nn.Module | None = None
    examples: Any = None

    def opened(self) -> Opened:
        assert self.module is not None
        torch.set_num_threads(self.threads)
        inputs = inputs_of(self.source, self.module, self.examples, ())
        digest = tensors_digest(self.module.state_dict())
        digest = content_digest(f"{digest} {self.module}".encode())
        return open_module(self.module, inputs, digest, torch.device(self.device))


def protect(
    model: Any,
    inputs: Array | Mapping[str, Array] | str | Path,
    task: str | None = None,
    *,
    folder: str | Path | None = None,
    output: str | None = None,
    tolerance: float | str | None = None,
    cosine: float | None = None,
    minutes: float = 30.0,
    work: float | None = None,
    seed: int = 0,
    mirror: bool = True,
    preprocess: str = "",
    threads: int | None = None,
) -> Protection:
    """Train a small backup for a model, as `codedinvnet protect` does.

    Args:
        model: a `torch.nn.Module`, an `onnx.ModelProto`, or what the command takes: an ONNX file or
            `package.module:function`.
        inputs: unlabelled queries: the only input's array, arrays by name, or a path (not with a
            module, whose inputs have the arrays' shapes).
        task: "classify", "labels", "regress" or "embed"; None: the model itself must prove that it
            is a classifier.
        folder: keeps the protection; without one an interrupted run can't go on, and the result
            lives as long as the returned object, unless it is saved.
        output: the output to protect; None: the only one that will do.
        tolerance: with "regress": by how much an answer may differ, as a number or "5%" of its
            spread.
        cosine: with "embed": the least cosine of answers that agree; None: 0.9.
        minutes: for scoring and training together.
        work: train one size only, this share of the model's time.
        seed: of the split and of the trainings.
        mirror: whether images may be mirrored in training.
        preprocess: "FILE.py:FUNCTION", which makes one query of a Pillow image.
        threads: to score and train with; None: as many as PyTorch has.

    Raises:
        UserError: with the command's message, if it would end with one, or recommends no backup.
    """
    given, before = _arrays(inputs), torch.get_num_threads()
    out = Path(tempfile.mkdtemp() if folder is None else folder)
    with ExitStack() as stack, ExitStack() as failed:
        if folder is None:
            failed.callback(shutil.rmtree, out, ignore_errors=True)
        stack.callback(torch.set_num_threads, before)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(denormals_flushed())
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        options = ProtectOptions(
            _source(model, given, scratch, threads or before),
            given,
            out,
            minutes=minutes,
            work=work,
            seed=seed,
            preprocess=preprocess,
            mirror=mirror,
            task=task,
            output=output,
            tolerance=None if tolerance is None else str(tolerance),
            cosine=cosine,
        )
        found = make_protection(options)
        if found["recommended"] is None:
            reasons = ["no backup is recommended", found["reason"], *found["notes"]]
            raise UserError("; ".join(reasons))
        made = open_protection(out)
        weakref.finalize(made, failed.pop_all().close)
    return made


def _arrays(inputs: Array | Mapping[str, Array] | str | Path) -> Given:
    if isinstance(inputs, str | Path):
        return Path(inputs)
    if isinstance(inputs, Mapping):
        return {name: np.asarray(array) for name, array in inputs.items()}
    return np.asarray(inputs)


def _source(model: Any, given: Given, scratch: Path, threads: int) -> ModelSource:
    """Return what opens a model, which may need a file in a folder for it."""
    if isinstance(model, nn.Module):
        if isinstance(given, Path):
            raise UserError(
                "inputs: a module doesn't say what shapes it takes: give arrays, or the model as "
                "an ONNX file"
            )
        name = f"{type(model).__module__}:{type(model).__qualname__}"
        module = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        return _InMemory(name, threads=threads, module=module, examples=_examples(module, given))
    if hasattr(model, "SerializeToString"):
        (scratch / "model.onnx").write_bytes(model.SerializeToString())
        model = scratch / "model.onnx"
    return ModelSource(str(model), threads=threads)


def _examples(module: nn.Module, given: np.ndarray | Mapping[str, np.ndarray]) -> Any:
    """Return a query of each input; floats are as the module's own."""
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)

    def one(array: np.ndarray) -> Tensor:
        found = torch.from_numpy(array[:1])
        return found.to(own) if own is not None and found.is_floating_point() else found

    if isinstance(given, np.ndarray):
        return one(given)
    return {name: one(array) for name, array in given.items()}
