"""A service that keeps a limit on disagreement, and believes no worker that answers wrongly."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from codedinvnet.checkpoint import load_checkpoint, save_checkpoint
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import bundle_folder, load_bundle
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.settings import Rules
from codedinvnet.serving import decoding
from codedinvnet.serving.answers import Answered, DeadlinePassed
from codedinvnet.serving.decoding import Check, Facts, Found
from codedinvnet.serving.faces.v2 import render_response
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.options import ServeOptions, check
from codedinvnet.serving.reliance import Reliance, reliance_of
from codedinvnet.serving.serve import make_service
from codedinvnet.serving.service import Request, Response, Service, output_specs
from codedinvnet.serving.waiting import Waiting
from codedinvnet.serving.workers.pool import Task
from codedinvnet.serving.workers.result import Result
from codedinvnet.trust.calibration import DECODED, GUESSED, load_calibration
from tests.observing import counted, until
from tests.serving.bundles import BundleFront, BundlePool, output, with_output

K, WORKERS = 4, 5


@pytest.fixture(scope="module")
def scheme() -> Scheme:
    return scheme_for(load_bundle("mnist"), K)


def reliance(limit: float | None = 0.01, **options: Any) -> Reliance:
    bundle = load_bundle("mnist")
    calibration = load_calibration(bundle.folder, bundle.digest())
    made = Reliance(calibration, "coded-invnet", K, WORKERS, limit, **options)
    made.begin(Metrics(), lambda worker, reason: None)
    return made


def test_a_limit_that_lets_nothing_through_is_told(
    scheme: Scheme, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = load_bundle("mnist")
    calibration = load_calibration(bundle.folder, bundle.digest())
    whose = (calibration, "coded-invnet", scheme.rules, WORKERS)
    for limit, told in ((0.02, 0), (1e-5, 1)):
        assert reliance_of(*whose, limit, "mnist") is not None
        assert [r.message for r in caplog.records] == told * [
            "no approximate answer keeps the limit"
        ]


def waiting(outcome: str = DECODED, limit: float | None = None) -> Waiting:
    return Waiting(0.0, None, Mock(), outcome=outcome, limit=limit)


def test_a_requests_limit_stands_only_where_it_is_stricter() -> None:
    relied = reliance(0.01)
    assert relied.kept(None) == 0.01
    assert relied.kept(0.5) == 0.01
    assert relied.kept(0.006) == 0.005
    assert relied.kept(1e-9) == relied.limits[-1]
    strict, loose = relied.thresholds[0.005, K, DECODED], relied.thresholds[0.01, K, DECODED]
    assert strict > loose
    found = Found({}, (strict + loose) / 2)
    assert relied.releases(found, K, waiting())
    assert not relied.releases(found, K, waiting(limit=0.005))


def test_drift_stops_the_release_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    relied = reliance(0.01)
    sure, check_ = Found({}, 1.0), Check(K, {}, {}, 0)
    assert relied.releases(sure, K, waiting())
    for _ in range(10):
        relied.compared(check_, Facts((1.0, False)))
    assert not relied.releases(sure, K, waiting())
    assert relied.releasing is False
    assert counted(relied.metrics.releasing) == 0
    assert "approximate answers are no longer released" in caplog.text
    for _ in range(1000):
        relied.compared(check_, Facts((1.0, True)))
    assert relied.releases(sure, K, waiting())
    assert counted(relied.metrics.releasing) == 1


def test_too_many_disagreements_make_the_release_strict() -> None:
    """What reaches the limit's threshold alone is withheld, and no longer counted."""
    relied = reliance(0.01)
    limits = {kind: kind[0] for kind in relied.thresholds if kind[0] is not None}
    relied.thresholds = {kind: 1 - limit for kind, limit in limits.items()}
    relied.strict_thresholds = {kind: 1 - limit / 2 for kind, limit in limits.items()}
    unsure, check_ = Found({}, 0.992), Check(K, {}, {}, 0)
    assert relied.releases(unsure, K, waiting())
    for _ in range(2):
        relied.compared(check_, Facts((0.992, False)))
    assert not relied.releases(unsure, K, waiting())
    assert relied.releases(Found({}, 0.996), K, waiting())
    assert relied.releases(Found({}, 0.998), K, waiting(limit=0.005))
    assert not relied.releases(Found({}, 0.996), K, waiting(limit=0.005))
    checked = counted(relied.metrics.released_checks)
    relied.compared(check_, Facts((0.992, True)))
    assert counted(relied.metrics.released_checks) == checked
    for _ in range(200):
        relied.compared(check_, Facts((0.996, True)))
    assert relied.releases(unsure, K, waiting())


