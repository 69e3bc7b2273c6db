"""Settings: typed, validated, read from JSON.

A settings file has one section per stage. An unknown key is an error that names the nearest right
one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from codedinvnet.common.errors import UserError, nearest
from codedinvnet.common.files import read_json

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A section of a settings file: unknown keys are refused, values are not changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSettings(Section):
    """Which images, and how they are split and shaped."""

    name: str
    validation: Positive = 5000
    padding: Annotated[int, Field(ge=0)] = 0
    """Zero pixels added on every side before the network."""


NO_INVERSE = (
    "the network has no inverse: images of latents, the paper's objective and the "
    "oracle need one (network.kind iresnet or irevnet)"
)


class NetworkSettings(Section):
    """The embedding network f."""

    kind: Literal["iresnet", "irevnet", "plain"] = "iresnet"
    """`plain` is a ResNet, which has no inverse. The recovery objective needs none."""
    blocks: Annotated[tuple[Positive, ...], Field(min_length=1)] = (7, 7, 7)
    strides: tuple[Literal[1, 2], ...] = (1, 2, 2)
    hidden: tuple[Positive, ...] = (32, 64, 128)
    """Channels inside the blocks of each stage; of a plain network, of the stage."""
    coefficient: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Bound on the norm of an i-ResNet's convolutions."""
    initial_squeeze: Positive = 2
    head_hidden: Annotated[int, Field(ge=0)] = 0
    """Width of a hidden layer in the head g (0: none)."""

    @model_validator(mode="after")
    def _stages_agree(self) -> NetworkSettings:
        if not len(self.blocks) == len(self.strides) == len(self.hidden):
            raise ValueError(
                "blocks, strides and hidden must have one entry per stage, "
                f"got {len(self.blocks)}, {len(self.strides)} and {len(self.hidden)}"
            )
        return self


class TrainSettings(Section):
    """How f and g are trained."""

    epochs: Positive
    batch_size: Annotated[int, Field(ge=2)] = 128
    learning_rate: Rate = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Of f and g, and of E in the recovery objective."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the rate rises, before its cosine decay."""
    mixup: Literal["manifold", "none"] = "manifold"
    mixup_alpha: Rate = 1.0
    flip: bool = False
    """Augmentation: mirror half of the images. `flip` and `shift` hold in joint training, too, and
    for rivals without a parity model."""
    shift: Annotated[int, Field(ge=0)] = 0
    """Augmentation: shift images by up to so many pixels, in the same trainings."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of f's passes while it trains; weights and losses stay in float32. bfloat16 takes 0.4 to 0.6
    of the time on some processors; one without instructions for it trains in float32. Rivals train
    as f does."""
    init_batch: Positive = 1024


class PartSettings(Section):
    """How a rival's trained part is trained: a plain classifier, a parity model, a small backup."""

    epochs: Positive
    steps_per_epoch: Positive = 200
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images, or groups."""
    learning_rate: Rate = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    augment: bool = False
    """A parity model sees images that are mirrored and shifted as the bundle's training's are, and
    learns the logits of the originals, as ParM's published one does on CIFAR-10."""

    def quick(self, steps: int) -> PartSettings:
        """Return the budget of a trial in short."""
        changes = {"epochs": 1, "steps_per_epoch": min(steps, self.steps_per_epoch)}
        return self.model_copy(update=changes)


class EncoderSettings(Section):
    """The fusion encoder E."""

    kind: Literal["unet", "lean"]
    width: Positive
    """Channels of the first stage: the U-Net's filters (the paper: 64)."""
    depth: Annotated[int, Field(ge=0)] = 0
    """Further convolutions of the lean encoder at 1/4 and 1/8 of the images' size."""

    @model_validator(mode="after")
    def _lean_only(self) -> EncoderSettings:
        if self.kind == "unet" and self.depth:
            raise ValueError("the U-Net has no depth; use the lean encoder")
        return self


OBJECTIVE_VERSION = 2
"""Of the training by the paper's objective: raised with a change that no setting tells of, since
figures of before are then not those of now. 1 had a constant rate."""


