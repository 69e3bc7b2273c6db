"""A service that keeps a limit on disagreement, and believes no worker that answers wrongly."""

from __future__ import annotations

import asyncio
import math
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.common.errors import UserError
from codedinvnet.models.bundle import bundle_folder, load_bundle
from codedinvnet.models.checkpoint import load_checkpoint, save_checkpoint
from codedinvnet.protection.calibration import DECODED, GUESSED, load_calibration
from codedinvnet.serving import decoding
from codedinvnet.serving.answers import Answered, DeadlinePassed
from codedinvnet.serving.app import open_app
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.decoding import Check, Facts, Found
from codedinvnet.serving.gate import AnswerGate, gate_of
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.queries import InFlightQuery
from codedinvnet.serving.workers.pool import Result, Task
from tests.observing import counted, until
from tests.serving.bundles import BundlePool, output, with_output
from tests.serving.front import leftovers, queue, running
from tests.serving.options import changed

K, WORKERS = 4, 5
BACKED = 10
"""Queries in a group of the small backup that ships."""


@pytest.fixture(scope="module")
def scheme() -> Scheme:
    return scheme_for(load_bundle("mnist"), K)


def gate(limit: float | None = 0.01, method: str = "coded-invnet", **options: Any) -> AnswerGate:
    bundle = load_bundle("mnist")
    calibration = load_calibration(bundle.folder, bundle.digest())
    k = K if method == "coded-invnet" else BACKED
    made = AnswerGate(calibration, method, k, k + 1, limit, **options)
    made.begin(Metrics(), lambda worker: None)
    return made


