"""The distributions are built, installed into empty environments, and used."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tools import release

pytestmark = pytest.mark.nightly


def test_both_distributions_are_fit_for_their_users(tmp_path: Path) -> None:
    assert release.main(["--draft", "--to", str(tmp_path / "dist")]) == 0
    assert len(list((tmp_path / "dist").iterdir())) == 4


def test_the_image_has_little_besides_python(tmp_path: Path) -> None:
    """What deploy/Dockerfile copies to Debian's Python, whose root has 51 MB."""
    dockerfile = (release.ROOT / "deploy" / "Dockerfile").read_text()
    (line,) = re.findall(r"^RUN pip install (.+--target.+)$", dockerfile, re.MULTILINE)
    target = tmp_path / "packages"
    words = line.replace("/opt/codedinvnet", str(target)).replace('"', "").split()
    release.run(sys.executable, "-m", "pip", "install", "-q", *words)
    assert not [name for name in release.NEVER if (target / name).exists()]
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    assert size < 68e6, f"{size / 1e6:.0f} MB, and with Python more than 120"
