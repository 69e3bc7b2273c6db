"""The settings of the gateway, checked before anything is asked or started."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from codedinvnet.codes.rules import SMALL_BACKUP
from codedinvnet.errors import UserError
from codedinvnet.scheduler.policies import CODED, HEDGE, POLICIES, WITH_HEDGE, Policy
from codedinvnet.scheduler.settings import coded_too_late, hang_limit
from codedinvnet.serving.listening import check_limit, check_ports

OFFERED: Mapping[str, Policy] = {
    **{name: policy for name, policy in POLICIES.items() if not policy.guessing},
    SMALL_BACKUP: CODED,
    SMALL_BACKUP + WITH_HEDGE: CODED | HEDGE,
}
"""The policies by name. A small backup is what `coded` means where there is one."""
MIB = 2**20
GROUP_TIMEOUT_MS = 20.0
"""Until a group is coded that is not full, if nobody says."""
MOST_K = 10
"""Members of a group, at most, if nobody says."""


@dataclass(frozen=True)
class GatewayOptions:
    """What the command line may say; times are in milliseconds."""

    name: str
    upstream: tuple[str, ...] = ()
    upstreams_file: Path | None = None
    slots: int = 4
    policy: str | None = None
    """None: `auto` with a small backup, `coded` with a code, else `hedge`."""
    protection: Path | None = None
    """The folder of `codedinvnet protect`; `method` then is one of its table."""
    method: str | None = None
    backup_upstream: str | None = None
    backup_workers: int | None = None
    """None: one."""
    k: int | None = None
    """None: the protection's, or what suits the upstreams."""
    max_disagreement: float | None = None
    """The share of released approximate answers that may disagree; None: all are released."""
    group_timeout_ms: float | None = None
    """None: `GROUP_TIMEOUT_MS`."""
    scores: str | None = None
    inputs: tuple[str, ...] = ()
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
    max_body: float = 64.0
    """MiB of one request."""
    max_body_memory: float = 512.0
    """MiB of all that are here."""
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    upstream_ca: Path | None = None
    upstream_token_file: Path | None = None
    traces: str | None = None

    @property
    def makes_up(self) -> bool:
        """Whether there is something that answers in place of an upstream."""
        return any((self.protection, self.method, self.backup_upstream))

    @property
    def body(self) -> int:
        """Bytes of one request."""
        return min(int(self.max_body * MIB), self.body_memory)

    @property
    def body_memory(self) -> int:
        """Bytes of all requests that are here."""
        return int(self.max_body_memory * MIB)

    @property
    def group_timeout(self) -> float:
        """Milliseconds until a group is coded that is not full."""
        return GROUP_TIMEOUT_MS if self.group_timeout_ms is None else self.group_timeout_ms

    @property
    def hang_seconds(self) -> float:
        """Seconds without an answer after which another upstream may be asked."""
        return (self.hang_timeout_ms or hang_limit(self.deadline_ms)) / 1000


def check(options: GatewayOptions) -> None:
    """Refuse what cannot work.

    Raises:
        UserError: naming the option.
    """
    if options.policy is not None and options.policy not in OFFERED:
        raise UserError(f"--policy: {options.policy!r} is not one of {', '.join(OFFERED)}")
    if not options.name:
        raise UserError("NAME: the model that the upstreams have")
    if "/" in options.name and options.grpc_port is None:
        raise UserError(
            f"NAME: no URL over HTTP leads to {options.name!r}; clients over gRPC need --grpc-port"
        )
    if not options.upstream and options.upstreams_file is None:
        raise UserError("--upstream: at least one is needed, such as http://127.0.0.1:8000")
    twice = {url for url in options.upstream if options.upstream.count(url) > 1}
    if twice:
        raise UserError(f"--upstream: {min(twice)} is there twice")
    if options.backup_upstream is not None and (options.protection or options.method):
        raise UserError("--backup-upstream: goes without --protection and --method")
    if options.policy is not None:
        policy, needed = OFFERED[options.policy], "a --protection, --backup-upstream or --method"
        if policy.coded and not options.makes_up:
            raise UserError(f"--policy: {options.policy} needs {needed}")
        if options.makes_up and not policy.takes_code:
            raise UserError(f"--policy: {options.policy} goes without {needed}")
    check_used(options)
    check_numbers(options)
    if options.k is not None and (options.protection is not None or options.k < 2):
        raise UserError("--k: must be at least 2, and goes without --protection, which has its own")
    check_limit(options.max_disagreement)
    if options.max_disagreement is not None and options.protection is None:
        raise UserError("--max-disagreement: goes with a calibrated --protection")
    check_ports(options.port, options.grpc_port)


def check_numbers(options: GatewayOptions) -> None:
    """Refuse sizes and times that are none.

    Raises:
        UserError: naming the option.
    """
    numbers = ("slots", "deadline_ms", "hang_timeout_ms", "down_timeout_ms", "max_pending")
    for name in (*numbers, "max_body", "max_body_memory", "backup_workers", "group_timeout_ms"):
        number = getattr(options, name)
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: must be above 0, got {number}")
    if options.makes_up and (why := coded_too_late(options.group_timeout, options.deadline_ms)):
        raise UserError(f"--group-timeout-ms: {why}")


def check_used(options: GatewayOptions) -> None:
    """Refuse options that would do nothing.

    Raises:
        UserError: naming the option, and what it goes with.
    """
    used = {"k": options.k, "scores": options.scores, "input": options.inputs}
    for name, value in {**used, "group-timeout-ms": options.group_timeout_ms}.items():
        if value and not options.makes_up:
            raise UserError(f"--{name}: goes with a --protection, --backup-upstream or --method")
    if options.scores is not None and options.protection is not None:
        raise UserError("--scores: goes without --protection, which says it itself")
    if options.backup_workers is not None and options.protection is None:
        raise UserError("--backup-workers: goes with --protection, whose small backup they compute")


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
