from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.common.config import (
    LARGEST_MOSAIC,
    PixelFusionSettings,
    RecoveryFusionSettings,
    Settings,
    load_settings,
    parse_settings,
    validated,
)
from codedinvnet.common.errors import UserError
from tests.conftest import put, tiny_settings

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted([*CONFIGS.glob("*.json"), *CONFIGS.glob("paper/*.json")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_settings_load(path: Path) -> None:
    settings = load_settings(path)
    assert settings.training.epochs >= 1
    assert settings.network.blocks


@pytest.mark.parametrize(
    ("objective", "expected"),
    [("pixels", PixelFusionSettings), ("recovery", RecoveryFusionSettings)],
)
def test_objective_chooses_the_section(objective: str, expected: type) -> None:
    settings = parse_settings(tiny_settings(objective), "here")
    assert isinstance(settings.fusion, expected)
    assert Settings.model_validate(settings.model_dump(mode="json")) == settings


def complaint(raw: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_settings(raw, "here.json")
    message = str(caught.value)
    assert message.startswith("here.json: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("objective", "key", "nearest"),
    [
        ("recovery", "trainning", "training"),
        ("recovery", "data.paddding", "padding"),
        ("recovery", "network.coeff", "coefficient"),
        ("recovery", "training.learning_rte", "learning_rate"),
        ("recovery", "fusion.joint_epoch", "joint_epochs"),
        ("recovery", "fusion.encoder.side_feature", "side_features"),
        ("pixels", "fusion.discriminator_step", "discriminator_steps"),
        ("pixels", "fusion.encoder.witdh", "width"),
    ],
)
def test_unknown_key_names_the_nearest(objective: str, key: str, nearest: str) -> None:
    message = complaint(put(tiny_settings(objective), key, 1))
    assert f"unknown key {key!r}" in message
    assert f"did you mean {nearest!r}" in message


def test_missing_key() -> None:
    raw = tiny_settings()
    del raw["training"]
    assert "missing key 'training'" in complaint(raw)


@pytest.mark.parametrize(
    ("objective", "key", "value"),
    [
        ("recovery", "fusion.members", 1),
        ("recovery", "training.epochs", "3"),
        ("recovery", "training.epochs", True),
        ("recovery", "training.learning_rate", float("nan")),
        ("recovery", "training.mixup", "both"),
        ("recovery", "network.coefficient", 1.0),
        ("recovery", "network.blocks", []),
        ("recovery", "data.padding", -1),
        ("recovery", "data", "mnist"),
        ("recovery", "seed", 2**31),
        ("recovery", "name", "a/b"),
        ("recovery", "fusion.objective", "gan"),
        ("pixels", "fusion.groups", 0),
    ],
)
def test_bad_value_names_the_key(objective: str, key: str, value: Any) -> None:
    message = complaint(put(tiny_settings(objective), key, value))
    assert key.removesuffix(".objective") in message


@pytest.mark.parametrize("kind", ["unet", "lean"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("more_for_few", True), ("few_width", 4), ("cell_width", 4)],
)
def test_what_only_a_mosaic_has_is_refused(kind: str, key: str, value: int) -> None:
    encoder = {"kind": kind, "width": 4, key: value}
    assert f"no {key}" in complaint(put(tiny_settings(), "fusion.encoder", encoder))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"few_width": 4}, "set it, too"),
        ({"more_for_few": True, "cell_width": 4}, "set side_features, or leave cell_width out"),
    ],
)
def test_options_of_stages_that_do_nothing_are_refused(options: dict[str, Any], told: str) -> None:
    encoder = {"kind": "mosaic", "width": 4, **options}
    assert told in complaint(put(tiny_settings(), "fusion.encoder", encoder))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("fusion.head_hidden", 0, "set head_hidden"),
        ("fusion.latent_weight", 0.05, "set latent_weight to 0"),
        ("fusion.members", LARGEST_MOSAIC + 1, f"at most {LARGEST_MOSAIC} members"),
    ],
)
def test_what_a_mosaic_cannot_do_is_refused(key: str, value: float, told: str) -> None:
    raw = put(tiny_settings(), "fusion.encoder", {"kind": "mosaic", "width": 4})
    raw = put(raw, "fusion.latent_weight", 0)
    assert parse_settings(raw, "settings").fusion.encoder.kind == "mosaic"
    assert told in complaint(put(raw, key, value))


@pytest.mark.parametrize(
    ("encoder", "told"),
    [
        ({"kind": "mosaic", "width": 4}, "a mosaic's latent is no mean"),
        ({"kind": "lean", "width": 4, "side_features": 3}, "set them to 0"),
    ],
)
def test_what_pixels_cannot_train_is_refused(encoder: dict[str, Any], told: str) -> None:
    raw = tiny_settings("pixels")
    lean = put(raw, "fusion.encoder", {"kind": "lean", "width": 4})
    assert parse_settings(lean, "settings").fusion.encoder.kind == "lean"
    assert told in complaint(put(raw, "fusion.encoder", encoder))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{\n  "name": "x",\n  name\n}', "is not JSON: line 3"),
        (json.dumps(tiny_settings())[:100].encode(), "is not JSON: line 1"),
        (b"", "is not JSON"),
        (b"[1, 2]", "must be one JSON object"),
        (bytes(range(256)) * 4, "it is not text"),
        (None, "No such file"),
    ],
)
def test_unreadable_file(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_settings(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "told"), [([1], "here: must be"), ({**tiny_settings(), "data": 3}, "here: data: ")]
)
def test_what_is_no_object_is_told_without_words_of_python(raw: Any, told: str) -> None:
    with pytest.raises(UserError, match=f"{told}.*one JSON object") as caught:
        validated(Settings, raw, "here")
    assert "dictionary" not in str(caught.value)
