"""`codedinvnet gateway`: run it until a signal, and have it read its options again on SIGHUP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import uvloop

from codedinvnet.gateway import reload
from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.gateway.run import running
from codedinvnet.gateway.together import Place, supervise
from codedinvnet.net.background import Background
from codedinvnet.net.collector import freeze_loaded, keep_freed
from codedinvnet.net.listening import (
    log_to_stderr,
    stop_signals,
)
from codedinvnet.net.resolve import Resolver
from codedinvnet.net.systemd import Inherited, inherited, notify
from codedinvnet.net.tracing import NOISY


async def serve(
    options: GatewayOptions,
    read: Callable[[], GatewayOptions],
    resolver: Resolver | None,
    place: Place | None,
    sockets: Inherited,
) -> None:
    """Run a gateway until a signal; with another it goes on by options that are read again."""
    asked, background = asyncio.Event(), Background()
    stop = stop_signals(asked.set)
    starting = asyncio.ensure_future(stop.wait())
    async with running(options, resolver, place, sockets) as gateway:
        background.spawn(reload.follow(gateway, read, asked))
        freeze_loaded()
        keep_freed()
        assert gateway.admin is not None
        clusters = (each.cluster for each in gateway.admin.dispatchers)
        count = sum(len(list(cluster.mains_here())) for cluster in clusters)
        admin = (
            "" if gateway.admin_url == gateway.url else f", its own routes on {gateway.admin_url}"
        )
        print(
            f"gateway to {count} upstream{'s' * (count != 1)} on {gateway.url}{admin} "
            "(Ctrl-C or SIGTERM drains and stops)",
            flush=True,
        )
        notify("READY=1")
        await starting
        await background.stop()


def run_gateway(read: Callable[[], GatewayOptions], resolver: Resolver | None = None) -> None:
    """Run `codedinvnet gateway`.

    Args:
        read: returns its options as the command line and the file have them now.
        resolver: see `running`.
    """
    sockets = inherited()

    def run(
        options: GatewayOptions, read: Callable[[], GatewayOptions], place: Place | None
    ) -> None:
        uvloop.run(serve(options, read, resolver, place, sockets))

    def fitted() -> GatewayOptions:
        return sockets.fitted(read())

    options = fitted()
    stop_logging = log_to_stderr(*NOISY, level=options.log_level)
    try:
        if options.processes == 1:
            run(options, fitted, None)
        else:
            supervise(fitted, run, sockets)
    finally:
        stop_logging()
