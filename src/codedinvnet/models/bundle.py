"""Bundles: a trained coded model in a folder, with what a user and a server must know of it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from codedinvnet.common.config import Section, Settings, validated
from codedinvnet.common.devices import first_tensor
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import file_digest, read_json, write_json
from codedinvnet.models.checkpoint import (
    load_checkpoint,
    load_modules,
    module_tensors,
    save_checkpoint,
)
from codedinvnet.models.coded import CodedModel, ModelSettings, build_model, decode_missing
from codedinvnet.nn.lipschitz import fold

WEIGHTS, DESCRIPTION = "weights.safetensors", "bundle.json"
VALIDATION = "validation.safetensors"
"""Digests of the images that were set aside for validation."""
_DIGESTS = "digests"
BESIDE = Path(__file__).parents[3] / "bundles" / "src" / "codedinvnet_bundles"
"""Where the shipped bundles lie in a clone of the repository."""


BUNDLE_VERSION = 2
"""Of bundle.json. Encoders of version 1 contained a small classifier of each single image."""


class InputDescription(Section):
    """What the model takes."""

    datatype: Literal["UINT8"] = "UINT8"
    shape: tuple[int, int, int]
    """(C, H, W) of one image as it is sent."""
    scaling: float = 1 / 255
    """Factor that the model applies to UINT8 values; floats in 0..1 are taken as they are. It is
    told, not read: there is no other."""
    padding: int
    """Zero pixels that the model adds on every side."""


class Provenance(Section):
    """Where the weights come from."""

    command: str
    commit: str
    data: str
    images: str
    """The digest of the training images, in their order."""
    machine: str
    seconds: float
    settings: Settings


class BundleInfo(Section):
    """The contents of bundle.json."""

    format_version: int
    name: str
    input: InputDescription
    classes: tuple[str, ...]
    group_sizes: Annotated[tuple[int, ...], Field(min_length=1)]
    """The m that it serves."""
    model: ModelSettings
    provenance: Provenance
    figures: dict[str, Any]

    def check_size(self, letter: str, size: int) -> None:
        """Raise UserError if the bundle does not serve groups of a size, named by its letter."""
        sizes = self.group_sizes
        if size not in sizes:
            served = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]} only"
            raise UserError(
                f"bundle {self.name!r} serves groups of {served}, got {letter} = {size}"
            )


class Bundle:
    """A loaded bundle: network f, head g and fusion encoder E, for inference.

    Images are uint8 in 0..255, or floats in 0..1, of the shape `info.input.shape`. Nothing here
    keeps gradients.

    Args:
        info: its description.
        model: its weights.
        folder: where it was loaded from.
    """

    def __init__(self, info: BundleInfo, model: CodedModel, folder: Path = Path()) -> None:
        self.info = info
        self.folder = folder
        self.model = model.eval()
        self.model.requires_grad_(False)

    def __repr__(self) -> str:
        info, sizes = self.info, self.info.group_sizes
        image = "x".join(map(str, info.input.shape))
        latent = "x".join(map(str, self.model.latent_shape))
        return (
            f"Bundle({info.name!r}: {len(info.classes)} classes, images {image}, latents {latent}, "
            f"{info.model.network.kind}, {info.model.encoder.kind} encoder, "
            f"groups of {sizes[0]} to {sizes[-1]})"
        )

    def digest(self) -> str:
        """Return the digest of the weights, as `weights_digest` does."""
        return file_digest(self.folder / WEIGHTS)

    def validation_digests(self) -> Tensor:
        """Return the digests (V,) int64 of the images that were set aside for validation.

        They are those of `ImageSource.image_digests`.

        Raises:
            UserError: if their file is missing or damaged.
        """
        return load_checkpoint(self.folder / VALIDATION)[0][_DIGESTS]

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Embed images (B, C, H, W) as latents (B, *latent_shape)."""
        return self.model.embed(self.checked(images, 4))

    @torch.inference_mode()
    def classify(self, latents: Tensor) -> Tensor:
        """Return class probabilities (B, classes) of latents (B, *latent_shape)."""
        return self.model.classify(self._latents(latents)).softmax(1)

    @torch.inference_mode()
    def invert(self, latents: Tensor, tolerance: float = 1e-4) -> Tensor:
        """Return the images (B, C, H, W), floats about 0..1, of latents (B, *latent_shape).

        Args:
            latents: `embed`'s, or any mixture of them.
            tolerance: the largest residual of a block, per element.

        Raises:
            UserError: if f is a plain network, which has no inverse.
            NotConverged: if f has no inverse there, as where its norm is not bounded.
        """
        x = self.model.inverse(self._latents(latents), tolerance)
        border = self.info.input.padding
        return x[..., border : x.shape[-2] - border, border : x.shape[-1] - border]

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Do the parity worker's work for groups of images (B, m, C, H, W).

        Returns:
            The parity's latent z_p, (B, *latent_shape).

        Raises:
            UserError: if the bundle takes no such images, or no groups of m.
        """
        checked = self.checked(images, 5)
        self.info.check_size("m", checked.shape[1])
        return self.model.encode(checked)

    @torch.inference_mode()
    def decode(self, parity: Tensor, others: Tensor) -> Tensor:
        """Return class probabilities (B, classes) of each group's missing member.

        Args:
            parity: what `encode` returned.
            others: latents (B, m − 1, *latent_shape) of the members that answered, in any order.

        Raises:
            UserError: if the latents have other shapes.
        """
        shape = self._latents(parity).shape
        if others.ndim != 5 or (len(others), *others.shape[2:]) != tuple(shape):
            raise UserError(
                "the others' latents must have shape "
                f"({shape[0]}, m - 1, {', '.join(map(str, shape[1:]))}), got {tuple(others.shape)}"
            )
        return self.model.classify(decode_missing(parity, others)).softmax(1)

    def _latents(self, latents: Tensor) -> Tensor:
        shape = self.model.latent_shape
        if tuple(latents.shape[1:]) != shape:
            raise UserError(
                f"latents must have shape (B, {', '.join(map(str, shape))}), as embed returns "
                f"them, got {tuple(latents.shape)}"
            )
        return latents

    def checked(self, images: Tensor, rank: int) -> Tensor:
        """Return the images on the model's device if the model can take them.

        Raises:
            UserError: if their rank, shape, type or range is wrong.
        """
        shape = self.info.input.shape
        if images.ndim != rank or tuple(images.shape[-3:]) != shape:
            leading = "B, m" if rank == 5 else "B"
            wanted = ", ".join(map(str, shape))
            raise UserError(
                f"images must have shape ({leading}, {wanted}), got {tuple(images.shape)}"
            )
        images = images.to(first_tensor(self.model).device)
        if images.dtype == torch.uint8:
            return images
        if not images.is_floating_point():
            raise UserError(f"images must be uint8 or floats in 0..1, got {images.dtype}")
        if images.numel() and not bool(((images >= 0) & (images <= 1)).all()):
            raise UserError("images must be uint8, or floats in 0..1 without NaN")
        return images.float()


def shipped_bundles() -> tuple[str, ...]:
    """Return the names of the shipped bundles."""
    return tuple(_shipped())


def _shipped() -> dict[str, Path]:
    """Return name -> folder, in the clone that this file lies in or in their distribution."""
    places, installed = [BESIDE], find_spec("codedinvnet_bundles")
    if installed is not None:
        places += map(Path, installed.submodule_search_locations or ())
    root = next((place for place in places if place.is_dir()), None)
    found = sorted(root.glob(f"*/{DESCRIPTION}")) if root else []
    return {path.parent.name: path.parent for path in found}


def bundle_folder(name: str | Path) -> Path:
    """Return the folder of a bundle, by the name of a shipped one or its own path."""
    folder, shipped = Path(name), _shipped()
    if str(name) in shipped:
        return shipped[str(name)]
    if not (folder / DESCRIPTION).is_file():
        raise UserError(
            f"no bundle {str(name)!r}: neither a folder with {DESCRIPTION} nor a shipped one "
            f"({', '.join(shipped) or 'pip install codedinvnet-bundles'})"
        )
    return folder


def weights_digest(name: str | Path) -> str:
    """Return a short digest of a bundle's weights, which names them in results."""
    return file_digest(bundle_folder(name) / WEIGHTS)


