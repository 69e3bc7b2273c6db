"""`codedinvnet gateway`: put upstreams, front end and faces together, and run them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial

import uvloop

from codedinvnet.asking import read_token
from codedinvnet.errors import UserError
from codedinvnet.scheduler.policies import AUTO, CODED, HEDGE
from codedinvnet.scheduler.settings import MAX_BATCH, Rules, pending_limit
from codedinvnet.serving.bodies import BodyMemory
from codedinvnet.serving.choices import objection
from codedinvnet.serving.faces.connections import allow_files
from codedinvnet.serving.faces.http import AppOptions, build_app
from codedinvnet.serving.faces.middleware import is_open
from codedinvnet.serving.faces.tls import read_certificate
from codedinvnet.serving.faces.traced import traced
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.gateway.backup import Backing, ProtectedPool
from codedinvnet.serving.gateway.discovery import Discovery, follow
from codedinvnet.serving.gateway.guard import Backup, Coded
from codedinvnet.serving.gateway.http_face import build_gateway_app
from codedinvnet.serving.gateway.opening import open_guard
from codedinvnet.serving.gateway.options import OFFERED, GatewayOptions, check, read_roots
from codedinvnet.serving.gateway.pool import UpstreamPool
from codedinvnet.serving.gateway.relay import PassThrough, Relay
from codedinvnet.serving.gateway.unrepeatable import refuse_sequences
from codedinvnet.serving.gateway.upstream_metrics import UpstreamMetrics
from codedinvnet.serving.gateway.upstream_token import UpstreamToken
from codedinvnet.serving.gateway.upstreams import Upstream, open_upstream
from codedinvnet.serving.listening import (
    body_limit,
    listening,
    log_to_stderr,
    tracing_of,
    until_told,
)
from codedinvnet.serving.logs import log_event
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.reliance import Reliance, reliance_of
from codedinvnet.serving.service import Service
from codedinvnet.serving.workers.pool import Names

LAST_WORD = 5.0
"""Seconds that the pool has to find out about a late call, before the rules do."""
PLACES = 32
"""Upstreams that there may be, at least, if they come and go."""


def make_relay(
    options: GatewayOptions,
    upstreams: Sequence[Upstream],
    places: int | None,
    guard: Backup | Coded | None,
    metrics: tuple[Metrics, UpstreamMetrics],
) -> Relay:
    """Return the relay, not yet started.

    Args:
        options: checked.
        upstreams: those of now.
        places: see `Roster`.
        guard: what makes up for late answers.
        metrics: of the front end, and of upstreams.

    Raises:
        UserError: if the options do not fit each other.
    """
    pool = UpstreamPool(
        upstreams,
        options.name,
        options.hang_seconds,
        metrics[1],
        patience=options.deadline_ms / 1000,
        cancels=options.cancel,
        places=places,
        differs=guard.differs if isinstance(guard, Backup) else None,
        follows=guard is None,
    )
    usual = AUTO if isinstance(guard, Backup) else HEDGE if guard is None else CODED
    policy = usual if options.policy is None else OFFERED[options.policy]
    backups = guard.workers if isinstance(guard, Backup) else 0
    workers, deadline = len(pool.places), options.deadline_ms / 1000
    rules = Rules(
        workers=workers + backups,
        policy=policy,
        group_timeout=options.group_timeout / 1000,
        hang_timeout=2 * deadline + LAST_WORD,  # the pool finds them out, call by call
        max_pending=options.max_pending or pending_limit(workers * options.slots),
        slots=options.slots,
        backups=backups,
        backup_slots=guard.slots if isinstance(guard, Backup) else 1,
        backup_hang_timeout=guard.hang_timeout if isinstance(guard, Backup) else None,
    )
    if isinstance(guard, Coded):
        rules = replace(rules, hedge_share=1 / guard.scheme.rules.k)
    down = options.down_timeout_ms / 1000
    front = partial(
        FrontEnd,
        rules=rules,
        deadline=deadline,
        down_timeout=down,
        metrics=metrics[0],
        reliance=_reliance(options, guard, rules.workers),
        names=Names("upstream", partial(_name, pool)),
    )
    plain, most = PassThrough(options.name), options.body
    try:
        if guard is None:
            return Relay(front(served=plain, pool=pool), pool, most=most)
        if isinstance(guard, Backup):
            reads = guard.understanding
            both = ProtectedPool(pool, guard.pool, reads.scores.shape)
            backing = Backing(guard.rules, reads)
            return Relay(front(served=plain, pool=both, scheme=backing), pool, reads, most=most)
        if why := objection(policy, guard.scheme):
            raise UserError(f"--policy: {why}")
        from codedinvnet.serving.gateway.coding import CodedPool  # which needs PyTorch

        coding = CodedPool(pool, guard.scheme, guard.computer.model.signature)
        made = front(served=guard.served, pool=coding, scheme=guard.scheme, computer=guard.computer)
        service = Service(made, guard.served, tells=True, check=refuse_sequences)
        return Relay(made, pool, service=service, most=most)
    except ValueError as error:
        raise UserError(f"--upstream: {error}") from error


def _name(pool: UpstreamPool, worker: int) -> str:
    """Return what the log calls a worker: an upstream by its URL."""
    mains = len(pool.places)
    return pool.places[worker].upstream.url if worker < mains else "the small backup"


def _reliance(
    options: GatewayOptions, guard: Backup | Coded | None, workers: int
) -> Reliance | None:
    if guard is None:
        return None
    if isinstance(guard, Backup):
        method, rules = guard.method, guard.rules
    else:
        method, rules = guard.scheme.name, guard.scheme.rules
    limit, whose = options.max_disagreement, str(options.protection)
    return reliance_of(guard.calibration, method, rules, workers, limit, whose)


@asynccontextmanager
async def running(options: GatewayOptions) -> AsyncIterator[tuple[str, Relay, int | None]]:
    """Run the gateway while the body runs; yields its address, itself and the port of gRPC.

    Raises:
        UserError: if the options, or the upstreams, cannot work.
    """
    check(options)
    token, roots = read_token(options.token_file), read_roots(options.upstream_ca)
    theirs = UpstreamToken(options.upstream_token_file)
    certificate = read_certificate(options.tls_cert, options.tls_key)
    open_one = partial(open_upstream, roots=roots, own=theirs.own)
    discovery = Discovery(options.upstream, options.upstreams_file)
    urls, lacking = await discovery.urls()
    if lacking and not urls and options.makes_up:
        raise UserError(lacking)  # what makes up for them is made for what they say
    if lacking:
        log_event("upstreams are looked for", logging.WARNING, reason=lacking)
    upstreams = [open_one(url) for url in urls]
    places = max(PLACES, len(upstreams)) if discovery.changes else None
    metrics = Metrics()
    both = metrics, UpstreamMetrics(metrics.registry)
    try:
        guard = await open_guard(options, upstreams, open_one, both[1])
        relay = make_relay(options, upstreams, places, guard, both)
    except BaseException:
        await asyncio.gather(*(upstream.close() for upstream in upstreams))
        raise
    memory = BodyMemory(options.body_memory, relay.front.refuse)
    hosts = (options.host, *options.allowed_host)
    guarded = not is_open(options.host, options.token_file)
    if relay.service is None:
        most = options.body
        app = build_gateway_app(relay, memory, most, token=token, hosts=hosts, guarded=guarded)
    else:
        most = body_limit(relay.service.served, MAX_BATCH, options.body)
        how = AppOptions(MAX_BATCH, most, memory.most, token, hosts=hosts, guarded=guarded)
        app = build_app(relay.service, how, memory=memory, starts=False)
    deadline = options.deadline_ms
    async with (
        tracing_of(relay.front, app, options.traces),
        listening(app, options.host, options.port, deadline, relay.front, certificate) as address,
        AsyncExitStack() as stack,
    ):
        port = None
        if options.grpc_port is not None:
            from codedinvnet.serving.faces.grpc import Backend, GrpcFace
            from codedinvnet.serving.gateway.grpc_backend import RelayBackend
            from codedinvnet.serving.service_grpc import ServiceBackend

            backend: Backend = RelayBackend(relay)
            if relay.service is not None:
                backend = ServiceBackend(relay.service, MAX_BATCH, memory.large)
            backend = traced(backend, relay.front.waiting.tracing)
            counter = relay.front.metrics.requests
            face = GrpcFace(backend, memory, counter, token=token, max_message=most)
            grace = options.deadline_ms / 1000
            port = await stack.enter_async_context(
                face.listening(options.host, options.grpc_port, grace, certificate)
            )
        await relay.front.start()
        if discovery.changes:
            following = asyncio.create_task(follow(discovery, relay.pool, open_one))
            stack.callback(following.cancel)
        if theirs.path is not None:
            renewing = asyncio.create_task(theirs.follow())
            stack.callback(renewing.cancel)
        yield address, relay, port


async def _run(options: GatewayOptions) -> None:
    if is_open(options.host, options.token_file):
        why = "whoever reaches the port may send requests"
        if options.makes_up:  # upstreams may want a token of each client
            why += ", and gets approximate answers though no upstream was asked who may"
        log_event("no token", logging.WARNING, host=options.host, reason=why)
    about = ""

    @asynccontextmanager
    async def serving() -> AsyncIterator[tuple[str, FrontEnd]]:
        nonlocal about
        async with running(options) as (address, relay, port):
            count = sum(place.is_filled for place in relay.pool.places)
            about = "" if port is None else f" and gRPC port {port}"
            about += f": {count} upstream{'' if count == 1 else 's'}"
            yield address, relay.front

    def line(address: str, front: FrontEnd) -> str:
        policy = options.policy or front.rules.policy.name
        how = f"{options.slots} slots each, policy {policy}"
        return f"gateway of {options.name} on {address}{about}, {how}"

    await until_told(serving(), line)


def run_gateway(options: GatewayOptions) -> None:
    """Run the gateway until SIGTERM or Ctrl-C, then drain and stop."""
    log_to_stderr()
    allow_files()
    with contextlib.suppress(asyncio.CancelledError):  # told to stop before it was up
        uvloop.run(_run(options))
