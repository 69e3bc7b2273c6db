"""The settings of the gateway, checked before anything is asked or started."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from codedinvnet.errors import UserError
from codedinvnet.serving.options import check_ports
from codedinvnet.serving.rules.settings import POLICIES, ROUTINGS

OFFERED = tuple(name for name, policy in POLICIES.items() if not policy.coded)
"""Policies that need to understand nothing of what is asked."""


@dataclass(frozen=True)
class GatewayOptions:
    """What the command line may say; times are in milliseconds."""

    name: str
    upstream: tuple[str, ...] = ()
    upstreams_file: Path | None = None
    slots: int = 4
    policy: str = "hedge"
    routing: str = "least-loaded"
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    allowed_host: tuple[str, ...] = ()
    deadline_ms: float = 5000.0
    hang_timeout_ms: float | None = None
    """None: what suits the deadline (`hang_limit`)."""
    down_timeout_ms: float = 30_000.0
    cancel: bool = False
    max_pending: int | None = None
    """None: what suits the upstreams (`pending_limit`)."""
    max_body_memory: float = 512.0
    """MiB."""
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    upstream_ca: Path | None = None
    traces: str | None = None


def check(options: GatewayOptions) -> None:
    """Refuse what cannot work.

    Raises:
        UserError: naming the option.
    """
    choices = (("--policy", options.policy, OFFERED), ("--routing", options.routing, ROUTINGS))
    for flag, value, known in choices:
        if value not in known:
            raise UserError(f"{flag}: {value!r} is not one of {', '.join(known)}")
    if not options.name:
        raise UserError("NAME: the model that the upstreams have")
    if not options.upstream and options.upstreams_file is None:
        raise UserError("--upstream: at least one is needed, such as http://127.0.0.1:8000")
    twice = {url for url in options.upstream if options.upstream.count(url) > 1}
    if twice:
        raise UserError(f"--upstream: {min(twice)} is there twice")
    numbers = ("slots", "deadline_ms", "hang_timeout_ms", "down_timeout_ms", "max_pending")
    for name in (*numbers, "max_body_memory"):
        number = getattr(options, name)
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: must be above 0, got {number}")
    check_ports(options.port, options.grpc_port)


def read_roots(path: Path | None) -> bytes | None:
    """Return the certificates in a file; None without one.

    Raises:
        UserError: if there are none.
    """
    if path is None:
        return None
    try:
        found = path.read_bytes()
    except OSError as error:
        raise UserError(f"--upstream-ca: cannot read {path}: {error.strerror}") from error
    if b"-----BEGIN CERTIFICATE-----" not in found or not found.isascii():
        raise UserError(f"--upstream-ca: {path} has no certificate (PEM)")
    return found
