"""The options of `codedinvnet gateway`."""

from __future__ import annotations

import math
import re
from collections import Counter
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from codedinvnet.common.errors import UserError
from codedinvnet.common.options import Options, option
from codedinvnet.gateway.affinity import Affinity
from codedinvnet.gateway.discovery import DNS
from codedinvnet.members.wire import read_members
from codedinvnet.net.client import parse_origin
from codedinvnet.scheduler.policies import AUTO, HEDGE, POLICIES, Policy

if TYPE_CHECKING:
    from codedinvnet.gateway.routes import Limits, Rule

MIB = 1 << 20
GRPC = ("grpc://", "grpcs://")
UPSTREAMS, HEDGING, LISTENING = "upstreams", "hedging", "listening and limits"
TOGETHER = "several gateways"
SECURITY = "security"
OFFERED = ("uncoded", "replicate", "hedge")
"""The policies; with a fallback there is `auto` as well."""

TLS = frozenset({"tls_cert", "tls_key"})
RELOADED = TLS.union(
    ("upstream", "upstreams_file", "health", "policy", "route", "hedge_delay_ms", "affinity"),
    ("cancel", "deadline_ms", "drain_notice_ms", "drain_ms", "access_log", "log_level"),
    ("trusted_hops", "allow_host", "token_file", "upstream_token_file"),
)
"""The options that change without a restart."""