def test_a_limit_that_lets_nothing_through_is_logged(
    scheme: Scheme, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = load_bundle("mnist")
    calibration = load_calibration(bundle.folder, bundle.digest())
    whose = (calibration, "coded-invnet", scheme.rules, WORKERS)
    for limit, told in ((0.02, 0), (1e-5, 1)):
        assert gate_of(*whose, limit, "mnist") is not None
        assert caplog.messages.count("no approximate answer keeps the limit") == told


def waiting(outcome: str = DECODED, limit: float | None = None) -> InFlightQuery:
    return InFlightQuery(0.0, Mock(), None, outcome=outcome, limit=limit)


def test_a_requests_limit_stands_only_where_it_is_stricter() -> None:
    own = gate(0.01)
    assert own.kept(None) == 0.01
    assert own.kept(0.5) == 0.01
    assert own.kept(0.006) == 0.005
    assert own.kept(1e-9) == own.limits[-1]
    strict, loose = own.thresholds[0.005, K, DECODED], own.thresholds[0.01, K, DECODED]
    assert strict > loose
    found = Found({}, (strict + loose) / 2)
    assert own.releases(found, K, waiting())
    assert not own.releases(found, K, waiting(limit=0.005))


def test_drift_stops_the_release_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    own = gate(0.01)
    sure, check_ = Found({}, 1.0), Check(K, {}, {}, 0)
    assert own.releases(sure, K, waiting())
    for _ in range(10):
        own.compared(check_, Facts((1.0, False)))
    assert not own.releases(sure, K, waiting())
    assert own.releasing is False
    assert counted(own.metrics.releasing) == 0
    assert "approximate answers are no longer released" in caplog.text
    for _ in range(1000):
        own.compared(check_, Facts((1.0, True)))
    assert own.releases(sure, K, waiting())
    assert counted(own.metrics.releasing) == 1


def test_without_a_limit_everything_is_released_with_its_probability() -> None:
    own, sure, unsure = gate(None, "small-backup"), waiting(DECODED), waiting(GUESSED)
    assert own.releases(Found({}, 0.1), BACKED, unsure)
    assert own.releases(Found({}, 1.0), BACKED, sure)
    assert unsure.agreement is not None
    assert sure.agreement is not None
    assert 0 < unsure.agreement < sure.agreement < 1
    assert gate(None).releasing is None


@pytest.mark.parametrize("releases", [True, False])
async def test_what_is_not_released_waits_for_the_direct_answer(
    releases: bool, scheme: Scheme, images: np.ndarray
) -> None:
    own, pool = gate(0.01), BundlePool(scheme)
    if not releases:
        own.thresholds = dict.fromkeys(own.thresholds, math.inf)
    async with running(scheme, pool=pool, gate=own, workers=WORKERS) as (front, _):
        pool.hang(0)
        asked = asyncio.ensure_future(front.ask(images[:K]))
        if not releases:
            await until(lambda: counted(front.metrics.withheld) == 1)
            done, _ = await asyncio.wait({asked}, timeout=0.5)
            assert not done
            pool.kill(0)
        found = await asked
        outcomes = [a.outcome for a in found if isinstance(a, Answered)]
        assert outcomes.count("decoded") == releases
        for one in found:
            assert isinstance(one, Answered)
            assert (one.agreement is None) == (one.outcome == "direct")
            assert one.agreement is None or 0.5 < one.agreement < 1
        assert len(outcomes) == K


@pytest.mark.parametrize(("limit", "late"), [(None, 0), (0.5, 0), (0.005, 1)])
async def test_a_requests_stricter_limit_holds_its_answers_back(
    limit: float | None, late: int, scheme: Scheme, images: np.ndarray
) -> None:
    own, pool = gate(0.01), BundlePool(scheme)
    for kind in own.thresholds:
        own.thresholds[kind] = 0.0 if kind[0] == own.limit else math.inf
    async with running(scheme, pool=pool, gate=own, workers=WORKERS) as (front, _):
        pool.hang(0)
        found = await front.ask(images[:K], limit=limit, deadline=2.0 if late else 15.0)
        assert [type(one) for one in found].count(DeadlinePassed) == late


class Lying(BundlePool):
    """One worker's outputs are zeros, until it is replaced; extra tasks come after all others."""

    liar = 2
    extra = direct = 0

    async def _work(self, worker: int, task: Task) -> Result:
        if is_extra := task.number >= BACKED:
            self.extra += 1
            due = BACKED * self.extra
            await until(lambda: self.direct >= due)
        result = await super()._work(worker, task)
        self.direct += not is_extra
        if worker == self.liar:
            result = with_output(result, np.zeros_like(output(result)))
        return result

    async def replace(self, worker: int) -> None:
        if worker == self.liar:
            self.liar = -1
        await super().replace(worker)


@pytest.mark.parametrize("action", ["replace", "report"])
async def test_a_worker_that_answers_wrongly_is_reported_and_replaced(
    action: str,
    images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(decoding, "CHECKED_SHARE", 1.0)
    scheme = scheme_for(load_bundle("mnist"), BACKED, "small-backup")
    own, pool = gate(None, "small-backup", on_corruption=action), Lying(scheme)
    async with running(scheme, pool=pool, gate=own, workers=BACKED + 1) as (front, _):
        for number in range(200):
            start = BACKED * number % 900
            await front.ask(images[start : start + BACKED], name=f"request {number}")
            await until(lambda: not leftovers(front) and not queue(front)._running)
            if counted(front.metrics.wrong_workers.labels("2")):
                break
        found = [counted(front.metrics.wrong_workers.labels(str(i))) for i in range(BACKED + 1)]
        assert [worker for worker, wrong in enumerate(found) if wrong] == [2]
        if action == "replace":
            await until(lambda: pool.liar == -1)
        await asyncio.sleep(0.2)
        assert (pool.liar == -1) == (action == "replace")
    (record,) = [r for r in caplog.records if r.message == "worker answers wrongly"]
    fields = record.__dict__["fields"]
    assert fields["worker"] == 2
    assert fields["requests"]
    assert all(name.startswith("request ") for name in fields["requests"])


def test_a_method_without_calibration_is_refused_a_limit() -> None:
    with pytest.raises(
        UserError, match=r"--set on-corruption: .* average-image's extra task answers by itself"
    ):
        open_app(ServeOptions(source="mnist", method="average-image", on_corruption="replace"))
    with pytest.raises(UserError, match="is not calibrated for average-image"):
        open_app(ServeOptions(source="mnist", method="average-image", max_disagreement=0.01))
    service = open_app(ServeOptions(source="mnist", max_disagreement=0.01))
    assert service.dispatcher.gate is not None
    assert service.dispatcher.gate.limit == 0.01


def test_another_part_than_the_calibrated_one_is_refused_a_limit(tmp_path: Path) -> None:
    part = tmp_path / "part.safetensors"
    shutil.copy(bundle_folder("mnist") / "small-backup-k10.safetensors", part)
    options = ServeOptions(
        source="mnist", method="small-backup", k=10, part=part, max_disagreement=0.01
    )
    assert open_app(options).dispatcher.gate is not None
    tensors, header = load_checkpoint(part)
    name = next(iter(tensors))
    save_checkpoint(part, {**tensors, name: tensors[name] + 1}, header)
    with pytest.raises(UserError, match=rf"mnist with {part} is not calibrated for small-backup"):
        open_app(options)
    assert open_app(changed(options, max_disagreement=None)).dispatcher.gate is None
