"""Simulated services that keep a limit on disagreement."""

from __future__ import annotations

from typing import Any

import pytest

from codedinvnet.errors import UserError
from codedinvnet.models.bundle import load_bundle
from codedinvnet.simulation.engine import Records, Simulation
from codedinvnet.simulation.plan import Candidate, calibrated
from codedinvnet.simulation.releasing import coverages
from codedinvnet.simulation.scenario import Scenario
from codedinvnet.trust.calibration import DECODED, load_calibration
from tests.simulation.scenarios import scenario


def limited(limit: float | None, **changes: Any) -> Scenario:
    """Return a coded service one of whose workers holds every answer back."""
    own: dict[str, Any] = {"policy": "coded", "k": 4, "workers": 5, "qps": 100, "batch": 4}
    held = [{"kind": "hold", "worker": 0, "delay": {"ms": 300}}]
    own |= {"bundle": "fashion", "stragglers": held, "queries": 3000}
    return scenario(**{**own, "max_disagreement": limit, **changes})


def run(limit: float | None, **changes: Any) -> Records:
    return Simulation(limited(limit, **changes)).run()


@pytest.mark.parametrize("limit", [0.005, 0.02, 0.3])
def test_as_many_answers_are_released_as_the_calibration_says(limit: float) -> None:
    bundle = load_bundle("fashion")
    curve = load_calibration(bundle.folder, bundle.digest()).curve("coded-invnet", 4, DECODED)
    assert curve is not None
    told = coverages(limited(limit))[4]
    place = curve.thresholds.tolist().index(told.threshold)
    assert told.share == curve.released[place] / curve.released[-1]
    assert told.disagreement == curve.disagreed[place] / curve.released[place] <= limit
    everything, some = run(None), run(limit)
    share = some.decoded.sum() / everything.decoded.sum()
    assert share == pytest.approx(told.share, abs=0.07)


def test_what_is_withheld_is_copied_where_copies_are_sent() -> None:
    some = run(0.005, policy="coded+hedge")
    assert some.missing.sum() == 0
    assert some.hedges > run(None, policy="coded+hedge").hedges


def test_what_is_released_is_as_right_as_what_it_agrees_with() -> None:
    accuracy = {"normal": 0.9, "recovered": {1: {4: 0.5}}}
    free, kept = (run(limit, accuracy=accuracy).right.mean() for limit in (None, 0.02))
    assert free < kept < 0.9


def test_a_code_that_is_not_calibrated_has_no_coverage() -> None:
    small = {"method": "small-backup"}  # that of groups of ten is another network
    assert coverages(limited(0.01, **small, k=10, workers=11))[4].share > 0
    for changes in ({"bundle": None}, {"method": "parm"}, {"r": 2, "workers": 6}, small):
        with pytest.raises(UserError, match="calibrated"):
            coverages(limited(0.01, **changes))
    assert {one.share for one in coverages(limited(None, method="parm")).values()} == {1.0}
    ways = [Candidate("coded", 4, 1), Candidate("parm", 4, 1), Candidate("uncoded", 10, 1)]
    found, left = calibrated(limited(0.01, stragglers=[], workers=11), ways)
    assert found == [ways[0], ways[2]]
    assert "not calibrated for parm" in left[str(ways[1])]
