"""A running gateway: its parts, put together, with their sockets."""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codedinvnet.common.errors import UserError
from codedinvnet.gateway.access import AccessLog
from codedinvnet.gateway.admin import OPEN, PATHS, Admin
from codedinvnet.gateway.affinity import Affinity
from codedinvnet.gateway.cluster import Cluster
from codedinvnet.gateway.discovery import Discovery, follow
from codedinvnet.gateway.dispatcher import Dispatcher, Refused
from codedinvnet.gateway.forwarded import forwarding
from codedinvnet.gateway.metrics import GatewayMetrics
from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.gateway.protection import BackupServer
from codedinvnet.gateway.proxy import HttpCall
from codedinvnet.gateway.routes import Routes, is_stateful, leaves_root
from codedinvnet.gateway.together import Place, join
from codedinvnet.gateway.tokens import UpstreamToken
from codedinvnet.members.joining import member_for
from codedinvnet.net import tls
from codedinvnet.net.answers import Answers, Reply, error_reply
from codedinvnet.net.background import Background
from codedinvnet.net.client import HttpClient, parse_origin
from codedinvnet.net.guard import ANY, Guard, Token
from codedinvnet.net.http1 import RequestHead
from codedinvnet.net.listening import (
    allow_files,
    bind,
    is_loopback,
)
from codedinvnet.net.logs import log_event
from codedinvnet.net.memory import Memory
from codedinvnet.net.requests import FULL, Request
from codedinvnet.net.resolve import Resolver
from codedinvnet.net.server import HttpServer
from codedinvnet.net.systemd import NO_SOCKETS, Inherited, notify
from codedinvnet.net.tracing import Tracer, exporting
from codedinvnet.scheduler.settings import FIRST_COPIES, FIRST_DELAY, Rules, pending_limit

if TYPE_CHECKING:
    from codedinvnet.gateway.grpc import GrpcServer
    from codedinvnet.members.links import Links

SLOTS = 4
"""Concurrent requests of a fallback unless `--slots` says otherwise."""
PLACES = 32
"""Upstreams that there may be, at least: they come and go."""


class Gateway:
    """Answers requests: the gateway's own routes itself, all others by upstreams.

    Args:
        dispatcher: has requests answered.
        routes: says which may be repeated.
        memory: bounds what they hold.
        admin: answers the own routes; None where they are on a port of their own.
        guard: refuses requests by what their heads say.
        upstream_token: that upstreams get; None: what clients send.
        body: bytes that a request's body may have.
        hops: proxies of the operator's own in front of this one.
        affinity: finds what upstreams may have cached of a request; None: nothing is.
        access: where requests are logged; None: nowhere.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        routes: Routes,
        memory: Memory,
        admin: Admin | None,
        guard: Guard,
        upstream_token: UpstreamToken | None,
        body: int,
        hops: int = 0,
        affinity: Affinity | None = None,
        access: AccessLog | None = None,
    ) -> None:
        self.hops, self.affinity, self.access = hops, affinity, access
        self.dispatcher, self.routes, self.memory = dispatcher, routes, memory
        self.admin, self.guard, self.upstream_token = admin, guard, upstream_token
        self.body = body

    def most_body(self, head: RequestHead) -> int:
        """Return how many bytes a request's body may have."""
        is_own = self.admin is not None and head.path in PATHS
        return Admin.most_body(head.path) if is_own else self.body

    def precheck(self, head: RequestHead) -> Reply | None:
        """Return why a request is refused before its body is read; None if it is not."""
        if (b".." in head.target or b"%" in head.target) and leaves_root(head.path):
            return error_reply(400, "the path leads above the root")
        return self.guard.refusal(head, self.admin is not None and head.path in OPEN)

    def trusts(self, head: RequestHead) -> bool:
        """Return whether a request carries the token, if there is one."""
        return self.guard.trusts(head)

    def handle(self, client: Answers, request: Request) -> HttpCall | None:
        """Have a request answered."""
        head, body, trailers, size, _ = request
        if self.admin is not None and head.path in PATHS:
            self.memory.give(size)
            client.reply(self.admin.answer(head, body))
            return None
        route = self.routes.find(head.method, head.target)
        repeatable = route.is_repeatable and head.known.get(b"x-hedge", b"").lower() != b"off"
        if repeatable and route.is_v2:
            repeatable = not is_stateful(head, body)
        dispatcher, token = self.dispatcher, self.upstream_token
        told = forwarding(*client.peer, self.hops)
        call = HttpCall(client, head, body, trailers, route, repeatable, dispatcher, token, told)
        call.access = self.access
        try:
            if self.memory.is_full:
                raise Refused(FULL)
            if self.affinity is not None:
                call.prompt = self.affinity.prompt(head, body)
            dispatcher.submit(call)
        except Refused as refused:
            call.note("refused", refused.status)
            call.end()
            self.memory.give(size)
            client.refuse(refused.status, str(refused), refused.retry_after)
            return None
        call.size = size
        call.release()
        return None if call.is_over else call

    def replied(self, head: RequestHead | None, status: int, client: Answers) -> None:
        """Log an own answer, and count it if it is given without reading the request."""
        if not client.is_asked:
            self.routes.unread.count("refused", status)
        if self.access is not None and head is not None:
            self.access.replied(head, status, client.peer[0])


