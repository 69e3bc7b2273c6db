"""Values of a settings file, which are not taken for those of another kind."""

from __future__ import annotations

from typing import Any

import pytest

from codedinvnet.config import Section, parse_settings, validated
from codedinvnet.errors import UserError
from tests.conftest import tiny_settings


@pytest.mark.parametrize(
    ("section", "value", "told"),
    [
        ("training", {"epochs": True}, "epochs: true and false are no numbers, got True"),
        ("training", {"batch_size": "64"}, "batch_size: text is no number, got '64'"),
        ("training", {"learning_rate": "1e-3"}, "learning_rate: text is no number, got '1e-3'"),
        ("training", {"flip": 1}, "flip: must be true or false, got 1"),
        ("training", {"flip": "yes"}, "flip: must be true or false, got 'yes'"),
        ("training", {"flip": 1, "shift": "2"}, "flip: must be true or false, got 1 (and 1 more)"),
        ("network", {"blocks": [1, "1"]}, "blocks: text is no number"),
        ("network", {"blocks": [1, True]}, "blocks: true and false are no numbers"),
        ("network", {"coefficient": "0.9"}, "coefficient: text is no number, got '0.9'"),
        ("fusion", {"encoder": {"kind": "unet", "width": "4"}}, "encoder.width: text is no number"),
    ],
)
def test_text_numbers_and_true_are_three_things(
    section: str, value: dict[str, Any], told: str
) -> None:
    raw = tiny_settings("pixels")
    raw[section] |= value
    with pytest.raises(UserError) as caught:
        parse_settings(raw, "here")
    assert str(caught.value).startswith(f"here: {section}.{told}")


def test_names_that_are_numbers_and_numbers_of_another_form_are_taken() -> None:
    class Rates(Section):
        of: dict[int, float]
        epochs: int = 0
        anything: Any = None

    found = validated(Rates, {"of": {"2": 1, "10": 0.5}, "epochs": 3.0, "anything": True}, "here")
    assert found == Rates(of={2: 1.0, 10: 0.5}, epochs=3, anything=True)
    with pytest.raises(UserError, match="here: of: text is no number"):
        validated(Rates, {"of": {"2": "1"}}, "here")
