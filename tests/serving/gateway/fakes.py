"""Upstreams of this process, which fail on request."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar, TypeAlias

import grpc
from aiohttp import web
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.serving.faces.grpc_stubs import SERVICE, UNLIMITED
from codedinvnet.serving.gateway.options import GatewayOptions
from codedinvnet.serving.gateway.relay import Relay
from codedinvnet.serving.gateway.run import running

ANSWER = b'{"model_name":"m","outputs":[{"name":"y","datatype":"INT8","shape":[1],"data":[7]}]}'
TENSORS = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
}
Method: TypeAlias = Callable[[bytes, Any], Awaitable[bytes]]


class Fake:
    """A server over HTTP that answers always the same, and holds its answers while told to."""

    def __init__(self) -> None:
        self.status, self.body = 200, ANSWER
        self.headers: dict[str, str] = {"Content-Type": "application/json"}
        self.metadata: Any = {"name": "m", "versions": ["1"], "platform": "fake", **TENSORS}
        self.metadata_status = 200
        self.delay = 0.0
        self.held = asyncio.Event()
        self.go()
        self.ready = True
        self.hangs_up = False
        self.token = ""
        """What must come with all that it is asked, if anything must."""
        self.guards_all = True
        """Otherwise it must come with inference requests alone."""
        self.refused = 0
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        """Path, headers and body of every inference request."""
        self.probes = 0
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def hold(self) -> None:
        """Give no answers until `go`."""
        self.held.clear()

    def go(self) -> None:
        self.held.set()

    async def _infer(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen.append((request.path, headers, await request.read()))
        await asyncio.sleep(self.delay)
        await self.held.wait()
        if self.hangs_up and request.transport is not None:
            request.transport.close()
        return web.Response(status=self.status, body=self.body, headers=self.headers)

    async def _ready(self, _: web.Request) -> web.Response:
        self.probes += 1
        return web.Response(status=200 if self.ready else 503)

    async def _metadata(self, _: web.Request) -> web.Response:
        text = self.metadata if isinstance(self.metadata, str) else json.dumps(self.metadata)
        return web.Response(
            text=text, status=404 if self.metadata is None else self.metadata_status
        )

    @web.middleware
    async def _authorized(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = request.headers.getall("Authorization", [])
        guarded = self.token and (self.guards_all or request.path.endswith("/infer"))
        if guarded and given != [f"Bearer {self.token}"]:
            self.refused += 1
            told = {"WWW-Authenticate": "Bearer"}
            return web.Response(status=401, text="who are you?", headers=told)
        return await handler(request)

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._authorized])
        for path in ("/v2/models/m", "/v2/models/m/versions/{v}"):
            app.router.add_post(f"{path}/infer", self._infer)
            app.router.add_get(path, self._metadata)
        app.router.add_get("/v2/models/m/ready", self._ready)
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0.01, auto_decompress=False
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    async def stop(self) -> None:
        """Refuse connections from now on, and end those that are there."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None


class GrpcFake:
    """A server over gRPC that answers always the same."""

    tensors: ClassVar[dict[str, Any]] = TENSORS

    def __init__(self) -> None:
        self.answer = pb.ModelInferResponse(model_name="m", raw_output_contents=[b"\x07"])
        self.answer.outputs.add(name="y", datatype="INT8", shape=[1])
        self.code, self.details = grpc.StatusCode.OK, ""
        self.metadata_code = grpc.StatusCode.OK
        self.delay = 0.0
        self.cancelled = 0
        self.token, self.guards_all, self.refused = "", True, 0
        """See `Fake`."""
        self.probes = 0
        self.held = asyncio.Event()
        self.held.set()
        self.ready = pb.ModelReadyResponse(ready=True).SerializeToString()
        """What it says to a probe, once it is not held."""
        self.seen: list[tuple[bytes, dict[str, str], float]] = []
        """The message, the metadata and the time left of every inference request."""
        self.port = 0

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    async def _infer(self, message: bytes, context: Any) -> bytes:
        metadata = dict(context.invocation_metadata())
        self.seen.append((message, metadata, context.time_remaining()))
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.code is not grpc.StatusCode.OK:
            await context.abort(self.code, self.details)
        found: bytes = self.answer.SerializeToString()
        return found

    async def _ready(self, _: bytes, __: Any) -> bytes:
        self.probes += 1
        await self.held.wait()
        found: bytes = self.ready
        return found

    async def _metadata(self, _: bytes, context: Any) -> bytes:
        if self.metadata_code is not grpc.StatusCode.OK:
            await context.abort(self.metadata_code, "")
        found: bytes = pb.ModelMetadataResponse(name="m", **self.tensors).SerializeToString()
        return found

    def _authorized(self, method: Method) -> Method:
        async def answer(message: bytes, context: Any) -> bytes:
            pairs = context.invocation_metadata()
            given = [value for name, value in pairs if name == "authorization"]
            guarded = self.guards_all or method == self._infer
            if self.token and guarded and given != [f"Bearer {self.token}"]:
                self.refused += 1
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
            return await method(message, context)

        return answer

    async def start(self) -> None:
        self.server = grpc.aio.server(options=UNLIMITED)
        methods = {"Infer": self._infer, "Ready": self._ready, "Metadata": self._metadata}
        handlers = {
            f"Model{name}": grpc.unary_unary_rpc_method_handler(self._authorized(method))
            for name, method in methods.items()
        }
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()

    async def stop(self) -> None:
        await self.server.stop(0)


@asynccontextmanager
async def gateway(
    *fakes: Fake | GrpcFake, **options: Any
) -> AsyncIterator[tuple[str, Relay, int | None]]:
    """Start the fakes that have not started, and a gateway before them."""
    async with contextlib.AsyncExitStack() as stack:
        for fake in fakes:
            if not fake.port:
                await fake.start()
            stack.push_async_callback(fake.stop)
        settings = {"port": 0, "upstream": tuple(fake.url for fake in fakes), **options}
        yield await stack.enter_async_context(running(GatewayOptions("m", **settings)))
