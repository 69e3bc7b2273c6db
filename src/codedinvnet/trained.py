"""The rivals' trained parts as files: what they are made of, and methods made from them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from codedinvnet.bundle import Bundle, bundle_folder, weights_digest
from codedinvnet.checkpoint import load_checkpoint, load_modules
from codedinvnet.classifier import ImageClassifier, classifier_of
from codedinvnet.config import EncoderSettings
from codedinvnet.devices import first_tensor
from codedinvnet.errors import UserError
from codedinvnet.methods import (
    ONE,
    REGULARISED,
    CodedMethod,
    ConcatParM,
    LearnedCode,
    PaperInvNet,
    ParM,
    SmallBackup,
    Tolerance,
)
from codedinvnet.methods.parm import ConvEncoder, LinearDecoder, ParityModel, check_tiles
from codedinvnet.model import CodedModel, build_encoder, with_encoder
from codedinvnet.nn.resnet import ResNet
from codedinvnet.rows import read_rows

PART = "part"
"""The module's name in a checkpoint."""
PARITY_MODELS: Mapping[str, type[ParM]] = {ParM.name: ParM, ConcatParM.name: ConcatParM}
WITH_PARTS = (*PARITY_MODELS, LearnedCode.name, PaperInvNet.name, SmallBackup.name)
"""The methods that need a trained part beside a base model."""
BACKUP_BLOCKS, BACKUP_SQUEEZE = (1, 1, 1), 2
"""Shape of the small backup: at its cost, a shallow network at half size beats a thin deep one."""


def backup_network(model: CodedModel, width: int) -> ResNet:
    """Return an untrained small backup of a width, for padded images of a model."""
    return ResNet(
        model.input_shape[0],
        len(model.settings.classes),
        width=width,
        blocks=BACKUP_BLOCKS,
        squeeze=BACKUP_SQUEEZE,
    )


def untrained_part(
    name: str, classifier: ImageClassifier, model: CodedModel, k: int, made_with: Mapping[str, Any]
) -> nn.Module:
    """Return a method's part before its training.

    Args:
        name: of the method, one of WITH_PARTS.
        classifier: the served one.
        model: whose images the part takes.
        k: members of a group.
        made_with: `width` of a small backup; `encoder`, the settings of an E.
    """
    if name == SmallBackup.name:
        network = backup_network(model, int(made_with["width"]))
        return ImageClassifier(network, model.settings.padding)
    if name == LearnedCode.name:
        decoder = LinearDecoder(k, len(model.settings.classes))
        return nn.ModuleDict({"encoder": ConvEncoder(k), "decoder": decoder})
    if name == PaperInvNet.name:
        settings = EncoderSettings.model_validate(made_with["encoder"])
        return build_encoder(settings, model.input_shape)
    assert name in PARITY_MODELS, name
    return ParityModel(copy.deepcopy(classifier).requires_grad_(True), k)


def with_part(
    name: str, classifier: ImageClassifier, model: CodedModel, part: nn.Module, k: int
) -> CodedMethod:
    """Return the method that is made of a base model and a trained part.

    Args:
        name: of the method, one of WITH_PARTS.
        classifier: the served one.
        model: whose f and g an encoder was trained for.
        part: in evaluation mode.
        k: members of a group.
    """
    if name == SmallBackup.name:
        return SmallBackup(classifier, part, k)
    if name == LearnedCode.name:
        assert isinstance(part, nn.ModuleDict)
        return LearnedCode(classifier, part["encoder"], part["decoder"], k)
    if name == PaperInvNet.name:
        return PaperInvNet(with_encoder(model, part), k)
    return PARITY_MODELS[name](classifier, part, k)


def _smoothing(rows: Path, name: str, weights: str, k: int, stragglers: int) -> tuple[float, float]:
    """Return the regularisers, encoder's and decoder's, from rows of `bench accuracy`.

    Raises:
        UserError: if there is no such file, or none of its rows is of these weights, k and S.
    """
    if not rows.is_file():
        raise UserError(f"--part: there is no file {rows}")
    found = [
        row["chosen"]["smoothing"]
        for row in read_rows(rows, "accuracy")
        if row["error"] is None
        and not row["settings"].get("quick")
        and (row["method"], row["base"]) == (name, "invertible")
        and (row["k"], row["missing"], row["corrupt"]) == (k, stragglers, 0)
        and row["settings"].get("bundle") == weights
    ]
    if not found:
        many = "" if stragglers == 1 else f" and {stragglers} missing"
        raise UserError(f"--part: {rows} holds no row of {name} with k = {k}{many} for this bundle")
    encoder, decoder = found[-1]
    return encoder, decoder


def part_beside(bundle: str | Path, name: str, k: int) -> Path | None:
    """Return the part that lies beside a bundle's weights, `NAME-kK.safetensors`; None without."""
    path = bundle_folder(bundle) / f"{name}-k{k}.safetensors"
    return path if path.is_file() else None


def method_for(
    loaded: Bundle,
    bundle: str | Path,
    name: str,
    k: int,
    part: Path | None,
    tolerance: Tolerance = ONE,
) -> CodedMethod:
    """Return a method for a bundle, with the part in a checkpoint if it needs one.

    Args:
        loaded: the bundle.
        bundle: its name or folder.
        name: of the method.
        k: members of a group.
        part: what `bench accuracy` left, `best.safetensors` in the part's folder; None: the one
            beside the bundle, if there is one. Of `REGULARISED` its rows, for the regularisers that
            it chose.
        tolerance: of a method that can be made for any.

    Raises:
        UserError: if the part is missing, not needed, or was trained for something else.
    """
    if name in REGULARISED and part is not None:
        encoder, decoder = _smoothing(part, name, weights_digest(bundle), k, tolerance.stragglers)
        return REGULARISED[name](
            classifier_of(loaded.model),
            k,
            stragglers=tolerance.stragglers,
            encoder_smoothing=encoder,
            decoder_smoothing=decoder,
        )
    if name not in WITH_PARTS:
        if part is not None:
            raise UserError(f"--part: {name} needs no trained part")
        return loaded.coded(name, k, tolerance)
    part = part or part_beside(bundle, name, k)
    if part is None:
        raise UserError(
            f"--part: {name} needs the part that `codedinvnet bench accuracy` trained for k = {k}"
        )
    if name == ConcatParM.name:
        check_tiles(k, loaded.info.input.shape)
    tensors, header = load_checkpoint(part)
    made_with = header.get("settings", {})
    wanted = {"method": name, "base": "invertible", "k": k, "bundle": weights_digest(bundle)}
    for key, value in wanted.items():
        if made_with.get(key) != value:
            found = made_with.get(key)
            raise UserError(f"--part: {part} was trained for {key} {found!r}, not {value!r}")
    classifier = classifier_of(loaded.model)
    module = untrained_part(name, classifier, loaded.model, k, made_with)
    load_modules({PART: module}, tensors, part)
    device = first_tensor(loaded.model).device
    module = module.to(device).eval().requires_grad_(False)
    return with_part(name, classifier, loaded.model, module, k)
