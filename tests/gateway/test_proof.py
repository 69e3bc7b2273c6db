"""What copies save, by the requests that get none: is it true?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest

from codedinvnet.cli.command_line import main
from codedinvnet.gateway.proof import MOST, SHARES, Arm, Proof
from codedinvnet.scheduler.actions import Action, Answer, CopyRefused, Send
from tests.gateway.support import INFER, V2, gateway
from tests.gateway.test_hedging import learn, taking
from tests.scheduler.upstreams import Cell, Fault, Run

KINDS: Sequence[Fault] = (
    *("none", "block", "slow", "held", "exponential", "long", "half-long", "all-slow"),
)
CELLS = [
    *product(KINDS, (0.3, 0.5)),
    *((kind, 0.65) for kind in ("block", "slow", "held", "exponential")),
]  # type: list[tuple[Fault, float]]


class Proved(Run):
    """A run whose requests are a route's."""

    def __init__(self, cell: Cell, hold_out: float) -> None:
        super().__init__(cell, hold_out=hold_out)
        self.proof = Proof()
        self._arms: dict[int, Arm] = {}

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send(copy=True):
                    self._arms[action.members[0]] = Arm.COPIED
                case CopyRefused(query, held_out=True):
                    self._arms[query] = Arm.HELD_OUT
                case Answer(query):
                    seconds = self.now - self._came[query]
                    self.proof.add(self.now, seconds, self._arms.pop(query, Arm.NEITHER))
        super()._do(actions)


def covered(cell: Cell, run: Proved) -> bool:
    """Prove a run, print p99.9 without copies, and tell whether other requests then show it."""
    copies = run.run().quantile(0.999)
    report = run.proof.report(run.now)
    assert report is not None
    without = report.without["p999"]
    shown = Run(replace(cell, policy="uncoded", seed=cell.seed + 100)).run().quantile(0.999)
    is_covered = (without.low or 0.0) <= shown / 1000 <= (without.high or float("inf"))
    print(
        f"{cell.fault:12} {cell.busy:4} {report.copied:6} {report.held_out:4} {copies:8.1f}   "
        f"{without!s:32} {shown:8.1f} {'' if is_covered else 'not covered'}"
    )
    return is_covered


def test_what_would_happen_without_copies_is_foretold() -> None:
    cells = [Cell(kind, 0.5, slots=None, requests=12_000) for kind in ("none", "block", "held")]
    runs = [Proved(cell, 0.1) for cell in cells]
    assert sum(map(covered, cells, runs)) == len(cells)
    report = runs[1].proof.report(runs[1].now)
    assert report is not None
    assert (report.without["p999"].low or 0.0) > (report.copies["p999"].high or float("inf"))


@pytest.mark.nightly
def test_what_would_happen_without_copies_is_foretold_for_every_fault() -> None:
    """p99.9 of 100,000 requests, 5 % of the late ones held out, beside runs without copies."""
    print("\nfault        busy copied held    p99.9   without copies", end=16 * " ")
    print("uncoded")
    cells = [
        Cell(kind, busy, slots=None, requests=100_000, seed=seed)
        for seed, (kind, busy) in enumerate(CELLS)
    ]
    found = [covered(cell, Proved(cell, 0.05)) for cell in cells]
    print(f"{sum(found)} of {len(found)}")
    assert len(found) == 20
    assert sum(found) >= 18


def test_with_few_requests_there_is_no_number() -> None:
    proof = Proof()
    assert proof.report(0.0) is None
    for number in range(4000):
        late = number % 20 == 0
        arm = Arm.HELD_OUT if number % 1000 == 0 else Arm.COPIED if late else Arm.NEITHER
        proof.add(0.01 * number, (1.0 if arm is Arm.HELD_OUT else 0.02) + 0.01 * late, arm)
        if number == 500:
            report = proof.report(5.0)
            assert report is not None
            assert {str(each) for each in report.copies.values()} == {"not enough requests yet"}
    report = proof.report(40.0)
    assert report is not None
    assert (report.requests, report.copied, report.held_out) == (4000, 196, 4)
    assert report.without["p50"].high is not None
    assert report.without["p99"].low is not None
    assert report.without["p999"].value is None
    assert str(report.without["p999"]).startswith("at least ")


@pytest.mark.parametrize("every", [30.0, 0.5, 0.02])
def test_the_window_is_bounded_and_follows_the_load(every: float) -> None:
    proof, now = Proof(), 0.0
    for _ in range(200_000):
        now += every
        proof.add(now, 0.02, Arm.NEITHER)
    report = proof.report(now)
    assert report is not None
    assert report.window_seconds < 2 * 86_400
    for _ in range(MOST):  # then the load ends, and some single requests come
        now += 86_400
        proof.add(now, 0.5, Arm.NEITHER)
    report = proof.report(now)
    assert report is not None
    assert report.requests <= MOST + 400_000
    assert set(report.copies) == set(SHARES)


@pytest.mark.parametrize(("hold_out", "held_out"), [(100.0, 3), (0.0, 0)])
async def test_late_requests_are_held_out_and_shown(
    hold_out: float, held_out: int, capsys: pytest.CaptureFixture[str]
) -> None:
    stalls: list[bool] = []
    handler = taking(0.02, lambda: bool(stalls) and stalls.pop())
    async with gateway(handler, handler, hold_out=hold_out) as g:
        await learn(g)
        before = g.metric("hedges_total", result="held_out")
        for _ in range(3):
            stalls.append(True)
            await g.ask("POST", V2, INFER)
        sent = sum(len(upstream.requests) for upstream in g.upstreams)
        policy = json.loads((await g.ask("GET", "/codedinvnet/policy")).body)
        status = json.loads((await g.ask("GET", "/codedinvnet/status")).body)
        metrics = (await g.ask("GET", "/metrics")).body.decode()
        assert g.metric("hedges_total", result="held_out") - before == held_out
        await asyncio.to_thread(main, ["policy", f"{g.gateway.url}/codedinvnet"])

    (proof,) = policy["proof"].values()
    assert status["routes"][0]["proof"] == proof
    assert f"{proof['copied']} copied and {proof['held_out']} held out" in capsys.readouterr().out
    assert proof["held_out"] >= held_out
    assert (proof["copied"] == 0) is (hold_out == 100.0)
    assert (sent == 163) is (hold_out == 100.0)
    assert (proof["attempts_share"] > 0) is (hold_out == 0.0)
    assert proof["texts"]["without"]["p999"] == "not enough requests yet"
    assert 'codedinvnet_gateway_copies_share{of="seconds",route="POST' in metrics
