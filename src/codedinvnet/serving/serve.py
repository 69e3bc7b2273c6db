"""`codedinvnet serve`: put bundle, workers, front end and HTTP together, and run them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn
import uvloop
from starlette.applications import Starlette

from codedinvnet.bundle import Bundle, bundle_folder, load_bundle, weights_digest
from codedinvnet.codes.build import part_beside, scheme_for
from codedinvnet.codes.method import Tolerance
from codedinvnet.codes.registry import METHODS, OURS, find_method
from codedinvnet.codes.rules import is_systematic
from codedinvnet.data import SAMPLES, sample_images
from codedinvnet.errors import UserError
from codedinvnet.files import file_digest
from codedinvnet.models.runtime import ENGINES, PYTORCH, check_engine, check_installed
from codedinvnet.serving.app import LARGE_BODY, LOOPBACK, AppOptions, build_app
from codedinvnet.serving.connections import BoundedHttp, connection_limit
from codedinvnet.serving.faults import (
    FaultyPool,
    Schedule,
    check_per_request,
    load_schedule,
)
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.metrics import JsonLines, log_event, logger
from codedinvnet.serving.pool import WorkerPool, WorkerSpec, freeze_loaded
from codedinvnet.serving.process_pool import ProcessPool
from codedinvnet.serving.protocol import ModelDescription
from codedinvnet.serving.rules import (
    MAX_BATCH,
    POLICIES,
    ROUTINGS,
    Rules,
    hang_limit,
    pending_limit,
)

DRAIN_TIMEOUT = 10
"""Seconds that a stopping server waits for open requests beyond their deadline."""
VALUE_LENGTH = 4
"""Bytes of a value of an image, at most, in a binary tensor."""
KEEP_ALIVE = 75
"""Seconds that an idle connection stays open."""
DEMO_IMAGES = 100


@dataclass(frozen=True)
class ServeOptions:
    """What `codedinvnet serve` was asked for; the command line explains the fields.

    Times are in milliseconds here, as on the command line.
    """

    bundle: str
    k: int = 10
    workers: int | None = None
    method: str = OURS
    part: Path | None = None
    stragglers: int = 1
    errors: int = 1
    policy: str = "coded"
    routing: str = "least-loaded"
    pool: str = "local"
    ray_address: str | None = None
    device: str = "cpu"
    threads_per_worker: int = 1
    engine: str = PYTORCH
    host: str = "127.0.0.1"
    port: int = 8000
    allowed_host: tuple[str, ...] = ()
    deadline_ms: float = 5000.0
    group_timeout_ms: float = 20.0
    hang_timeout_ms: float | None = None
    """None: what suits the deadline (`hang_limit`)."""
    down_timeout_ms: float = 30_000.0
    min_confidence: float = 0.0
    max_pending: int | None = None
    """None: what suits the workers (`pending_limit`)."""
    max_batch: int = MAX_BATCH
    max_body_memory: float = 512.0
    """MiB."""
    token_file: Path | None = None
    faults: Path | None = None
    demo: bool = False


def check(options: ServeOptions) -> None:
    """Refuse what cannot work, before anything is loaded.

    Raises:
        UserError: naming the option.
    """
    offered = tuple(name for name, method in METHODS.items() if not method.is_policy)
    try:
        method = find_method(options.method)
        if method.is_policy:
            raise UserError(f"{options.method!r} is not one of {', '.join(offered)}")
    except UserError as error:
        raise UserError(f"--method: {error}") from error
    choices = (
        ("--policy", options.policy, POLICIES),
        ("--routing", options.routing, ROUTINGS),
        ("--pool", options.pool, ("local", "ray")),
        ("--engine", options.engine, ENGINES),
    )
    for flag, value, known in choices:
        if value not in known:
            hint = f" (it is a --method: --method {value})" if value in METHODS else ""
            raise UserError(f"{flag}: {value!r} is not one of {', '.join(known)}{hint}")
    times = ("deadline_ms", "group_timeout_ms", "hang_timeout_ms", "down_timeout_ms")
    for name in (*times, "threads_per_worker", "max_pending", "max_batch", "max_body_memory"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:  # NaN neither
            raise UserError(f"--{name.replace('_', '-')}: must be above 0, got {value}")
    if options.group_timeout_ms >= options.deadline_ms:
        raise UserError(
            f"--group-timeout-ms: must be below --deadline-ms {options.deadline_ms:g}, got "
            f"{options.group_timeout_ms:g}: a group that does not fill would be coded too late"
        )
    if not 0 <= options.min_confidence <= 1:
        raise UserError(f"--min-confidence: must lie in 0..1, got {options.min_confidence}")
    try:
        torch.device(options.device)
    except RuntimeError as error:
        raise UserError(f"--device: {str(error).splitlines()[0]}") from error
    check_engine(options.engine, options.device)
    if options.pool == "local":  # of Ray's nodes each tells for itself
        check_installed(options.engine)
    for name in Tolerance._fields:
        value = getattr(options, name)
        if value < 1:
            raise UserError(f"--{name}: must be at least 1, got {value}")
        if value > 1 and name not in method.chooses:
            chosen = (known for known in offered if name in METHODS[known].chooses)
            raise UserError(
                f"--{name}: {options.method} makes up for what it can; it is of {', '.join(chosen)}"
            )
    if options.ray_address is not None and options.pool != "ray":
        raise UserError("--ray-address: goes with --pool ray")
    if options.min_confidence > 0 and not (
        POLICIES[options.policy].hedged and POLICIES[options.policy].coded
    ):
        raise UserError("--min-confidence: goes with a policy that can send a copy, coded+hedge")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers: must be at least 1, got {options.workers}")
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port: must lie in 0..65535, got {options.port}")


def hang_timeout(options: ServeOptions) -> float:
    """Return the seconds that a worker may be at one task; tell if that is too long.

    A query on a hung worker is sent again only when that worker is given up, and is over at its
    deadline.
    """
    given = options.hang_timeout_ms
    if given is None:
        return hang_limit(options.deadline_ms) / 1000
    if given >= options.deadline_ms:
        why = f"--hang-timeout-ms {given:g} is not below --deadline-ms {options.deadline_ms:g}"
        log_event("queries on hung workers are not sent again", logging.WARNING, reason=why)
    return given / 1000


def is_open(options: ServeOptions) -> bool:
    """Tell whether others than this machine's reach the port, and need no token."""
    return options.token_file is None and options.host not in LOOPBACK


