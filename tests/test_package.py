from __future__ import annotations

import pytest

import codedinvnet
from codedinvnet.models import bundle


def test_public_names_are_listed_and_load() -> None:
    assert set(codedinvnet.__all__) <= set(dir(codedinvnet))
    for name in codedinvnet.__all__:
        assert getattr(codedinvnet, name).__name__ == name
    assert codedinvnet.load_bundle is bundle.load_bundle


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match=r"'codedinvnet' has no attribute 'load_bundel'"):
        codedinvnet.load_bundel  # type: ignore[attr-defined]  # noqa: B018
