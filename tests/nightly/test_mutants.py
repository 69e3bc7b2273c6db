"""Each fault of `mutants.py` makes the tests fail that it names, and fits the source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import codedinvnet
from tests.nightly.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
SOURCE = Path(codedinvnet.__file__).parent
LIMIT = ("--timeout=60", "--timeout-method=thread")
"""A test that hangs has noticed it; the method ends its process whatever holds that up."""
FAILED = 1
"""What pytest returns if tests ran and some failed; whatever else it is, nothing was noticed."""


def test_what_each_fault_replaces_is_there_once() -> None:
    found = {one.name: (SOURCE / one.file).read_text().count(one.old) for one in MUTANTS}
    assert found == dict.fromkeys(found, 1)
    assert set(Counter(one.name for one in MUTANTS).values()) == {1}


def test_the_tests_that_notice_them_are_there() -> None:
    for mutant in MUTANTS:
        file, _, name = mutant.noticed_by.partition("::")
        sought = f"def {name}(" if name else "def test_"
        assert sought in (ROOT / "tests" / file).read_text()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source."""
    copy = tmp_path_factory.mktemp("src")
    shutil.copytree(SOURCE, copy / SOURCE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.mark.nightly
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