def test_guesses_that_disagree_tell_of_drift() -> None:
    relied = reliance(0.01)
    check_ = Check(K, {}, {}, 0)
    for _ in range(10):
        relied.compared(check_, Facts((1.0, True), tuple((i, 0.9, i > 1) for i in range(K))))
    assert relied.watch is not None
    assert relied.watch.drifting
    assert counted(relied.metrics.drifting) == 1
    relied.compared(check_, Facts((1.0, False)))
    relied.compared(check_, Facts((1.0, False)))
    assert relied.releasing is False


def test_without_a_limit_everything_is_released_with_its_probability() -> None:
    relied, sure, unsure = reliance(None), waiting(DECODED), waiting(GUESSED)
    assert relied.releases(Found({}, 0.1), K, unsure)
    assert relied.releases(Found({}, 1.0), K, sure)
    assert unsure.agreement is not None
    assert sure.agreement is not None
    assert 0 < unsure.agreement < sure.agreement < 1
    assert reliance(None).releasing is None


def test_a_direct_answer_that_came_meanwhile_is_not_rated() -> None:
    direct = waiting("direct")
    assert reliance(0.01).releases(Found({}, 0.1), K, direct)
    assert direct.agreement is None


async def begun(
    scheme: Scheme, relied: Reliance, pool: BundlePool, policy: str = "coded"
) -> BundleFront:
    rules = Rules(WORKERS, POLICIES[policy], group_timeout=0.05, hang_timeout=20.0)
    front = BundleFront(scheme, pool, rules, deadline=20.0, reliance=relied)
    await front.start()
    return front


@pytest.mark.parametrize("releases", [True, False])
async def test_what_is_not_released_waits_for_the_direct_answer(
    releases: bool, scheme: Scheme, images: np.ndarray
) -> None:
    relied, pool = reliance(0.01), BundlePool(scheme)
    if not releases:
        relied.thresholds = dict.fromkeys(relied.thresholds, math.inf)
    front = await begun(scheme, relied, pool)
    try:
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
    finally:
        pool.kill(0)
        await front.stop()


@pytest.mark.parametrize(("limit", "late"), [(None, 0), (0.5, 0), (0.005, 1)])
async def test_a_requests_stricter_limit_holds_its_answers_back(
    limit: float | None, late: int, scheme: Scheme, images: np.ndarray
) -> None:
    relied, pool = reliance(0.01), BundlePool(scheme)
    for kind in relied.thresholds:
        relied.thresholds[kind] = 0.0 if kind[0] == relied.limit else math.inf
    front = await begun(scheme, relied, pool)
    try:
        pool.hang(0)
        found = await front.ask(images[:K], limit=limit, deadline=2.0 if late else 15.0)
        assert [type(one) for one in found].count(DeadlinePassed) == late
    finally:
        pool.kill(0)
        await front.stop()


def test_an_answer_tells_the_lowest_probability_of_its_approximate_answers(
    scheme: Scheme, images: np.ndarray
) -> None:
    async def run() -> tuple[Response, dict[str, Any]]:
        pool = BundlePool(scheme)
        front = await begun(scheme, reliance(None), pool)
        try:
            served = front.served
            service = Service(front, served)
            wanted = tuple((spec.name, False) for spec in output_specs(served.signature))
            name = served.signature.inputs[0].name
            request = Request({name: images[:K]}, parameters={"own": 1}, outputs=wanted)
            whole = await service.answer(request)
            pool.hang(0)
            answer = await service.answer(request)
            body, _ = render_response(request, answer, served)
            return whole, json.loads(body)["parameters"]
        finally:
            pool.kill(0)
            await front.stop()

    whole, coded = asyncio.run(run())
    approximate = set(whole.outputs["outcome"].tolist()) != {b"direct"}  # on a busy machine
    assert ("agreement_probability" in whole.parameters) == approximate
    assert coded["own"] == 1
    assert 0.5 < coded["agreement_probability"] < 1


async def test_what_is_not_released_fails_at_the_deadline(
    scheme: Scheme, images: np.ndarray
) -> None:
    relied, pool = reliance(0.01), BundlePool(scheme)
    relied.thresholds = dict.fromkeys(relied.thresholds, math.inf)
    front = await begun(scheme, relied, pool)
    try:
        pool.hang(0)
        found = await front.ask(images[:K], deadline=2.0)
        assert [type(one) for one in found].count(DeadlinePassed) == 1
    finally:
        pool.kill(0)
        await front.stop()