def read_token(path: Path | None) -> str:
    """Return the token in a file; "" without one.

    Raises:
        UserError: if the file cannot be read or holds none.
    """
    if path is None:
        return ""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--token-file: cannot read {path}: {reason}") from error
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(f"--token-file: {path} holds no token (ASCII, one line)")
    return token


def make_pool(options: ServeOptions) -> WorkerPool:
    """Return the pool that was asked for, not yet started."""
    part, method = options.part, find_method(options.method)
    if part is None:
        part = part_beside(bundle_folder(options.bundle), method, options.k)
    spec = WorkerSpec(
        options.bundle,
        options.k,
        options.device,
        options.threads_per_worker,
        options.method,
        part,
        options.stragglers,
        options.errors,
        weights_digest(options.bundle),
        "" if part is None else file_digest(part),
        options.engine,
    )
    pool: WorkerPool
    if options.pool == "ray":
        from codedinvnet.serving.ray_pool import RayPool

        pool = RayPool(spec, options.ray_address)
    else:
        pool = ProcessPool(spec)
    if options.faults is not None or options.demo:
        return FaultyPool(pool, load_schedule(options.faults) if options.faults else Schedule())
    return pool


def make_front_end(options: ServeOptions, bundle: Bundle) -> FrontEnd:
    """Return the front end, not yet started.

    Raises:
        UserError: if the options do not fit the bundle or each other.
    """
    policy = POLICIES[options.policy]
    tolerance = Tolerance(options.stragglers, options.errors)
    scheme = scheme_for(bundle, options.k, options.method, options.part, tolerance)
    systematic = is_systematic(scheme.rules)
    if not systematic and policy.name != "coded":
        raise UserError(
            f"--policy: {scheme.name} has no direct answers, so that it goes with the policy coded "
            f"only, not with {policy.name}"
        )
    if policy.guessing and not scheme.rules.guesses:
        raise UserError(
            f"--policy: {policy.name} needs a code that can guess, by side features; "
            f"{scheme.name} of {options.bundle} has none, or does so under coded, too"
        )
    workers = options.workers or len(scheme.rules.tasks(options.k))
    most = options.max_pending or pending_limit(workers)
    if options.max_batch > most:
        raise UserError(
            f"--max-batch: a request of {options.max_batch} images could never be taken with "
            f"--max-pending {most}"
        )
    rules = Rules(
        workers=workers,
        policy=policy,
        group_timeout=options.group_timeout_ms / 1000,
        hang_timeout=hang_timeout(options),
        hedge_share=1 / options.k,
        max_pending=most,
        routing=options.routing,
    )
    pool = make_pool(options)
    if isinstance(pool, FaultyPool) and not systematic:
        check_per_request(pool.faults, scheme.name)
    try:
        return FrontEnd(
            scheme,
            pool,
            rules,
            bundle.info.input.shape,
            deadline=options.deadline_ms / 1000,
            min_confidence=options.min_confidence,
            down_timeout=options.down_timeout_ms / 1000,
        )
    except ValueError as error:
        raise UserError(f"--workers: {error}") from error