def usable_device(device: torch.device | str) -> torch.device:
    """Return a device that is there."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # as PyTorch has it
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot use the device {str(device)!r}: {reason}") from error
    return found


def bundle_info(name: str | Path) -> BundleInfo:
    """Return the description of a bundle, by the name of a shipped one or its folder."""
    path = bundle_folder(name) / DESCRIPTION
    raw = read_json(path)
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != BUNDLE_VERSION:
        raise UserError(
            f"{path} has format version {version}, and this release reads version "
            f"{BUNDLE_VERSION} alone: train the bundle again with `codedinvnet reproduce`, by "
            "settings like those in configs/alone"
        )
    return validated(BundleInfo, raw, path)


def load_bundle(name: str | Path, device: torch.device | str = "cpu") -> Bundle:
    """Load a bundle by the name of a shipped one, or from a folder.

    On a GPU decode with `codedinvnet.common.devices.use_whole_float32`, as the command line does.

    Raises:
        UserError: if there is none, it is damaged (NaN weights included) or of
            another format version, or this machine has no such device.
    """
    device = usable_device(device)
    folder, info = bundle_folder(name), bundle_info(name)
    model = build_model(info.model)
    fold(model)
    tensors, _ = load_checkpoint(folder / WEIGHTS)
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{folder / WEIGHTS} is damaged: {key} has values that are not finite")
    load_modules({"model": model}, tensors, folder / WEIGHTS)
    return Bundle(info, model.to(device), folder)


def save_bundle(
    folder: Path, info: BundleInfo, model: CodedModel, validation_digests: Tensor
) -> None:
    """Write a bundle; the model's constrained convolutions are folded first, in place.

    The description of a bundle that was there goes first, so that whatever a kill leaves is no
    bundle, rather than new weights with old figures.

    Args:
        folder: where it goes.
        info: its description.
        model: its weights.
        validation_digests: what `Bundle.validation_digests` shall return.
    """
    fold(model)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    save_checkpoint(folder / WEIGHTS, module_tensors({"model": model}), {"bundle": info.name})
    kept = {_DIGESTS: validation_digests.sort().values}
    save_checkpoint(folder / VALIDATION, kept, {"bundle": info.name})
    write_description(folder, info)


def write_description(folder: Path, info: BundleInfo) -> None:
    """Write bundle.json."""
    write_json(folder / DESCRIPTION, info.model_dump(mode="json"))
