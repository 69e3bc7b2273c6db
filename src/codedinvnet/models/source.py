"""Opens a model by what a user calls it, here and in every worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from codedinvnet.common.engines import (
    ONNX_RUNTIME,
    PYTORCH,
    check_engine,
    check_installed,
    engine_named,
)
from codedinvnet.common.errors import UserError
from codedinvnet.models.base import Signature, TensorSpec, Unreachable
from codedinvnet.models.probe import ROWS, Compute, Opened, find_scores, in_turn, probe
from codedinvnet.models.remote import TOKEN_FLAG, open_remote_model
from codedinvnet.models.specs import parse_input

Kind: TypeAlias = Literal["bundle", "onnx", "factory", "upstream"]

_PICKLES = (".pt", ".pt2", ".pth", ".bin", ".pkl", ".ckpt")


@dataclass(frozen=True)
class ModelSource:
    """What it takes to open one model again, in another process: plain values, as JSON has them.

    Attributes:
        source: a bundle's name or folder, FILE.onnx, or `package.module:function`, or
            `path/file.py:function`, which makes a `torch.nn.Module`; or the URL of a model that a
            server has, `http://HOST:PORT/v2/models/NAME`.
        weights: the safetensors file of a factory's module.
        scores: which output holds the class scores, `NAME[:probabilities|:logits]`; None: found.
        engine: what computes the model, one of `codedinvnet.common.engines.ENGINES`; None: ONNX
            Runtime for ONNX files, PyTorch for the others.
        inputs: `NAME:DATATYPE:SHAPE` of the inputs that the model leaves open.
        device: the device to compute on.
        threads: how many threads to compute with.
        digest: of the files or weights that must be there ("": any will do).
        token_file: the file with the token that a server wants; None: it wants none.
    """

    source: str
    weights: str | None = None
    scores: str | None = None
    engine: str | None = None
    inputs: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int = 1
    digest: str = ""
    token_file: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))  # JSON has lists

    @cached_property
    def kind(self) -> Kind:
        """What the source is."""
        if self.source.startswith(("http://", "https://")):
            return "upstream"
        path = Path(self.source)
        suffix = path.suffix.lower()
        if suffix == ".onnx":
            return "onnx"
        if suffix in _PICKLES:
            raise UserError(
                f"{self.source} may be a pickle, which is not read, since unpickling runs code: "
                "give an ONNX file, or a factory with weights FILE.safetensors"
            )
        if suffix == ".safetensors":
            raise UserError(f"{self.source} has weights and no model: give a factory, with weights")
        if ":" in self.source and not path.exists():
            return "factory"
        from codedinvnet.models.bundle import DESCRIPTION, shipped_bundles

        if self.source in shipped_bundles() or (path / DESCRIPTION).is_file():
            return "bundle"
        raise UserError(
            f"no model {self.source!r}: neither a folder with {DESCRIPTION} nor a shipped bundle "
            f"({', '.join(shipped_bundles()) or 'none ship'}), nor FILE.onnx or "
            "package.module:function, nor http://HOST:PORT/v2/models/NAME"
        )

    def open(self) -> OpenModel:
        """Open the model, and run it a few times.

        On PyTorch, the number of threads is set for this whole process.
        """
        usual = {"onnx": ONNX_RUNTIME, "upstream": "upstream"}.get(self.kind, PYTORCH)
        engine = self.engine or usual
        opened = _open(self, engine)
        if self.digest and opened.digest != self.digest:
            raise UserError(
                f"{self.source} has weights {opened.digest}, the front end has {self.digest}: "
                "restart the service"
            )
        probed = probe(opened.compute, opened.inputs, opened.max_batch, self.source)
        signature = Signature(
            opened.inputs,
            probed.outputs,
            probed.max_batch,
            find_scores(self.scores, probed, self.source),
            opened.platform,
        )
        source = replace(self, engine=engine, digest=opened.digest)
        return OpenModel(source, signature, opened.compute, opened.network)


class OpenModel:
    """A model that was opened.

    Args:
        source: what opens it again, with its digest.
        signature: the model's inputs and outputs.
        compute: runs a batch that is not too large for it.
        network: the module through which gradients flow, a `codedinvnet.models.pytorch.Network`;
            None if there is none.
    """

    def __init__(
        self, source: ModelSource, signature: Signature, compute: Compute, network: Any = None
    ) -> None:
        self.source, self.network = source, network
        self.signature, self._compute = signature, compute
        self._at_once = signature.max_batch
        self._worked = min(ROWS, signature.max_batch or ROWS)  # as the probe has seen

    def __repr__(self) -> str:
        def tensors(specs: Sequence[TensorSpec]) -> str:
            each = (f"{s.name}: {s.datatype} {'x'.join(map(str, s.shape)) or '()'}" for s in specs)
            return ", ".join(each)

        inputs, outputs = tensors(self.signature.inputs), tensors(self.signature.outputs)
        return f"OpenModel({self.source.source!r} on {self.source.engine}: {inputs} -> {outputs})"

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute a batch; more queries than the model takes at once are computed in turn.

        Not every model tells how many it takes. Where a larger batch fails than any before, halves
        of it are tried, and what works then is the most from there on.
        """
        size = len(next(iter(inputs.values())))
        at_once = most = min(size, self._at_once or size)
        while True:
            try:
                found = in_turn(self._compute, inputs, at_once)
                break
            except Exception as error:  # whatever the model raises
                if at_once <= self._worked or isinstance(error, Unreachable):
                    raise
                at_once = max(at_once // 2, self._worked)
        if at_once < most:
            self._at_once = at_once
        self._worked = max(self._worked, at_once)
        return found

    def describe(self) -> dict[str, Any]:
        """Return what a user wants to know of the model, as JSON has it."""
        signature, source = asdict(self.signature), self.source
        told = {"source": source.source, "kind": source.kind, "engine": source.engine}
        return {**told, "digest": source.digest, **signature}


def open_model(
    source: str | Path,
    *,
    weights: str | Path | None = None,
    scores: str | None = None,
    engine: str | None = None,
    inputs: Sequence[str] = (),
    device: str = "cpu",
    threads: int = 1,
) -> OpenModel:
    """Open a model; the arguments are those of `ModelSource`.

    Raises:
        UserError: if it cannot be opened.
    """
    return ModelSource(
        str(source),
        None if weights is None else str(weights),
        scores,
        engine,
        tuple(inputs),
        device,
        threads,
    ).open()


def _open(source: ModelSource, engine: str) -> Opened:
    """Open what a source names, by the module for its kind."""
    kind, told = source.kind, [parse_input(text) for text in source.inputs]
    if kind == "upstream":
        if source.weights is not None:
            raise UserError(f"weights: {source.source} has its own")
        return open_remote_model(source.source, told, source.token_file)
    if source.token_file is not None:
        raise UserError(f"{TOKEN_FLAG}: {source.source} is no server's: http://HOST:PORT/v2/...")

    # Imported here: a front end that only names its workers' model needs no PyTorch for that.
    import torch

    from codedinvnet.models import onnx_file, pytorch
    from codedinvnet.models.bundle import usable_device

    if kind == "onnx" and engine_named(engine).name != ONNX_RUNTIME:
        raise UserError(f"{source.source} runs on ONNX Runtime, not on {engine}")
    if kind != "onnx" and engine_named(engine).name != PYTORCH:
        why = "runs on PyTorch, not on"
        raise UserError(f"{source.source} {why} {engine}: export it to ONNX, and give that file")
    if source.weights is not None and kind != "factory":
        raise UserError(f"weights: {source.source} has its own; only a factory takes others")
    if kind == "bundle" and source.inputs:
        raise UserError("inputs: a bundle has its own")
    for path in (Path(source.weights or "."), Path(source.source if kind != "factory" else ".")):
        if kind != "bundle" and not path.exists():
            raise UserError(f"there is no file {path}")
    check_engine(engine, source.device)
    check_installed(engine)
    device = usable_device(source.device)
    torch.set_num_threads(source.threads)
    if kind == "onnx":
        return onnx_file.open_onnx(Path(source.source), told, source.threads)
    if kind == "bundle":
        return pytorch.open_bundle(source.source, device)
    weights = None if source.weights is None else Path(source.weights)
    return pytorch.open_factory(source.source, weights, told, device)