class AdminPort:
    """Answers the gateway's own routes on a port of their own."""

    def __init__(self, admin: Admin, guard: Guard) -> None:
        self.admin, self.guard = admin, guard

    def most_body(self, head: RequestHead) -> int:
        """Return how many bytes a request's body may have."""
        return Admin.most_body(head.path)

    def precheck(self, head: RequestHead) -> Reply | None:
        """Return why a request is refused before its body is read; None if it is not."""
        path = head.path
        if path not in PATHS:
            return error_reply(404, f"only {', '.join(sorted(PATHS))} are here")
        return self.guard.refusal(head, path in OPEN)

    def trusts(self, head: RequestHead) -> bool:
        """Return whether a request carries the token, if there is one."""
        return self.guard.trusts(head)

    def handle(self, client: Answers, request: Request) -> None:
        """Answer a request."""
        self.admin.memory.give(request.size)
        client.reply(self.admin.answer(request.head, request.body))

    def replied(self, head: RequestHead | None, status: int, client: Answers) -> None:
        """Take no note."""


def rules_of(options: GatewayOptions, places: int, fallbacks: int) -> Rules:
    """Return what the scheduler goes by."""
    usual = options.slots or SLOTS
    return Rules(
        workers=places + fallbacks,
        policy=options.chosen_policy,
        hang_timeout=math.inf,  # the dispatcher ends attempts
        max_pending=pending_limit(places * usual),
        slots=options.slots,
        fallbacks=fallbacks,
        fallback_slots=usual,
        first_delay=min(FIRST_DELAY, options.deadline / 2) if fallbacks else None,
        head_start=FIRST_COPIES,
        hold_out=options.hold_out / 100,
    )


def trusted(path: Path | None) -> ssl.SSLContext | None:
    """Return a context that trusts the certificates in a file; None without one.

    Raises:
        UserError: if there are none.
    """
    if path is None:
        return None
    try:
        text = path.read_text(encoding="ascii")
        return ssl.create_default_context(cadata=text or "none")
    except (OSError, ValueError) as problem:  # ssl.SSLError is an OSError
        reason = getattr(problem, "strerror", None) or "it has no certificate (PEM)"
        raise UserError(f"--upstream-ca: {path}: {reason}") from problem


@asynccontextmanager
async def running(
    options: GatewayOptions,
    resolver: Resolver | None = None,
    place: Place | None = None,
    sockets: Inherited = NO_SOCKETS,
) -> AsyncIterator[RunningGateway]:
    """Run a gateway while the body runs.

    Args:
        options: of the command.
        resolver: finds the addresses of upstreams' names; None: as this machine does.
        place: among processes that share the port; None: there is one.
        sockets: to listen on.

    Raises:
        UserError: if the options cannot work.
    """
    async with exporting() as tracer:
        gateway = RunningGateway(options, resolver or Resolver(), place, sockets, tracer)
        try:
            await gateway.start()
            yield gateway
        finally:
            await gateway.stop()


