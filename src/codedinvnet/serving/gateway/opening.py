"""Opens what makes up for late answers of upstreams: a small backup, or a code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from codedinvnet.codes.rules import BACKUP, AnswersAll, Costs, is_systematic
from codedinvnet.errors import UserError
from codedinvnet.models.base import TensorSpec, scores_tensor
from codedinvnet.models.probe import ROWS, probe_inputs
from codedinvnet.models.specs import parse_input
from codedinvnet.models.upstream import PATH
from codedinvnet.scheduler.settings import SHORTEST_HANG
from codedinvnet.serving.answers import described
from codedinvnet.serving.gateway.backup import UpstreamBackup, converted
from codedinvnet.serving.gateway.calls import Unreachable
from codedinvnet.serving.gateway.guard import Backup, Coded
from codedinvnet.serving.gateway.options import MOST_K, GatewayOptions
from codedinvnet.serving.gateway.pool import UpstreamPool
from codedinvnet.serving.gateway.understanding import (
    AskedModel,
    NoAnswer,
    Understanding,
    understand,
)
from codedinvnet.serving.gateway.upstream_metrics import UpstreamMetrics
from codedinvnet.serving.gateway.upstreams import Upstream
from codedinvnet.serving.served import OwnModel

if TYPE_CHECKING:  # a gateway without a code does without PyTorch
    from codedinvnet.codes.base import Scheme
    from codedinvnet.trust.calibration import Calibration

CHECKS = ThreadPoolExecutor(thread_name_prefix="check")
"""Of their own: what checks of upstreams wait for needs a thread of the others."""


async def open_guard(
    options: GatewayOptions,
    upstreams: Sequence[Upstream],
    open_one: Callable[..., Upstream],
    metrics: UpstreamMetrics,
) -> Backup | Coded | None:
    """Return what makes up for late answers; None if nothing but copies does.

    Args:
        options: checked.
        upstreams: the servers.
        open_one: opens another one (`open_upstream`).
        metrics: of the upstreams.

    Raises:
        UserError: if it does not go with the upstreams' model.
    """
    if not options.makes_up:
        return None
    told = [parse_input(text) for text in options.inputs]
    if options.protection is not None:
        return await _protected(options, options.protection, upstreams, told)
    model = await understand(upstreams, options.name, options.scores, told)
    served = OwnModel(options.name, model.signature)
    if options.backup_upstream is not None:
        reads = Understanding(served, model.version)
        return await _upstream_backup(options, reads, open_one, metrics)
    from codedinvnet.codes.method import ONE
    from codedinvnet.serving.workers.computing import scheme_of

    assert options.method is not None
    k = options.k or min(MOST_K, len(upstreams) - 1)
    return _coded(model, served, scheme_of(model, options.method, k, ONE))


async def _protected(
    options: GatewayOptions, folder: Path, upstreams: Sequence[Upstream], told: Sequence[TensorSpec]
) -> Backup | Coded:
    """Return what a protection recommends, or the method of it that is asked for.

    Raises:
        UserError: if it is of another model, or damaged.
    """
    from codedinvnet.protect.calibration import calibration_if_any
    from codedinvnet.protect.folder import (
        EQUAL,
        OWN,
        SMALL,
        check_fingerprint,
        checked_description,
        description_digest,
        row_of,
        scheme_of,
    )
    from codedinvnet.serving.workers.computing import BackupSpec
    from codedinvnet.serving.workers.local import ProcessPool

    digest = description_digest(folder)
    found = checked_description(folder, digest)
    scores = f"{found['model']['scores']}:{found['model']['kind']}"
    model = await understand(upstreams, options.name, scores, told)
    served = OwnModel(options.name, model.signature)
    await asyncio.to_thread(check_fingerprint, folder, found, model, options.name)
    row = row_of(folder, found, options.method)
    calibration = calibration_if_any(folder, options.max_disagreement is not None)
    if row.name not in (SMALL, EQUAL, OWN):
        if options.backup_workers is not None:
            raise UserError(f"--backup-workers: {row.name} is computed by the upstreams alone")
        return _coded(model, served, scheme_of(folder, found, model, row.name), calibration)
    spec = BackupSpec(folder, row.name, served.kind, model.signature.inputs, digest)
    rules = AnswersAll(row.k, BACKUP, cost=Costs(member=row.work), r=row.backups)
    reads = Understanding(served, model.version)
    pool = ProcessPool(spec)

    async def differs(upstream: Upstream) -> str:
        asked = AskedModel([upstream], options.name, model.signature, "--upstream")
        check = partial(check_fingerprint, folder, found, asked, options.name)
        try:
            await asyncio.get_running_loop().run_in_executor(CHECKS, check)
        except NoAnswer as error:
            raise Unreachable(str(error)) from error
        except UserError as error:
            return str(error)
        except (LookupError, ValueError) as error:  # it has other outputs by now
            return described(error)
        return ""

    workers = options.backup_workers or 1
    longest = max(SHORTEST_HANG, options.deadline_ms) / 1000  # then nobody waits any more
    return Backup(rules, reads, pool, workers, 1, row.name, calibration, differs, longest)


def _coded(
    model: AskedModel, served: OwnModel, scheme: Scheme, calibration: Calibration | None = None
) -> Coded:
    """Return a code around the upstreams' model.

    Raises:
        UserError: if answers would lack an output of texts, which the gateway does not read.
    """
    from codedinvnet.serving.workers.computing import ModelComputer

    texts = [spec.name for spec in served.signature.outputs if spec.datatype == "BYTES"]
    if not is_systematic(scheme.rules):  # no answer has any other output
        scores = (scores_tensor(served.signature),)
        served = replace(served, signature=replace(served.signature, outputs=scores))
    elif texts:
        raise UserError(
            f"{served.name} answers with texts ({', '.join(texts)}), which answers around "
            f"{scheme.name} would lack: take a small backup, which leaves the model's as they are"
        )
    return Coded(served, scheme, ModelComputer(model, scheme), calibration)


async def _upstream_backup(
    options: GatewayOptions,
    reads: Understanding,
    open_one: Callable[..., Upstream],
    metrics: UpstreamMetrics,
) -> Backup:
    """Return a smaller model of a server elsewhere as the backup.

    Raises:
        UserError: if it takes other inputs than the upstreams' model, or has other classes.
    """
    served, url, k = reads.served, options.backup_upstream or "", options.k or MOST_K
    server, _, name = url.partition(PATH)
    if not name or "/" in name:
        raise UserError(f"--backup-upstream: {url!r} is not http://HOST:PORT{PATH}NAME")
    upstream = open_one(server, flag="--backup-upstream")
    try:
        told = [parse_input(text) for text in options.inputs]
        flag, usual = "--backup-upstream", reads.scores.name
        small = await understand([upstream], name, None, told, flag, usual)
        mine, its = served.signature, small.signature
        sizes = scores_tensor(mine).shape, scores_tensor(its).shape
        if (by_name(mine.inputs), sizes[0]) != (by_name(its.inputs), sizes[1]):
            raise UserError(
                f"--backup-upstream: {url} takes {its.inputs} for {sizes[1]} scores, and "
                f"{options.name} {mine.inputs} for {sizes[0]}"
            )
        if its.max_batch == 1:
            raise UserError(f"--backup-upstream: {url} takes one query at a time, not {k}")
        most = await asyncio.to_thread(_taken, small, min(k, its.max_batch or k))
    except BaseException:
        await upstream.close()
        raise
    assert its.scores is not None
    kind = its.scores.kind

    def convert(scores: np.ndarray) -> np.ndarray:
        return converted(scores.astype(np.float32), kind, served.kind)

    upstream.url = url  # its server may be an upstream as well
    deadline = options.deadline_ms / 1000
    pool = UpstreamPool(
        [upstream], name, options.hang_seconds, metrics, patience=deadline, cancels=options.cancel
    )
    backup = UpstreamBackup(pool, its.inputs, its.scores.output, convert, most, options.slots)
    rules = AnswersAll(k, BACKUP)
    return Backup(rules, reads, backup, 1, options.slots)


def by_name(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Return tensors in the order of their names: calls are written by these."""
    return sorted(specs, key=lambda spec: spec.name)


def _taken(model: AskedModel, most: int) -> int:
    """Return how many queries a model takes at once: half of what it refuses.

    Args:
        model: has answered to ROWS queries, or to as many as it says that it takes.
        most: queries that there may be at once.

    Raises:
        UserError: if it does not answer to ROWS any more.
    """
    queries, least = probe_inputs(model.signature.inputs), min(ROWS, most)
    while True:
        try:
            model.compute({n: np.resize(a, (most, *a.shape[1:])) for n, a in queries.items()})
        except UserError:
            if most == least:
                raise
            most = max(least, most // 2)
        else:
            return most
