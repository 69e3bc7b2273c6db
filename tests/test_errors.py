from __future__ import annotations

import pytest

from codedinvnet.common.errors import nearest


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("mnits", "mnist"),
        ("CIFAR-10", "cifar10"),
        ("fashon", "Fashion"),
        ("imagenet", None),
        ("", None),
    ],
)
def test_the_nearest_name_is_found_whatever_its_case(given: str, expected: str | None) -> None:
    assert nearest(given, ["mnist", "cifar10", "Fashion"]) == expected
