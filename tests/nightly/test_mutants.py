"""Each fault of `mutants.py` makes the tests fail that it names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import codedinvnet
from tests.nightly.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
LIMIT = ("--timeout=60", "--timeout-method=thread")
"""A test that hangs has noticed it; the method ends its process whatever holds that up."""
FAILED = 1
"""What pytest returns if tests ran and some failed; whatever else it is, nothing was noticed."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source."""
    copy = tmp_path_factory.mktemp("src")
    package = Path(codedinvnet.__file__).parent
    shutil.copytree(package, copy / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_fault_is_noticed(mutant: Mutant, source: Path) -> None:
    file = source / "codedinvnet" / mutant.file
    sound = file.read_text()
    file.write_text(sound.replace(mutant.old, mutant.new))
    words = ("-m", "pytest", f"tests/{mutant.noticed_by}", "-x", "-p", "no:cacheprovider", *LIMIT)
    without_bytecode = {"PYTHONDONTWRITEBYTECODE": "1"}  # two of one second would be taken for one
    environment = {**os.environ, "PYTHONPATH": str(source), **without_bytecode}
    try:
        found = subprocess.run(
            (sys.executable, *words), cwd=ROOT, env=environment, capture_output=True, text=True
        )
    finally:
        file.write_text(sound)
    assert found.returncode == FAILED, found.stdout[-3000:]
