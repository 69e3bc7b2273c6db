"""Settings files of the paper's published code, translated into ours.

What that code does counts, and not what its keys say: its Adam reads no weight decay, `mixup` does
nothing without `mixup_hidden`, and a fifth of the images is set aside whatever the file holds.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from codedinvnet.errors import UserError

DATA: dict[str, dict[str, Any]] = {
    "mnist": {"name": "mnist", "padding": 2, "validation": 12_000},
    "fashion": {"name": "fashion", "padding": 2, "validation": 12_000},
    "cifar10": {"name": "cifar10", "validation": 10_000},
    "imagenet": {"name": "imagenet", "image_size": 224},
}
AUGMENTED: dict[str, dict[str, Any]] = {"cifar10": {"flip": True, "shift": 4}}
"""How the training images vary: its files have no key for that."""
BATCH = 128
BATCHES = {"mnist": 375, "fashion": 375, "cifar10": 312, "imagenet": 400}
"""Whole batches of training images, each of which is cut into groups once; ImageNet's are cut
short."""
PASSES = 5
"""Over the groups in one epoch of the published code: one for each step of its discriminator."""


def translate_published(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a settings file of the published code as one of ours; warn once of keys not used.

    Args:
        raw: what the file holds.
        path: the file, for messages and for the run's name.

    Raises:
        UserError: if its image set is not one of the paper's.
    """
    used: set[tuple[str, ...]] = set()

    def get(*keys: str, default: Any) -> Any:
        value: Any = raw
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                return default
            value = value[key]
        used.add(keys)
        return value

    dataset = str(get("data_processing", "dataset", default="mnist"))
    if dataset not in DATA:
        known = ", ".join(DATA)
        raise UserError(f"{path}: data_processing.dataset: unknown {dataset!r} (known: {known})")
    kind = get("name", "iname", default="iresnet")
    inet = ("train", "inet")
    setting = ("train", "training_setting")
    epochs = get(*setting, "epochs", default=100)
    members = get("train", "model", "nactors", default=2)
    groups = BATCHES[dataset] * (BATCH // members if _counts(members) else 1)
    translated = {
        "name": re.sub(r"[^\w.-]", "-", f"{path.stem}-published").lstrip("-."),
        "seed": get("train", "initialization", "seed", default=0),
        "data": DATA[dataset],
        "network": {
            "kind": kind,
            "blocks": get(*inet, "nBlocks", default=[7, 7, 7]),
            "strides": get(*inet, "nStrides", default=[1, 2, 2]),
            "hidden": get(*inet, "nChannels", default=[32, 64, 128]),
            "coefficient": get(*inet, "coeff", default=0.9),
            "initial_squeeze": get(*inet, "init_ds", default=2),
            "head_pooled": True,
        },
        "training": {
            "epochs": epochs,
            "weight_decay": 0.0,
            "mixup": "manifold" if get(*inet, "mixup_hidden", default=True) else "none",
            "mixup_alpha": get(*inet, "mixup_alpha", default=1.0),
            "init_batch": get(*inet, "init_batch", default=1024),
            **AUGMENTED.get(dataset, {}),
        },
        "fusion": {
            "objective": "pixels",
            "members": members,
            "groups": max(1, groups),
            "epochs": PASSES * epochs if _counts(epochs) else epochs,
            "discriminator_filters": get("train", "fnet", "ndf", default=64),
            "encoder": {"kind": "unet", "width": get("train", "fnet", "ngf", default=64)},
        },
    }
    unused = sorted(".".join(keys) for keys in _leaves(raw) if keys not in used)
    if unused:
        warnings.warn(
            f"{path} is a settings file of the published code; not used: {', '.join(unused)}",
            stacklevel=3,
        )
    return translated


def _counts(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _leaves(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict):
        return [leaf for key, sub in value.items() for leaf in _leaves(sub, (*prefix, str(key)))]
    return [prefix]
