"""The distributions are built, installed into empty environments, and used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import release

pytestmark = pytest.mark.nightly


def test_both_distributions_are_fit_for_their_users(tmp_path: Path) -> None:
    assert release.main(["--draft", "--to", str(tmp_path / "dist")]) == 0
    assert len(list((tmp_path / "dist").iterdir())) == 4