class PixelFusionSettings(Section):
    """The paper's objective: the image f⁻¹(mean z) is the target, with a discriminator."""

    objective: Literal["pixels"] = "pixels"
    members: Annotated[int, Field(ge=2)] = 2
    """k, unless the command line says otherwise."""
    groups: Positive
    """Groups in the generated data set."""
    epochs: Positive
    batch_size: Annotated[int, Field(ge=2)] = 128
    learning_rate: Rate = 1e-3
    discriminator_steps: Positive = 5
    discriminator_filters: Positive = 64
    discriminator_layers: Positive = 3
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of E's passes and the discriminator's, as in the training section."""
    encoder: EncoderSettings = EncoderSettings(kind="unet", width=64)

    def quick(self, steps: int) -> PixelFusionSettings:
        """Return the budget of a trial in short."""
        groups = min(steps * self.batch_size, self.groups)
        return self.model_copy(update={"epochs": 1, "groups": groups})


class RecoveryFusionSettings(Section):
    """The recovery objective: E learns from the decoded predictions, then f and g join."""

    objective: Literal["recovery"] = "recovery"
    members: Annotated[int, Field(ge=2)] = 10
    """The largest group that the bundle serves; every size from 2 on is trained."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Groups of the largest size per step while f and g are frozen; of smaller groups there are
    more, so that a step always sees about as many images."""
    steps_per_epoch: Positive = 100
    epochs: Annotated[int, Field(ge=0)]
    learning_rate: Rate = 2e-3
    joint_batch_size: Annotated[int, Field(ge=2)] = 48
    joint_epochs: Annotated[int, Field(ge=0)]
    joint_learning_rate: Rate = 3e-4
    latent_weight: Annotated[float, Field(ge=0)] = 0.05
    normal_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy of the direct answers in joint training."""
    encoder: EncoderSettings = EncoderSettings(kind="lean", width=16)

    @model_validator(mode="after")
    def _something_to_do(self) -> RecoveryFusionSettings:
        if self.epochs + self.joint_epochs == 0:
            raise ValueError("epochs and joint_epochs are both 0: nothing would be trained")
        return self


FusionSettings = Annotated[
    Union[PixelFusionSettings, RecoveryFusionSettings],  # noqa: UP007 (pydantic reads it)
    Field(discriminator="objective"),
]


class Settings(Section):
    """Everything that a run depends on."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    """The run's folder inside the save directory."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: DataSettings
    network: NetworkSettings = NetworkSettings()
    training: TrainSettings
    fusion: FusionSettings

    @model_validator(mode="after")
    def _targets_exist(self) -> Settings:
        if self.network.kind == "plain" and isinstance(self.fusion, PixelFusionSettings):
            raise ValueError(NO_INVERSE)
        return self


def load_settings(path: Path) -> Settings:
    """Read and validate a settings file."""
    return parse_settings(read_json(path, "the settings file"), str(path))


def with_seed(settings: Settings, seed: int) -> Settings:
    """Return the settings of a run of its own with another seed."""
    raw = settings.model_dump(mode="json")
    return parse_settings({**raw, "name": f"{settings.name}-seed{seed}", "seed": seed}, "--seed")


def with_members(settings: Settings, members: int) -> Settings:
    """Return the settings for groups of k = `members`."""
    raw = settings.model_dump(mode="json")
    raw["fusion"]["members"] = members
    return parse_settings(raw, f"k = {members}")


def parse_settings(raw: Any, where: str) -> Settings:
    """Validate settings; `where` names their origin in errors."""
    return validated(Settings, raw, where, strict=True)


Validated = TypeVar("Validated", bound=BaseModel)


def validated(
    model: type[Validated], raw: Any, where: object, *, strict: bool = False
) -> Validated:
    """Return JSON values as a model.

    Args:
        model: what it should be.
        raw: JSON values.
        where: its origin, for errors.
        strict: refuse a number that is text or a truth value, as "3" or true; of models without
            validators that run before their fields'.
    """
    try:
        if strict:
            return model.model_validate_json(json.dumps(raw), strict=True)
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {describe(error, model)}") from error


def meant(given: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the nearest one, or all there are."""
    names = list(known)
    near = nearest(given, names)
    return f"did you mean {near!r}?" if near is not None else f"known: {', '.join(names)}"


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """Put the first fault of a validation error into one line."""
    faults = error.errors()
    # An unknown key is often a misspelt required one: say that first.
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    location = [str(part) for part in fault["loc"] if part not in ("pixels", "recovery")]
    key = ".".join(location)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        schema = model.model_json_schema()
        sections = [schema] if len(location) == 1 else schema["$defs"].values()
        known = {name for section in sections for name in section.get("properties", ())}
        near = nearest(location[-1], known - {location[-1]})
        return f"unknown key {key!r}{f': did you mean {near!r}?' if near else ''}{more}"
    if fault["type"] == "missing":
        return f"missing key {key!r}{more}"
    if fault["type"] in ("model_type", "dict_type"):
        return f"{key}: must be one JSON object{more}".removeprefix(": ")
    message = fault["msg"].removeprefix("Value error, ")
    given = fault.get("input")
    shown = f", got {given!r}" if isinstance(given, (str, int, float, bool, type(None))) else ""
    label = f"{key}: " if key else ""
    return f"{label}{message[0].lower() + message[1:]}{shown}{more}"