def app_options(options: ServeOptions, bundle: Bundle, token: str) -> AppOptions:
    """Return what the HTTP face goes by."""
    images = None
    if options.demo:
        name = bundle.info.provenance.settings.data.name
        if name in SAMPLES:
            images = sample_images(name).batch(torch.arange(DEMO_IMAGES))[0].numpy()
        else:
            channels, height, width = bundle.info.input.shape
            images = torch.zeros(1, channels, height, width, dtype=torch.uint8).numpy()
    info = bundle.info
    model = ModelDescription(info.name, info.input.shape, info.classes, options.max_batch)
    binary = options.max_batch * math.prod(info.input.shape) * VALUE_LENGTH
    memory = int(options.max_body_memory * 2**20)
    return AppOptions(
        model=model,
        max_body=min(max(binary, model.json_bytes) + LARGE_BODY, memory),
        body_memory=memory,
        token=token,
        demo=images,
        policy=options.policy,
        hosts=(options.host, *options.allowed_host),
    )


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        UserError: if the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, the event loop knows that it is TCP and switches Nagle's algorithm
    # off: otherwise a response's body waits for the client's delayed acknowledgement, 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Its connections inherit it: clients that are gone without a word are found out.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # now, since two that only bind do not notice each other
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


def log_to_stderr() -> None:
    """Write the service's events as JSON lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    # uvicorn's warnings are of what clients send, a line for each request.
    levels = {logger.name: logging.INFO, "uvicorn": logging.ERROR, "asyncio": logging.WARNING}
    for name, level in levels.items():
        chosen = logging.getLogger(name)
        chosen.handlers = [handler]
        chosen.setLevel(level)
        chosen.propagate = False


def server_config(app: Starlette, options: ServeOptions, workers: int) -> uvicorn.Config:
    """Return how the application is served."""
    return uvicorn.Config(
        app,
        http=type("Http", (BoundedHttp,), {"most": connection_limit(workers)}),
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # nobody here asks where a request comes from
        timeout_graceful_shutdown=math.ceil(options.deadline_ms / 1000) + DRAIN_TIMEOUT,
        timeout_keep_alive=KEEP_ALIVE,
    )


class Server(uvicorn.Server):
    """A server that tells when it is up, and leaves signals to its caller."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def running(options: ServeOptions) -> AsyncIterator[tuple[str, FrontEnd]]:
    """Serve while the body runs, then drain and stop; yields the address and the front end.

    Raises:
        UserError: if the options cannot work.
    """
    check(options)
    token = read_token(options.token_file)
    torch.set_num_threads(1)  # heads are small, and the workers need the cores
    bundle = load_bundle(options.bundle)
    front = make_front_end(options, bundle)
    listener = bind(options.host, options.port)
    try:
        app = build_app(front, app_options(options, bundle, token), starts=False)
        server = Server(server_config(app, options, front.rules.workers))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        up = asyncio.create_task(server.up.wait())
        try:
            await asyncio.wait({task, up}, return_when=asyncio.FIRST_COMPLETED)
            if not up.done():
                raise UserError(f"the server on {options.host}:{options.port} ended while starting")
            await front.start()  # now that it answers that it is alive, and not ready
            host, port = listener.getsockname()[:2]
            yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", front
        finally:
            up.cancel()
            server.should_exit = True
            await task
    finally:
        await front.stop()
        listener.close()


async def _serve(options: ServeOptions) -> None:
    if is_open(options):
        open_to = "whoever reaches the port may send queries, and sees the last ones' images"
        if options.demo:
            open_to += " and stops workers"
        log_event("no token", logging.WARNING, host=options.host, reason=open_to)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    starting = asyncio.current_task()

    def told() -> None:
        if starting is not None:
            starting.cancel()
        else:
            stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    async with running(options) as (address, front):
        starting = None
        freeze_loaded()
        rules = front.rules
        print(
            f"serving {options.bundle} on {address}: {rules.workers} workers, policy "
            f"{rules.policy.name}, k = {options.k} (Ctrl-C or SIGTERM drains and stops)",
            flush=True,
        )
        await stop.wait()
        front.announce_draining()  # connections are waited for first, and may take their time
        # A second Ctrl-C ends at once. A second SIGTERM does not: timeout(1) sends one to the
        # process and one to its group.
        loop.remove_signal_handler(signal.SIGINT)


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain and stop."""
    log_to_stderr()
    with contextlib.suppress(asyncio.CancelledError):  # told to stop before it was up
        uvloop.run(_serve(options))
