"""Opens what makes up for late answers of upstreams: a small backup, or a code."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.method import ONE
from codedinvnet.codes.rules import BACKUP, AnswersAll, Costs, Rules, is_systematic
from codedinvnet.errors import UserError
from codedinvnet.models.base import scores_tensor
from codedinvnet.models.specs import parse_input
from codedinvnet.models.upstream import PATH
from codedinvnet.protect.folder import (
    EQUAL,
    OWN,
    SMALL,
    Answering,
    check_fingerprint,
    checked_description,
    description_digest,
    row_of,
    scheme_of,
)
from codedinvnet.serving.gateway.backup import UpstreamBackup
from codedinvnet.serving.gateway.options import MOST_K, GatewayOptions
from codedinvnet.serving.gateway.pool import UpstreamMetrics, UpstreamPool
from codedinvnet.serving.gateway.understanding import AskedModel, Understanding, understand
from codedinvnet.serving.gateway.upstreams import Upstream, open_upstream
from codedinvnet.serving.served import OwnModel
from codedinvnet.serving.workers import computing
from codedinvnet.serving.workers.computing import BackupSpec, ModelComputer
from codedinvnet.serving.workers.local import ProcessPool
from codedinvnet.serving.workers.pool import WorkerPool


@dataclass(frozen=True)
class Backup:
    """A small backup of the upstreams' model.

    Attributes:
        rules: the groups' tasks.
        understanding: reads what it answers to.
        pool: its workers, not yet started.
        workers: how many there are.
        slots: how many tasks each of them may be at.
    """

    rules: Rules
    understanding: Understanding
    pool: WorkerPool
    workers: int
    slots: int


@dataclass(frozen=True)
class Coded:
    """A code around the upstreams' model.

    Attributes:
        served: the model.
        scheme: the code.
        computer: does its tasks by asking upstreams, while the gateway starts.
    """

    served: OwnModel
    scheme: Scheme
    computer: ModelComputer


async def open_guard(
    options: GatewayOptions,
    upstreams: Sequence[Upstream],
    roots: bytes | None,
    metrics: UpstreamMetrics,
) -> Backup | Coded | None:
    """Return what makes up for late answers; None if nothing but copies does.

    Args:
        options: checked.
        upstreams: the servers.
        roots: see `open_upstream`.
        metrics: of the upstreams.

    Raises:
        UserError: if it does not go with the upstreams' model.
    """
    if not options.makes_up:
        return None
    told = [parse_input(text) for text in options.inputs]
    digest, found, scores = "", {}, options.scores
    if options.protection is not None:
        digest = description_digest(options.protection)
        found = checked_description(options.protection, digest)
        scores = f"{found['model']['scores']}:{found['model']['kind']}"
    model = await understand(upstreams, options.name, scores, told)
    served = OwnModel(options.name, model.signature)
    if options.backup_upstream is not None:
        return await _upstream_backup(options, served, roots, metrics)
    if options.protection is None:
        assert options.method is not None
        k = options.k or min(MOST_K, len(upstreams) - 1)
        scheme = computing.scheme_of(model, options.method, k, ONE)
        return _coded(model, served, scheme)
    folder = options.protection
    await asyncio.to_thread(check_fingerprint, folder, found, model, options.name)
    row = row_of(folder, found, options.method)
    if row.name not in (SMALL, EQUAL, OWN):
        return _coded(model, served, scheme_of(folder, found, model, row.name))
    spec = BackupSpec(folder, row.name, served.kind, model.signature.inputs, digest)
    rules = AnswersAll(row.k, BACKUP, cost=Costs(member=row.work), r=row.backups)
    reads = Understanding(served)
    return Backup(rules, reads, ProcessPool(spec), options.backup_workers, 1)


def _coded(model: AskedModel, served: OwnModel, scheme: Scheme) -> Coded:
    if not is_systematic(scheme.rules):  # no answer has any other output
        scores = (scores_tensor(served.signature),)
        served = replace(served, signature=replace(served.signature, outputs=scores))
    return Coded(served, scheme, ModelComputer(model, scheme))


async def _upstream_backup(
    options: GatewayOptions, served: OwnModel, roots: bytes | None, metrics: UpstreamMetrics
) -> Backup:
    """Return a smaller model of a server elsewhere as the backup.

    Raises:
        UserError: if it takes other inputs than the upstreams' model, or has other classes.
    """
    url, k = options.backup_upstream or "", options.k or MOST_K
    server, _, name = url.partition(PATH)
    if not name or "/" in name:
        raise UserError(f"--backup-upstream: {url!r} is not http://HOST:PORT{PATH}NAME")
    upstream = open_upstream(server, roots, "--backup-upstream")
    try:
        told = [parse_input(text) for text in options.inputs]
        small = await understand([upstream], name, None, told, "--backup-upstream")
        mine, its = served.signature, small.signature
        sizes = scores_tensor(mine).shape, scores_tensor(its).shape
        if (mine.inputs, sizes[0]) != (its.inputs, sizes[1]):
            raise UserError(
                f"--backup-upstream: {url} takes {its.inputs} for {sizes[1]} scores, and "
                f"{options.name} {mine.inputs} for {sizes[0]}"
            )
        if its.max_batch == 1:
            raise UserError(f"--backup-upstream: {url} takes one query at a time, not {k}")
    except BaseException:
        await upstream.close()
        raise
    assert its.scores is not None
    change = Answering(torch.nn.Identity(), its.scores.kind, served.kind)

    def convert(scores: np.ndarray) -> np.ndarray:
        found: np.ndarray = change(torch.from_numpy(scores.astype(np.float32))).numpy()
        return found

    pool = UpstreamPool([upstream], name, options.hang_seconds, metrics, cancels=options.cancel)
    backup = UpstreamBackup(pool, its.inputs, its.scores.output, convert, k)
    rules = AnswersAll(k, BACKUP)
    return Backup(rules, Understanding(served), backup, 1, options.slots)