class RunningGateway:
    """A gateway with its sockets.

    Args:
        options: of the command.
        resolver: see `running`.
        place: see `running`.
        sockets: see `running`.
        tracer: makes spans of requests; None: they are not traced.

    Attributes:
        url: of the main port.
        admin_url: of the port with its own routes.

    Raises:
        UserError: if a file or an address cannot be used.
    """

    def __init__(
        self,
        options: GatewayOptions,
        resolver: Resolver,
        place: Place | None,
        sockets: Inherited,
        tracer: Tracer | None,
    ) -> None:
        options.check()
        self.place, self.sockets, self.tracer = place, sockets, tracer
        self.links: Links | None = None
        self.options, self.loop = options, asyncio.get_running_loop()
        self.guard = Guard((), Token(options.token_file))
        self.upstream_token = UpstreamToken(options.upstream_token_file)
        key = options.tls_cert if options.tls_key is None else options.tls_key
        self.certificate = tls.read_certificate(options.tls_cert, key)
        self.context, self.resolver = trusted(options.upstream_ca), resolver
        self.metrics, self.memory = GatewayMetrics(), Memory(options.memory)
        self.routes = Routes(options.rules, self.metrics, options.limits)
        self.access: AccessLog | None = None
        self.handler: Gateway | None = None
        self.url = self.admin_url = ""
        self._servers: list[HttpServer] = []
        self._background = Background()
        self._following: dict[Dispatcher, asyncio.Task[None]] = {}
        """What keeps the upstreams of each up to date."""
        self.dispatcher: Dispatcher | None = None
        self.admin: Admin | None = None
        self.grpc: GrpcServer | None = None
        self.grpc_port = 0
        self.backup: BackupServer | None = None

    async def start(self) -> None:
        """Find the upstreams, and listen."""
        options = self.options
        most = allow_files()
        main, own = self.sockets
        main = main or bind(options.host, options.port, shared=self.place is not None)
        try:
            if options.admin_port is not None and own is None:
                own = bind(options.host, options.admin_port, "--admin-port")
            discovery = self.discoveries(options)[0]
            self.dispatcher = await self._dispatch(discovery, self._open_cluster)
        except BaseException:
            for each in filter(None, (main, own)):
                each.close()
            raise
        admin = Admin(self.dispatcher, self.routes, self.memory, options.policies, self.guard)
        self.admin = admin
        if self.dispatcher.member is not None:
            self.links = admin.links = await join(
                options, self.place, self.dispatcher.member, self.resolver, self.certificate
            )
            self._background.spawn(self.links.token.follow())
        if options.grpc_port is not None:
            await self._start_grpc(admin, options.grpc_port)
        shared = None if own is not None else admin
        self.handler = Gateway(
            self.dispatcher,
            self.routes,
            self.memory,
            shared,
            self.guard,
            None,
            options.body,
            options.trusted_hops,
            None if options.affinity is None else Affinity(options.affinity),
        )
        self.allow()
        self.log_accesses()
        self._servers.append(HttpServer(self.handler, self.memory, most))
        self.url = self.admin_url = await self._servers[0].listen(main, self.certificate)
        if own is not None:
            self._servers.append(HttpServer(AdminPort(admin, self.guard), self.memory, 256))
            self.admin_url = await self._servers[1].listen(own, self.certificate)
        admin.servers = self._servers
        for token in (self.guard.token, self.upstream_token):
            self._background.spawn(token.follow())
        endpoints = [each for one in admin.dispatchers for each in one.cluster]
        up = sum(endpoint.is_up for endpoint in endpoints)
        log_event("ready" if up else "started", up=up, upstreams=len(endpoints))
        if len(endpoints) == 1 and not discovery.changes:
            log_event("nothing is hedged: there is one upstream", logging.WARNING)

    def allow(self) -> None:
        """Go by what the options say of hosts and tokens."""
        options, token = self.options, self.guard.token
        hosts, stays = (options.host, *options.allow_host), is_loopback(options.host)
        if not stays and not options.allow_host:
            hosts = (ANY,)  # balancers and other machines have names of their own for it
        self.guard.allow(hosts, stays or token.path is not None)
        own = self.upstream_token
        shown = own if own.path is not None or token.path is not None else None
        for face in self._faces():
            face.upstream_token = shown

    def log_accesses(self) -> None:
        """Have an access log if the options say so."""
        name = self.options.access_log
        self.access = None if name is None else AccessLog(name)
        if self.access is not None:
            self._background.spawn(self.access.follow())
        for face in self._faces():
            face.access = self.access

    def _faces(self) -> list[Gateway | GrpcServer]:
        """Return what clients see, over HTTP and over gRPC."""
        return [face for face in (self.handler, self.grpc) if face is not None]

    def discoveries(self, options: GatewayOptions) -> list[Discovery]:
        """Return what finds the upstreams over HTTP, and those over gRPC if there is a port."""
        found = [Discovery(options.http_upstreams, options.upstreams_file, self.resolver)]
        if options.grpc_port is not None:
            found.append(Discovery(options.grpc_upstreams, None, self.resolver, "grpc"))
        return found

    def follow(self, dispatcher: Dispatcher, discovery: Discovery) -> None:
        """Keep a dispatcher's upstreams up to date with what is found from now on."""
        if dispatcher in self._following:
            self._following.pop(dispatcher).cancel()
        if discovery.changes:
            work = follow(discovery, dispatcher.cluster)
            self._following[dispatcher] = self._background.spawn(work)

    async def _dispatch(
        self, discovery: Discovery, open_cluster: Callable[[int], Cluster]
    ) -> Dispatcher:
        """Return what has requests answered by the upstreams that are found."""
        urls, lacking = await discovery.urls()
        if lacking:
            log_event("upstreams are looked for", logging.WARNING, reason=lacking)
        places = max(PLACES, len(urls))
        cluster = open_cluster(places)
        cluster.fill(urls)
        options, fallbacks = self.options, len(cluster.endpoints) - places
        rules = rules_of(options, places, fallbacks)
        member = member_for if options.members or self.place else None
        dispatcher = Dispatcher(rules, cluster, self.metrics, options.cancels, member, self.tracer)
        await dispatcher.start()
        self.follow(dispatcher, discovery)
        return dispatcher

    def _open_cluster(self, places: int) -> Cluster:
        """Return the cluster of upstreams over HTTP."""
        options, fallback = self.options, self.options.fallback
        if options.protection is not None:
            self.backup = BackupServer(options.protection, options.deadline_ms)
            fallback = self.backup.url

        def open_client(url: str) -> HttpClient:
            return HttpClient(parse_origin(url), self.context, self.resolver)

        return Cluster(open_client, places, self.metrics, options.health, fallback)

    async def _start_grpc(self, admin: Admin, port: int) -> None:
        """Listen for clients over gRPC."""
        from codedinvnet.gateway import grpc

        options, resolver = self.options, self.resolver
        roots = None if options.upstream_ca is None else options.upstream_ca.read_bytes()

        def open_client(url: str) -> Any:
            return grpc.GrpcClient(url, resolver, roots)

        def open_cluster(places: int) -> Cluster:
            return grpc.GrpcCluster(open_client, places, self.metrics)

        dispatcher = await self._dispatch(self.discoveries(options)[1], open_cluster)
        admin.dispatchers.append(dispatcher)
        self.grpc = grpc.GrpcServer(dispatcher, self.routes, self.memory, self.guard)
        self.allow()
        self.grpc_port = await self.grpc.start(options.host, port, options.body, self.certificate)
        log_event("gRPC", host=options.host, port=self.grpc_port)

    async def stop(self) -> None:
        """Give notice, take no more connections, finish what is under way, and close."""
        main, own = self._servers[:1], self._servers[1:]
        if self.admin is not None and main:
            self.admin.is_draining = True
            notify("STOPPING=1")
            pending = 0 if self.dispatcher is None else len(self.dispatcher.calls)
            log_event("draining", pending=pending)
            main[0].announce_draining()
            if self.grpc is not None:
                self.grpc.is_draining = True
            await asyncio.sleep(self.options.drain_notice_ms / 1000)
        seconds = self.options.drain_ms / 1000
        stops = [server.stop(seconds) for server in main]
        if self.sockets.admin is not None:  # whoever comes next answers there
            for server in own:
                server.close()
        if self.grpc is not None:
            stops.append(self.grpc.stop(seconds))
        await asyncio.gather(*stops)
        if self.links is not None:
            await self.links.stop()
        await asyncio.gather(*(server.stop(0.0) for server in own))
        if self.grpc is not None:
            await self.grpc.dispatcher.stop()
        if self.dispatcher is not None:
            await self.dispatcher.stop()
        if self.backup is not None:
            await self.backup.stop()
        await self._background.stop()
        if self.access is not None:
            self.access.flush()
        if self.url:
            log_event("stopped")
