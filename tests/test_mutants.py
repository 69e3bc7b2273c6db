"""The list of faults that `make nightly` makes stays one of this source and these tests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import codedinvnet
from tests.nightly.mutants import MUTANTS

SOURCE, TESTS = Path(codedinvnet.__file__).parent, Path(__file__).parent


def test_what_each_fault_replaces_is_there_once() -> None:
    found = {one.name: (SOURCE / one.file).read_text().count(one.old) for one in MUTANTS}
    assert found == dict.fromkeys(found, 1)
    assert set(Counter(one.name for one in MUTANTS).values()) == {1}


def test_the_tests_that_notice_them_are_there() -> None:
    for mutant in MUTANTS:
        file, _, name = mutant.noticed_by.partition("::")
        assert f"def {name}" in (TESTS / file).read_text()
