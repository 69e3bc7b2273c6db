"""Sockets to listen on, signals to stop by, and open files."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable

from codedinvnet.common.errors import UserError
from codedinvnet.net.logs import JsonLines, logger

UNREAD = 60.0
"""Seconds for which a client's machine may acknowledge nothing."""
BACKLOG = 2048
"""Connections that wait until they are accepted."""
MOST_FILES = 1 << 20
"""Open files that are asked for; each costs nothing before it is open."""
OTHER_FILES = 256
"""Open files that are not clients' connections, at least."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that processes which share a port get from the one that started them."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Names of this machine for itself."""


def bind(
    host: str, port: int, flag: str = "--port", shared: bool = False, listens: bool = True
) -> socket.socket:
    """Return a listening socket.

    Args:
        host: to listen on.
        port: to listen on; 0: a free one.
        flag: the option that names it, for messages.
        shared: whether other processes of this user may listen on it as well.
        listens: False: it is only kept for others that do.

    Raises:
        UserError: if the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, the event loop knows that it is TCP and switches Nagle's algorithm
    # off: otherwise a response's body waits for the client's delayed acknowledgement, 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    prepare(listener)
    try:
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        if listens:
            listener.listen(BACKLOG)  # now, since two that only bind do not notice each other
    except (OSError, UnicodeError) as error:  # the latter of what can be no host's name
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag}: cannot listen on {host}:{port}: {reason}") from error
    return listener


def prepare(listener: socket.socket) -> None:
    """Have clients found that are gone without a word, or read nothing: connections inherit it."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * UNREAD))


def address(listener: socket.socket, secure: bool = False) -> str:
    """Return the URL of a listening socket."""
    name, number = listener.getsockname()[:2]
    scheme = "https" if secure else "http"
    return f"{scheme}://[{name}]:{number}" if ":" in name else f"{scheme}://{name}:{number}"


def allow_files() -> int:
    """Let this process open as many files as it may; return how many connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # macOS has limits of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    found, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if found == resource.RLIM_INFINITY:
        found = MOST_FILES
    return max(16, min(found - OTHER_FILES, found // 2))


def log_to_stderr(*errors_of: str, level: str = "info") -> Callable[[], None]:
    """Write events as JSON lines to standard error; return a function that undoes this.

    Args:
        errors_of: names of loggers of which only errors are written.
        level: of what is less, nothing is written.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    least = logging.getLevelNamesMapping()[level.upper()]
    levels = {logger.name: least, "asyncio": max(least, logging.WARNING)}
    levels |= dict.fromkeys(errors_of, logging.ERROR)
    before = []
    for name, own in levels.items():
        chosen = logging.getLogger(name)
        before.append((chosen, chosen.handlers, chosen.level, chosen.propagate))
        chosen.handlers, chosen.propagate = [handler], False
        chosen.setLevel(own)

    def undo() -> None:
        for chosen, handlers, level, propagate in before:
            chosen.handlers, chosen.propagate = handlers, propagate
            chosen.setLevel(level)

    return undo


def stop_signals(reload: Callable[[], object]) -> asyncio.Event:
    """Return what is set by SIGTERM and Ctrl-C, and by SIGHUP if the process has a terminal.

    A second Ctrl-C ends the process at once. A second SIGTERM does not: timeout(1) sends one to the
    process and one to its group. SIGUSR1 and SIGUSR2 do nothing.

    Args:
        reload: what SIGHUP without a terminal does.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def end(number: int) -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        loop.add_signal_handler(number, lambda: None)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        has_terminal = sys.stdin is not None and sys.stdin.isatty()
        hung_up = (end, signal.SIGHUP) if has_terminal else (reload,)
        loop.add_signal_handler(signal.SIGHUP, *hung_up)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    return stop


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches what listens on a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOOPBACK


def free_port() -> int:
    """Return a port of this machine that no one listens on, for now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