class GatewayOptions(Options):
    """The options of `codedinvnet gateway`."""

    upstream: tuple[str, ...] = option(
        (), "a server: http://HOST:PORT, https://..., grpc://HOST:PORT or grpcs://...; "
        "dns+http://NAME:PORT is each address of a name, resolved every second. A path in it "
        "precedes that of each request. Repeatable",
        group=UPSTREAMS, metavar="URL",
    )  # fmt: skip
    upstreams_file: Path | None = option(
        None, "file with more upstreams, one a line; read every second",
        group=UPSTREAMS, metavar="FILE", unset="none",
    )  # fmt: skip
    health: str | None = option(
        None, "path that answers 2xx while an upstream is ready",
        group=UPSTREAMS, metavar="PATH",
        unset="/v2/health/ready where it exists, else a TCP connection",
    )  # fmt: skip
    slots: int | None = option(
        None, "concurrent requests that each upstream handles at most: one more than it computes "
        "at once", group=UPSTREAMS, gt=0, unset="found for each upstream from its answers",
    )  # fmt: skip
    policy: str | None = option(
        None, f"{', '.join(OFFERED)}; with a fallback also auto",
        group=HEDGING, unset="hedge; auto with a fallback",
    )  # fmt: skip
    route: tuple[str, ...] = option(
        (), "how requests are treated, such as 'POST /predict hedge=on deadline=5s'; the first "
        "that fits counts. hedge=on: they are safe to repeat, as the built-in ones are; off: they "
        "aren't; a time or MIN:MAX: they are, and copied after so long. deadline: in place of "
        "--deadline-ms. idle: a stream without a byte for so long is cut off (5m). priority: high, "
        "normal or low: who waits while all are busy. Repeatable",
        group=HEDGING, metavar="'METHOD GLOB [KEY=VALUE ...]'",
    )  # fmt: skip
    hedge_delay_ms: str | None = option(
        None, "clamp the delay of copies, which adapts to what a route's requests take; until that "
        "is known it is MAX, and nothing is copied without one",
        group=HEDGING, metavar="MIN:MAX", unset="no clamp",
    )  # fmt: skip
    hold_out: float = option(
        1.0, "share of the late requests to be copied that by lot are not: they show what copies "
        "save; 0: none", group=HEDGING, unit="percent", ge=0, le=100,
    )  # fmt: skip
    affinity: str | None = option(
        None, "send requests where their beginning is cached, as servers of language models do: "
        "`prefix` compares prompts; a header such as x-session, cookie:NAME or body:FIELD names a "
        "session",
        group=HEDGING, metavar="HOW", unset="any upstream",
    )  # fmt: skip
    cancel: Literal["close", "leave"] | None = option(
        None, "what to do with the slower copy, or when a client leaves: close the connection to "
        "the upstream, or leave it to finish",
        group=HEDGING, unset="close streams and what clients left, leave slower copies",
    )  # fmt: skip
    fallback: str | None = option(
        None, "a cheaper server that gets late requests that are safe to repeat",
        group=HEDGING, metavar="URL", unset="none",
    )  # fmt: skip
    protection: Path | None = option(
        None, "folder of `codedinvnet protect`, whose small backup is served as the fallback",
        group=HEDGING, metavar="DIR", unset="none",
    )  # fmt: skip
    host: str = option("127.0.0.1", "address to listen on", group=LISTENING)
    port: int = option(8000, "port; 0: a free one", group=LISTENING, ge=0, le=65535)
    grpc_port: int | None = option(
        None, "port for gRPC clients of gRPC upstreams; 0: a free one",
        group=LISTENING, unset="none", ge=0, le=65535,
    )  # fmt: skip
    admin_port: int | None = option(
        None, "port of /metrics, /livez, /readyz, the page and /policy, in place of the main one",
        group=LISTENING, unset="none", ge=0, le=65535,
    )  # fmt: skip
    deadline_ms: float = option(
        30_000.0, "fail a request without a first byte of content after this long",
        group=LISTENING, unit="ms", gt=0, lt=math.inf,
    )  # fmt: skip
    drain_notice_ms: float = option(
        0.0, "after SIGTERM, go on taking connections for this long, while /readyz says 503: the "
        "time in which your balancer notices",
        group=LISTENING, unit="ms", ge=0, lt=math.inf,
    )  # fmt: skip
    drain_ms: float = option(
        60_000.0, "then let requests and streams that are under way go on for this long",
        group=LISTENING, unit="ms", ge=0, lt=math.inf,
    )  # fmt: skip
    max_memory: float = option(
        512.0, "what requests and answers may hold in all, before 503; one body an eighth of it",
        group=LISTENING, unit="MiB", gt=0, lt=math.inf,
    )  # fmt: skip
    members: str | None = option(
        None, "gateways before the same upstreams that decide as one, this one among them: "
        "HOST:PORT, or dns+NAME:PORT for each address of a name, separated by commas",
        group=TOGETHER, metavar="LIST", unset="none",
    )  # fmt: skip
    member_port: int | None = option(
        None, "port for the other members; on 127.0.0.1 unless members have a token",
        group=TOGETHER, unset="none", gt=0, le=65535,
    )  # fmt: skip
    member_token_file: Path | None = option(
        None, "members show one another the token in this file; read again when it changes",
        group=TOGETHER, metavar="FILE", unset="none",
    )  # fmt: skip
    processes: int = option(
        1, "processes that share the port and decide as one; the n-th has its own routes on the "
        "n-th port from --admin-port on", group=TOGETHER, ge=1, le=64,
    )  # fmt: skip
    access_log: Literal["json", "combined"] | None = option(
        None, "write a line for each request to standard output: json or combined",
        group=LISTENING, unset="none",
    )  # fmt: skip
    log_level: Literal["info", "warning", "error"] = option(
        "info", "events below are not logged: info, warning or error", group=LISTENING
    )
    trusted_hops: int = option(
        0, "proxies of your own in front of the gateway: so many of the last entries of "
        "X-Forwarded-For and Forwarded are believed, and passed on",
        group=SECURITY, ge=0, le=16,
    )  # fmt: skip
    allow_host: tuple[str, ...] = option(
        (), "a name that clients may call the gateway by (Host header); *: any. Repeatable",
        group=SECURITY, metavar="NAME", unset="localhost; any if --host is no loopback address",
    )  # fmt: skip
    token_file: Path | None = option(
        None, "clients must send the token in this file, as a bearer token; read again when it "
        "changes",
        group=SECURITY, metavar="FILE", unset="none",
    )  # fmt: skip
    tls_cert: Path | None = option(
        None, "certificate, PEM; read again when it changes",
        group=SECURITY, metavar="FILE", unset="no TLS",
    )  # fmt: skip
    tls_key: Path | None = option(
        None, "its key, PEM, without a password",
        group=SECURITY, metavar="FILE", unset="in the certificate's file",
    )  # fmt: skip
    upstream_ca: Path | None = option(
        None, "certificates to trust at upstreams, PEM",
        group=SECURITY, metavar="FILE", unset="this machine's; of gRPC its own",
    )  # fmt: skip
    upstream_token_file: Path | None = option(
        None, "upstreams get the token in this file; read again when it changes",
        group=SECURITY, metavar="FILE", unset="what clients send",
    )  # fmt: skip

    def check(self) -> None:
        """Refuse what does not fit together.

        Raises:
            UserError: naming the option.
        """
        if not self.upstream and self.upstreams_file is None:
            raise UserError("--upstream: at least one is needed, such as http://127.0.0.1:8000")
        twice = [url for url, count in Counter(self.upstream).items() if count > 1]
        if twice:
            raise UserError(f"--upstream: {twice[0]} is there twice")
        if bool(self.grpc_upstreams) != (self.grpc_port is not None):
            raise UserError("--grpc-port: goes with grpc:// upstreams, which need it")
        if self.fallback and self.protection:
            raise UserError("--protection: is a fallback itself; give one of the two")
        if self.health is not None and not re.fullmatch(r"/[\x21-\x7e]*", self.health):
            raise UserError(f"--health: must be a path such as /healthz, got {self.health!r}")
        if not self.http_upstreams and self.upstreams_file is None:
            for name in ("health", "fallback", "protection"):
                if getattr(self, name) is not None:
                    raise UserError(f"--{name}: is for upstreams over HTTP, and there is none")
        self._check_members()
        names = self.policies
        if self.policy is not None and self.policy not in names:
            raise UserError(f"--policy: must be one of {', '.join(names)}, got {self.policy!r}")
        if self.tls_key is not None and self.tls_cert is None:
            raise UserError("--tls-key: needs --tls-cert")
        _ = self.rules
        if self.affinity is not None:
            Affinity(self.affinity)
        for url in self.upstream:
            if "://" not in url:
                schemes = "http://, https://, grpc:// or grpcs://, also behind dns+"
                raise UserError(f"--upstream: {url!r} must begin with {schemes}")
        for url in self.http_upstreams:
            parse_origin(url.removeprefix(DNS))
        for url in self.grpc_upstreams:
            parse_origin(url.removeprefix(DNS), kind="grpc")
        if self.fallback is not None:
            parse_origin(self.fallback, "--fallback")
        if self.hedge_delay is not None and self.hedge_delay[1] <= 0:
            raise UserError("--hedge-delay-ms: MAX must be above 0")

    def _check_members(self) -> None:
        if (self.members is None) != (self.member_port is None):
            raise UserError("--members: goes with --member-port; each gateway needs both")
        if self.member_token_file is not None and self.members is None:
            raise UserError("--member-token-file: goes with --members")
        if self.members is not None:
            others = [host for _, host, _ in read_members(self.members)]
            if self.member_token_file is None and not all(map(_is_here, others)):
                raise UserError("--members: on other machines they need --member-token-file")
            if self.processes > 1:
                raise UserError("--processes: goes without --members")
        if self.processes > 1 and self.admin_port is None:
            raise UserError("--processes: needs --admin-port, as each process has its own metrics")
        if (self.members is not None or self.processes > 1) and (
            self.has_fallback or self.grpc_upstreams
        ):
            raise UserError(
                "--members and --processes: go with upstreams over HTTP, and without a fallback"
            )

    @property
    def http_upstreams(self) -> tuple[str, ...]:
        """The upstreams that are reached over HTTP."""
        return tuple(url for url in self.upstream if not url.removeprefix(DNS).startswith(GRPC))

    @property
    def grpc_upstreams(self) -> tuple[str, ...]:
        """The upstreams that are reached over gRPC."""
        return tuple(url for url in self.upstream if url.removeprefix(DNS).startswith(GRPC))

    @property
    def has_fallback(self) -> bool:
        """Whether late requests are sent to a cheaper server."""
        return self.fallback is not None or self.protection is not None

    @property
    def policies(self) -> tuple[str, ...]:
        """The names of the policies that there are."""
        return (*OFFERED, AUTO.name) if self.has_fallback else OFFERED

    @property
    def chosen_policy(self) -> Policy:
        """The policy to begin with."""
        usual = AUTO if self.has_fallback else HEDGE
        return usual if self.policy is None else POLICIES[self.policy]

    @property
    def cancels(self) -> bool | None:
        """Whether attempts that nobody waits for are closed; None: some are."""
        return None if self.cancel is None else self.cancel == "close"

    @property
    def hedge_delay(self) -> tuple[float, float] | None:
        """The clamps of the delay, in seconds; None without."""
        if self.hedge_delay_ms is None:
            return None
        number = r"\d+(?:\.\d+)?"
        found = re.fullmatch(rf"({number})?:({number})?", self.hedge_delay_ms)
        least, most = (None, None) if found is None else found.groups()
        low, high = float(least or 0) / 1000, float(most or "inf") / 1000
        if (least is None and most is None) or low > high:
            raise UserError(
                f"--hedge-delay-ms: must be MIN:MAX, such as 5:50, got {self.hedge_delay_ms!r}"
            )
        return low, high

    @property
    def rules(self) -> list[Rule]:
        """What is said of routes."""
        from codedinvnet.gateway.routes import read_rule  # it imports prometheus_client

        return [read_rule(text, "--route") for text in self.route]

    @property
    def limits(self) -> Limits:
        """Those of routes of which nothing else is said."""
        from codedinvnet.gateway.routes import Limits

        return Limits(self.deadline, delay=self.hedge_delay)

    @property
    def deadline(self) -> float:
        """Seconds until a request fails."""
        return self.deadline_ms / 1000

    @property
    def memory(self) -> int:
        """Bytes that requests and answers may hold."""
        return int(self.max_memory * MIB)

    @property
    def body(self) -> int:
        """Bytes of one request's body."""
        return max(1, self.memory // 8)


class Change(NamedTuple):
    """Options to go on by."""

    options: GatewayOptions
    changed: list[str]
    """What is another than before, as files call it."""
    ignored: list[str]
    """What needs a restart."""


def change(old: GatewayOptions, new: GatewayOptions) -> Change:
    """Return what becomes of a gateway's options when these are read.

    Raises:
        UserError: if what needs no restart does not go with what does.
    """
    flags = dict(GatewayOptions.names())
    reloaded = RELOADED if (old.tls_cert is None) is (new.tls_cert is None) else RELOADED - TLS
    differ = [name for name in flags if getattr(old, name) != getattr(new, name)]
    kept = {name: getattr(old, name) for name in differ if name not in reloaded}
    ignored = [flags[name] for name in kept]
    options = new.model_copy(update=kept)
    try:
        options.check()
    except UserError as error:
        if not kept:
            raise
        raise UserError(f"{error} (without a restart {', '.join(ignored)} stay)") from error
    return Change(options, [flags[name] for name in differ if name not in kept], ignored)


def _is_here(host: str) -> bool:
    """Return whether a host is this machine, or a name, of which nobody knows yet."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return True