class Lying(BundlePool):
    """One worker's outputs are zeros, until it is replaced."""

    liar = 2

    async def _work(self, worker: int, task: Task) -> Result:
        result = await super()._work(worker, task)
        if worker == self.liar:
            result = with_output(result, np.zeros_like(output(result)))
        return result

    async def replace(self, worker: int) -> None:
        if worker == self.liar:
            self.liar = -1
        await super().replace(worker)


@pytest.mark.parametrize("action", ["replace", "report"])
async def test_a_worker_that_answers_wrongly_is_told_and_replaced(
    action: str,
    scheme: Scheme,
    images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(decoding, "CHECKED_SHARE", 1.0)
    monkeypatch.setattr(decoding, "WAITING_CHECKS", 100)

    relied, pool = reliance(None, on_corruption=action), Lying(scheme)
    front = await begun(scheme, relied, pool)
    try:
        for number in range(200):
            start = K * number % 900
            await front.ask(images[start : start + K], name=f"request {number}")
            if counted(front.metrics.wrong_workers.labels("2")):
                break
        found = [counted(front.metrics.wrong_workers.labels(str(i))) for i in range(5)]
        assert found == [0, 0, 1, 0, 0]
        await asyncio.sleep(0.2)
        assert (pool.liar == -1) == (action == "replace")
    finally:
        await front.stop()
    (record,) = [r for r in caplog.records if r.message == "worker answers wrongly"]
    fields = record.__dict__["fields"]
    assert fields["worker"] == 2
    assert fields["requests"]
    assert all(name.startswith("request ") for name in fields["requests"])


@pytest.mark.parametrize("policy", ["uncoded", "auto"])
async def test_a_wrong_workers_requests_are_told_where_no_group_was_coded(
    policy: str,
    scheme: Scheme,
    images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    relied, pool = reliance(None), BundlePool(scheme)
    front = await begun(scheme, relied, pool, policy)
    try:
        await front.ask(images[:1], name="a")
    finally:
        await front.stop()
    ((worker, _),) = pool.calls
    monkeypatch.setattr(relied.liars, "seen", lambda *_: worker)
    workers = {i: (worker + i) % WORKERS for i in range(K + 1)}
    relied.compared(Check(K, {}, workers, 0), Facts(None, ((0, 0.9, False),)))
    (record,) = [r for r in caplog.records if r.message == "worker answers wrongly"]
    assert record.__dict__["fields"] == {"worker": worker, "requests": ["a"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_disagreement": 0.0}, "--max-disagreement: must lie between"),
        ({"max_disagreement": math.nan}, "--max-disagreement: must lie between"),
        ({"max_disagreement": 0.01, "policy": "hedge"}, "--max-disagreement: goes with"),
        ({"on_corruption": "x"}, "--on-corruption"),
        ({"on_corruption": "replace", "policy": "hedge"}, "--on-corruption replace: goes with"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(ServeOptions("mnist", **options))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, False),
        ({"on_corruption": "replace"}, False),
        ({"policy": "hedge"}, False),
        ({"method": "nercc"}, True),
        ({"workers": 1}, True),
    ],
)
def test_a_start_tells_if_wrong_workers_are_not_noticed(
    options: dict[str, Any], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "codedinvnet.serving")
    make_service(ServeOptions("mnist", **options))
    assert ("wrong workers are not noticed" in caplog.messages) == told


def test_a_method_without_calibration_is_refused_a_limit() -> None:
    with pytest.raises(UserError, match=r"--on-corruption replace: .* average-image alone"):
        make_service(ServeOptions("mnist", method="average-image", on_corruption="replace"))
    with pytest.raises(UserError, match="is not calibrated for average-image"):
        make_service(ServeOptions("mnist", method="average-image", max_disagreement=0.01))
    service = make_service(ServeOptions("mnist", max_disagreement=0.01))
    assert service.front.reliance is not None
    assert service.front.reliance.limit == 0.01


def test_another_part_than_the_calibrated_one_is_refused_a_limit(tmp_path: Path) -> None:
    part = tmp_path / "part.safetensors"
    shutil.copy(bundle_folder("mnist") / "small-backup-k10.safetensors", part)
    options = ServeOptions("mnist", method="small-backup", k=10, part=part, max_disagreement=0.01)
    assert make_service(options).front.reliance is not None
    tensors, header = load_checkpoint(part)
    name = next(iter(tensors))
    save_checkpoint(part, {**tensors, name: tensors[name] + 1}, header)
    with pytest.raises(UserError, match=rf"mnist with {part} is not calibrated for small-backup"):
        make_service(options)
    assert make_service(replace(options, max_disagreement=None)).front.reliance is None
