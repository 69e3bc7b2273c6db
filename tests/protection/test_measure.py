"""What backups are worth, and which one is recommended."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from codedinvnet.protection.costs import Interval
from codedinvnet.protection.measure import Answers, Candidate, recommend, report, table

COUNT = 2000


def ms(median: float) -> Interval:
    """Return a time that is known well."""
    return Interval(median, 0.99 * median, 1.01 * median)


def answers(covered: float, agreement: float) -> Answers:
    """Return answers whose surest share agrees always, and so many of all."""
    number = np.arange(COUNT)
    return Answers(np.where(number < covered * COUNT, 0.9, 0.4), number < agreement * COUNT)


def candidate(name: str, covered: float, median: float, agreement: float = 0.9) -> Candidate:
    """Return a measured backup of a model that takes 10 ms."""
    its = answers(covered, agreement)
    return Candidate(name, "", ms(median), ms(10), its, its)


@pytest.mark.parametrize(
    ("backups", "chosen", "limit"),
    [
        ([("a", 0.70, 2.0), ("b", 0.69, 1.0)], "b", 0.01),  # within two points, and quicker
        ([("a", 0.70, 2.0), ("b", 0.60, 1.0)], "a", 0.01),
        ([("a", 0.70, 1.0), ("b", 0.71, 1.001)], "b", 0.01),  # as quick by their intervals
        ([("a", 0.70, 2.0), ("b", 0.80, 5.2)], "a", 0.01),  # more than half of the model's time
        ([("a", 0.70, 5.2)], None, None),
        ([("a", 0.30, 2.0)], None, None),  # too few late queries
        ([("a", 0.30, 2.0, 0.98)], "a", 0.05),  # enough of them at a higher limit
        ([("a", 0.0, 2.0, 0.2)], None, None),  # no better than always one class of four
    ],
)
def test_the_quickest_of_those_close_to_the_best_is_recommended(
    backups: list[tuple[Any, ...]], chosen: str | None, limit: float | None
) -> None:
    found = recommend([candidate(*backup) for backup in backups], 0.25)
    assert (found.backup, found.limit) == (chosen, limit)
    assert ("use hedging" in found.reason) == (chosen is None)


def test_the_reason_is_that_one_answer_does_as_well_if_it_does() -> None:
    reason = recommend([candidate("a", 0.95, 2.0, 0.95)], 0.96).reason
    assert reason.startswith("one and the same answer to all inputs would agree 96 % of the time")


def test_test_inputs_have_no_part_in_the_choice() -> None:
    first, second = candidate("a", 0.7, 2.0), candidate("b", 0.5, 1.0)
    luck = dataclasses.replace(second, test=answers(1.0, 1.0))
    assert recommend([first, luck], 0.25).backup == "a"


def test_a_row_tells_coverage_by_thresholds_of_the_calibration() -> None:
    found = candidate("a", 0.7, 2.0)
    row = report(dataclasses.replace(found, test=answers(0.6, 0.9)), 10)
    covered = row["coverage"]["0.99"]
    assert covered["threshold"] == 0.9
    assert covered["coverage"].value == pytest.approx(0.6)
    assert covered["agreement"].value == 1.0
    assert row["backup_workers"] == 2
    assert row["limits"]["0.01"]["coverage"].value == pytest.approx(0.6)
    assert "note" not in row
    lines = table([row]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "60.0 (57.8 to 62.1)" in lines[-1]
    assert "MISSED" not in lines[-1]


def test_the_table_marks_what_the_test_inputs_miss() -> None:
    found = candidate("a", 0.7, 2.0)
    unlucky = Answers(np.full(COUNT, 0.9), np.arange(COUNT) % 20 > 0)
    row = report(dataclasses.replace(found, test=unlucky), 10)
    assert row["coverage"]["0.99"]["missed"]
    assert not row["coverage"]["0.95"]["missed"]
    assert "95.0 (94.0 to 95.9) agree, MISSED" in table([row])
