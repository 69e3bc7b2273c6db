from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from codedinvnet.common.config import load_settings, parse_settings
from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageSet
from codedinvnet.nn.fusion import PatchDiscriminator
from codedinvnet.training.images import check_images, check_same_images, check_settings
from tests.conftest import tiny_settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHAPES = {"mnist": (1, 28, 28), "fashion": (1, 28, 28), "cifar10": (3, 32, 32)}
Changes: TypeAlias = dict[str, dict[str, Any]]


def images(shape: tuple[int, int, int] = (1, 28, 28), count: int = 800) -> ImageSet:
    """Return images that take no memory: one byte, seen from everywhere."""
    return ImageSet(
        name="none",
        classes=tuple("abcdefghij"),
        images=torch.zeros(1, dtype=torch.uint8).expand(count, *shape),
        labels=torch.zeros(1, dtype=torch.int64).expand(count),
        source="nowhere",
    )


def check(changes: Changes, members: int, objective: str = "recovery") -> None:
    raw = tiny_settings(objective)
    for section, values in changes.items():
        raw[section] |= values
    check_settings(parse_settings(raw, "here"), images(), members)


@pytest.mark.parametrize(
    "name",
    sorted(
        str(path.relative_to(CONFIGS))
        for path in CONFIGS.rglob("*.json")
        if path.parent.name in ("configs", "alone")
    ),
)
def test_shipped_settings_pass(name: str) -> None:
    settings = load_settings(CONFIGS / name)
    source = images(SHAPES[settings.data.name], 60_000)
    for members in (2, 4, 10):
        check_settings(settings, source, members)


@pytest.mark.parametrize(
    ("shape", "classes", "said"),
    [
        ((1, 32, 32), ("a", "b", "c"), r"\(1, 28, 28\), but the network takes \(1, 32, 32\)"),
        ((1, 28, 28), ("a", "c"), "other classes than the network: label 1 is b instead of c"),
        ((1, 28, 28), ("a", "b", "c", "d"), "label 3 is none instead of d"),
        ((1, 28, 28), ("a", "b"), "label 2 is c instead of none"),
    ],
)
def test_images_of_other_shapes_or_classes_are_refused(
    shape: tuple[int, ...], classes: tuple[str, ...], said: str
) -> None:
    pixels = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    source = ImageSet("own", ("a", "b", "c"), pixels, torch.arange(3), "there")
    check_images(source, (1, 28, 28), ("a", "b", "c"), "the network")
    with pytest.raises(UserError, match=said):
        check_images(source, shape, classes, "the network")


def test_images_in_another_order_are_not_the_same() -> None:
    pixels = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 1, 2, 2)
    source = ImageSet("own", ("a", "b", "c"), pixels, torch.arange(3), "there")
    order = torch.tensor([1, 0, 2])
    other = replace(source, images=pixels[order], labels=source.labels[order])
    check_same_images(source, source.digest(), "the network")
    for changed in (other, replace(source, labels=torch.zeros(3, dtype=torch.int64))):
        with pytest.raises(UserError, match="there has other training images than the network"):
            check_same_images(changed, source.digest(), "the network")


@pytest.mark.parametrize(
    ("members", "changes", "told"),
    [
        (1, {}, "k = 1: fusion.members"),
        (6, {"data": {"validation": 5}}, "groups of 6 cannot be drawn from 5 validation images"),
        (6, {"data": {"validation": 795}}, "groups of 6 cannot be drawn from 5 training images"),
        (4, {"data": {"validation": 800}}, "cannot set 800 of 800 images aside"),
        (4, {"data": {"padding": 4}}, "lean encoder needs sides divisible by 8, got 36x36"),
        (4, {"data": {"padding": 1}}, "network settings do not fit 1x30x30 inputs"),
    ],
)
def test_what_does_not_fit_is_refused(members: int, changes: Changes, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check(changes, members)


def test_pixels_need_groups_for_one_step() -> None:
    fusion = {"batch_size": 20, "discriminator_steps": 3}
    check({"fusion": {"groups": 60, **fusion}}, 2, "pixels")
    with pytest.raises(UserError, match="groups 59 do not make one step"):
        check({"fusion": {"groups": 59, **fusion}}, 2, "pixels")


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_a_discriminator_is_refused_if_nothing_is_left_of_the_images(layers: int) -> None:
    changed = {"fusion": {"discriminator_layers": layers}}
    discriminator = PatchDiscriminator(1, 2, filters=4, layers=layers)
    try:
        discriminator(torch.zeros(2, 2, 1, 32, 32), torch.zeros(2, 1, 32, 32))
    except RuntimeError:
        with pytest.raises(UserError, match=f"layers {layers} are too many for images of 32"):
            check(changed, 2, "pixels")
    else:
        check(changed, 2, "pixels")
