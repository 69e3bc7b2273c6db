"""Opens a model by what a user calls it, here and in every worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from codedinvnet.common.errors import UserError
from codedinvnet.models.base import Signature, TensorSpec, parse_input
from codedinvnet.models.probe import Compute, Opened, find_scores, in_turn, probe

Kind: TypeAlias = Literal["bundle", "onnx", "factory"]

_PICKLES = (".pt", ".pt2", ".pth", ".bin", ".pkl", ".ckpt")


@dataclass(frozen=True)
class ModelSource:
    """What it takes to open one model again, in another process: plain values, as JSON has them.

    ONNX Runtime computes ONNX files, and PyTorch the others.

    Attributes:
        source: FILE.onnx, or `package.module:function` or `path/file.py:function`, which makes a
            `torch.nn.Module`; or the name or folder of a bundle, which is only served.
        weights: the safetensors file of a factory's module.
        scores: which output holds the class scores, `NAME[:probabilities|:logits]`; None: found.
        inputs: `NAME:DATATYPE:SHAPE` of the inputs that the model leaves open.
        device: the device to compute on.
        threads: how many threads to compute with.
        digest: of the files or weights that must be there ("": any will do).

    Raises:
        UserError: if nothing computes such a model on that device.
    """

    source: str
    weights: str | None = None
    scores: str | None = None
    inputs: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int = 1
    digest: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))  # JSON has lists
        if self.source.endswith(".onnx") and self.device.partition(":")[0] != "cpu":
            raise UserError(
                f"ONNX files are computed on processors only, not on {self.device}: give a "
                "factory, which PyTorch computes, or leave the model in its server, behind a "
                "gateway"
            )

    @cached_property
    def kind(self) -> Kind:
        """What the source is."""
        if self.source.startswith(("http://", "https://")):
            raise UserError(
                f"{self.source} is on a server: `codedinvnet gateway` stands in front of it; "
                "anything else needs the model's file"
            )
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
        from codedinvnet.models.bundle import bundle_folder

        try:
            bundle_folder(self.source)
        except UserError as error:
            raise UserError(f"{error}, nor FILE.onnx or package.module:function") from error
        return "bundle"

    def open(self) -> OpenModel:
        """Open the model, and run it a few times.

        On PyTorch, the number of threads is set for this whole process.
        """
        opened = self.opened()
        if self.digest:
            check_weights(self.source, opened.digest, self.digest)
        probed = probe(opened.compute, opened.inputs, opened.max_batch, self.source)
        signature = Signature(
            opened.inputs,
            probed.outputs,
            probed.max_batch,
            find_scores(self.scores, probed, self.source),
            opened.platform,
        )
        source = replace(self, digest=opened.digest)
        return OpenModel(source, signature, opened.compute, opened.network)

    def opened(self) -> Opened:
        """Return the model before it is run."""
        return _open(self)


@dataclass(frozen=True, repr=False, eq=False)
class OpenModel:
    """A model that was opened.

    Attributes:
        source: what opens it again, with its digest.
        signature: the model's inputs and outputs.
        compute: runs a batch that is not too large for it.
        network: the module through which gradients flow, a `codedinvnet.models.pytorch.Network`;
            None if there is none.
    """

    source: ModelSource
    signature: Signature
    compute: Compute
    network: Any = None

    def __repr__(self) -> str:
        def tensors(specs: Sequence[TensorSpec]) -> str:
            each = (f"{s.name}: {s.datatype} {'x'.join(map(str, s.shape)) or '()'}" for s in specs)
            return ", ".join(each)

        inputs, outputs = tensors(self.signature.inputs), tensors(self.signature.outputs)
        platform = self.signature.platform
        return f"OpenModel({self.source.source!r} on {platform}: {inputs} -> {outputs})"

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute a batch; more queries than the model takes at once are computed in turn."""
        return in_turn(self.compute, inputs, self.signature.max_batch)

    def describe(self) -> dict[str, Any]:
        """Return what a user wants to know of the model, as JSON has it."""
        source = self.source
        told = {"source": source.source, "kind": source.kind, "digest": source.digest}
        return {**told, **asdict(self.signature)}


def open_model(
    source: str | Path,
    *,
    weights: str | Path | None = None,
    scores: str | None = None,
    inputs: Sequence[str] = (),
    device: str = "cpu",
    threads: int = 1,
) -> OpenModel:
    """Open a model; the arguments are those of `ModelSource`.

    Raises:
        UserError: if it cannot be opened.
    """
    file = None if weights is None else str(weights)
    return ModelSource(str(source), file, scores, tuple(inputs), device, threads).open()


def check_weights(place: str | Path, found: str, wanted: str) -> None:
    """Raise UserError if weights were exchanged while a service runs: answers would be mixed."""
    if found != wanted:
        raise UserError(
            f"{place} has weights {found}, the front end has {wanted}: restart the service"
        )


def _open(source: ModelSource) -> Opened:
    """Open what a source names, by the module for its kind."""
    # Imported here: a front end that only names its workers' model needs no PyTorch for that.
    import torch

    from codedinvnet.models import onnx_file, pytorch
    from codedinvnet.models.bundle import usable_device

    kind, told = source.kind, [parse_input(text) for text in source.inputs]
    if source.weights is not None and kind != "factory":
        raise UserError(f"weights: {source.source} has its own; only a factory takes others")
    if kind == "bundle":
        raise UserError(
            f"{source.source} is a bundle, which `serve` takes as it is: it comes with a small "
            "backup, and load_bundle opens it"
        )
    device = usable_device(source.device)
    torch.set_num_threads(source.threads)
    if kind == "onnx":
        return onnx_file.open_onnx(Path(source.source), told, source.threads)
    weights = None if source.weights is None else Path(source.weights)
    return pytorch.open_factory(source.source, weights, told, device)
