from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.common.config import (
    PixelFusionSettings,
    RecoveryFusionSettings,
    Settings,
    load_settings,
    parse_settings,
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


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("recovery", {"trainning": 1}, "unknown key 'trainning': did you mean 'training'"),
    ("recovery", {"fusion.encoder.widht": 1}, "did you mean 'width'"),
    ("pixels", {"fusion.discriminator_step": 1}, "did you mean 'discriminator_steps'"),
    ("recovery", {"fusion.members": 1}, "fusion.members"),
    ("recovery", {"training.epochs": "3"}, "training.epochs"),
    ("recovery", {"training.epochs": True}, "training.epochs"),
    ("recovery", {"training.learning_rate": float("nan")}, "training.learning_rate"),
    ("recovery", {"training.mixup": "both"}, "training.mixup"),
    ("recovery", {"network.coefficient": 1.0}, "network.coefficient"),
    ("recovery", {"network.blocks": []}, "network.blocks"),
    ("recovery", {"data.padding": -1}, "data.padding"),
    ("recovery", {"data": "mnist"}, "data: must be one JSON object"),
    ("recovery", {"seed": 2**31}, "seed"),
    ("recovery", {"name": "a/b"}, "name"),
    ("recovery", {"fusion.objective": "gan"}, "fusion"),
    ("pixels", {"fusion.groups": 0}, "fusion.groups"),
    ("recovery", {"fusion.encoder.kind": "mosaic"}, "fusion.encoder.kind"),
    ("recovery", {"fusion.encoder": {"kind": "unet", "width": 4, "depth": 1}}, "has no depth"),
]


def changed(objective: str, values: dict[str, Any]) -> dict[str, Any]:
    raw = tiny_settings(objective)
    for key, value in values.items():
        raw = put(raw, key, value)
    return raw


@pytest.mark.parametrize(("objective", "values", "told"), REFUSED)
def test_what_no_settings_may_have_is_told_with_its_key(
    objective: str, values: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=rf"^here\.json: .*{re.escape(told)}") as caught:
        parse_settings(changed(objective, values), "here.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("objective", ["pixels", "recovery"])
@pytest.mark.parametrize("kind", ["lean", "unet"])
def test_both_objectives_train_both_encoders(objective: str, kind: str) -> None:
    values = {"fusion.encoder": {"kind": kind, "width": 4}}
    assert parse_settings(changed(objective, values), "settings").fusion.encoder.kind == kind


def test_a_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path, raw = tmp_path / "own.json", tiny_settings()
    path.write_text(json.dumps(raw))
    assert load_settings(path).name == raw["name"]
    path.write_text(json.dumps(raw)[:100])
    with pytest.raises(UserError, match=r"own\.json is not JSON: .*line 1"):
        load_settings(path)
    for wrong in ([1, 2], {key: value for key, value in raw.items() if key != "training"}):
        with pytest.raises(UserError, match=r"must be one JSON object|missing key 'training'"):
            parse_settings(wrong, "here")
