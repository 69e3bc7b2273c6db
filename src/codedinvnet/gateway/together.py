"""What makes a gateway one of several: its part in deciding, its lines, and shared ports."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from codedinvnet.common.errors import UserError
from codedinvnet.gateway.options import GatewayOptions, change
from codedinvnet.members.joining import digest, join_in, told
from codedinvnet.members.links import Links
from codedinvnet.members.member import Member
from codedinvnet.members.wire import read_members
from codedinvnet.net.guard import Token
from codedinvnet.net.listening import PASSED_ON, bind
from codedinvnet.net.logs import log_event
from codedinvnet.net.resolve import Resolver
from codedinvnet.net.systemd import Inherited
from codedinvnet.net.tls import Certificate

COMMON = (
    *("upstream", "route", "slots", "policy", "hedge_delay_ms", "deadline_ms"),
    *("affinity", "health", "cancel", "hold_out"),
)
"""The options that all members have in common."""
PR_SET_PDEATHSIG = 1
"""Has a process get a signal when its parent ends: prctl(2)."""
RESTART = 1.0
"""Seconds until a process that has ended is started again."""


class Place(NamedTuple):
    """A process among those that share a port."""

    number: int
    folder: Path
    """Where each has a Unix socket."""


def digest_of(options: GatewayOptions) -> str:
    """Return what is the same for members that may decide as one."""
    common = {name: getattr(options, name) for name in COMMON}
    common["upstream"] = sorted(options.upstream)
    return digest(common)


async def join(
    options: GatewayOptions,
    place: Place | None,
    member: Member,
    resolver: Resolver,
    certificate: Certificate | None,
) -> Links:
    """Have a gateway decide with others from now on.

    Raises:
        UserError: if the port or the token cannot be used.
    """
    if place is not None:
        return await join_in(place.folder, member, digest_of(options), resolver)
    assert options.members is not None
    assert options.member_port is not None
    token = Token(options.member_token_file, "--member-token-file")
    others = read_members(options.members)
    host = options.host if token.text else "127.0.0.1"
    listener = bind(host, options.member_port, "--member-port")
    links = Links(member, others, digest_of(options), told(), token, resolver, certificate)
    await links.start(listener)
    return links


def supervise(
    read: Callable[[], GatewayOptions],
    run: Callable[[GatewayOptions, Callable[[], GatewayOptions], Place], None],
    sockets: Inherited,
) -> None:
    """Run processes that share a port until a signal, and start those again that end.

    Args:
        read: returns the options of the command as they are now.
        run: runs one with its options, and with what reads them again.
        sockets: to listen on.

    Raises:
        UserError: if the options cannot work, or the port is taken.
    """
    options = read()
    if sockets.admin is not None:
        raise UserError("--processes: each needs an --admin-port of its own, and no socket of it")
    kept = sockets.main
    if kept is None:
        bind(options.host, options.port).close()  # nobody else may have it
        kept = bind(options.host, options.port, shared=True, listens=False)
    options = options.model_copy(update={"port": kept.getsockname()[1]})
    running: dict[int, int] = {}
    supervisor, stopping = os.getpid(), False

    def own(found: GatewayOptions, index: int) -> GatewayOptions:
        ports = {"port": options.port, "admin_port": (found.admin_port or 0) + index}
        return found.model_copy(update=ports)

    def stop(number: int, _: object) -> None:
        nonlocal stopping, options
        if number == signal.SIGHUP:
            with contextlib.suppress(UserError):  # each process logs it
                options = change(options, own(read(), 0)).options
        stopping = stopping or number in (signal.SIGTERM, signal.SIGINT)
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    with TemporaryDirectory(prefix="codedinvnet-") as folder:

        def start(index: int) -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # or one could miss the new process
            process = os.fork()
            if process:
                running[process] = index
                signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
                return
            status = 1
            try:
                for number in PASSED_ON:
                    signal.signal(number, signal.SIG_DFL)
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != supervisor:
                    return
                if sockets.main is None:
                    kept.close()
                run(own(options, index), lambda: own(read(), index), Place(index, Path(folder)))
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)

        for number in PASSED_ON:
            signal.signal(number, stop)
        for index in range(options.processes):
            start(index)
        while running:
            process, status = os.wait()
            index = running.pop(process)
            if not stopping:
                code = os.waitstatus_to_exitcode(status)
                log_event("a process ended", logging.ERROR, process=index, status=code)
                time.sleep(RESTART)
                if not stopping:
                    start(index)
    kept.close()
