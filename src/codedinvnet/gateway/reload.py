"""SIGHUP: a running gateway goes on by options that are read again, all of them or none."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from codedinvnet.common.errors import UserError
from codedinvnet.gateway.affinity import Affinity
from codedinvnet.gateway.options import Change, GatewayOptions, change
from codedinvnet.gateway.together import digest_of
from codedinvnet.gateway.tokens import UpstreamToken
from codedinvnet.net.background import in_thread
from codedinvnet.net.guard import Token
from codedinvnet.net.logs import log_event, logger
from codedinvnet.net.systemd import notify
from codedinvnet.net.tls import read_certificate

if TYPE_CHECKING:
    from codedinvnet.gateway.run import RunningGateway


async def follow(
    gateway: RunningGateway, read: Callable[[], GatewayOptions], asked: asyncio.Event
) -> None:
    """Have a gateway go on by other options whenever this is asked, for ever.

    Args:
        gateway: that runs.
        read: returns its options as they are now.
        asked: set by whoever asks.
    """
    while True:
        await asked.wait()
        asked.clear()
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            found = await reload(gateway, await in_thread(read))
        except UserError as error:
            log_event("not reloaded", logging.ERROR, reason=str(error))
        else:
            log_event("reloaded", changed=found.changed, needs_restart=found.ignored)
        notify("READY=1")


async def reload(gateway: RunningGateway, asked: GatewayOptions) -> Change:
    """Go on by other options; requests that are under way end by those that they began with.

    Raises:
        UserError: if they are wrong; all is as it was.
    """
    old, handler, admin = gateway.options, gateway.handler, gateway.admin
    assert handler is not None
    assert admin is not None
    found = change(old, asked)
    options = found.options
    token, own = Token(options.token_file), UpstreamToken(options.upstream_token_file)
    certificate = read_certificate(options.tls_cert, options.tls_key or options.tls_cert)
    affinity = None if options.affinity is None else Affinity(options.affinity)
    rules, discoveries, coming = options.rules, gateway.discoveries(options), []
    for discovery in discoveries:
        urls, lacking = await discovery.urls()
        if lacking:
            raise UserError(lacking)
        coming.append(urls)
    # From here on nothing is refused.
    gateway.options = options
    for flag, kept, read in (
        ("token-file", gateway.guard.token, token),
        ("upstream-token-file", gateway.upstream_token, own),
    ):
        if kept.text != read.text and flag not in found.changed:
            found.changed.append(flag)
        kept.path, kept.text = read.path, read.text
    if gateway.certificate is not None and certificate is not None:
        gateway.certificate.chain, gateway.certificate.key = certificate.chain, certificate.key
    gateway.allow()
    if (rules, options.limits) != (old.rules, old.limits):
        gateway.routes.change(rules, options.limits)
    logger.setLevel(options.log_level.upper())
    if options.access_log != old.access_log:
        gateway.log_accesses()
    handler.affinity, handler.hops = affinity, options.trusted_hops
    for dispatcher in admin.dispatchers:
        dispatcher.cancels = options.cancels
        if options.chosen_policy is not old.chosen_policy:
            dispatcher.change_policy(options.chosen_policy.name)
    admin.dispatchers[0].cluster.health = options.health
    for dispatcher, discovery, urls in zip(admin.dispatchers, discoveries, coming, strict=True):
        dispatcher.cluster.change(urls)
        gateway.follow(dispatcher, discovery)
    if gateway.links is not None:
        gateway.links.digest = digest_of(options)
    return found
