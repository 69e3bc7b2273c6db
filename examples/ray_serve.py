"""The service as a Ray Serve ingress; its workers are the actors of the Ray pool.

pip install -e bundles -e '.[models,ray]' 'ray[serve]'  # in the repository's root
serve run examples.ray_serve:app source=mnist k=10 deadline_ms=2000

One replica: a coding group needs its queries in one place. Changes of the policy, and `demo=true`,
need a `token_file`: whoever reaches Ray Serve's port may ask.
"""

import asyncio
import time
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from codedinvnet import UserError
from codedinvnet.cli.options import from_text
from codedinvnet.net import requests as net
from codedinvnet.net.admin_client import read_token
from codedinvnet.net.answers import error_reply
from codedinvnet.net.collector import freeze_loaded
from codedinvnet.net.http1 import RequestHead
from codedinvnet.net.listening import log_to_stderr
from codedinvnet.net.tracing import NOISY
from codedinvnet.serving.app import open_app, warn_open
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.opened import check


def app(arguments: dict[str, Any]) -> serve.Application:
    """Build the application from `serve run`'s arguments: the source, and options of `serve`."""
    given = {"source": "mnist", "pool": "ray", "host": "0.0.0.0", **arguments}
    options = from_text(ServeOptions, {name: str(value) for name, value in given.items()})
    check(options)
    if unused := {"host", "port"} & arguments.keys():
        raise UserError(f"{unused.pop()}: Ray Serve listens; say it there (http_options)")
    if "grpc_port" in arguments:
        raise UserError("grpc_port: this example passes no gRPC on to Ray Serve")
    if options.demo and options.token_file is None:
        raise UserError("demo: needs token_file, or whoever reaches the port could stop workers")
    read_token(options.token_file)  # or it is refused now

    # The front end computes little; a whole CPU would be taken from the workers.
    deployment = serve.deployment(
        num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1}
    )
    return deployment(Ingress).bind(options)


class Ingress:
    """Answers the requests that Ray Serve passes on, in the replica's process.

    Args:
        options: of `serve`.
    """

    async def __init__(self, options: ServeOptions) -> None:  # type: ignore[misc]
        log_to_stderr(*NOISY)
        warn_open(options)
        made = open_app(options)
        self.dispatcher, self.api = made.dispatcher, made.http()
        await self.dispatcher.start()
        freeze_loaded()

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        path = request.url.path.encode() or b"/"
        head = RequestHead(request.method.encode(), path, list(request.headers.raw), b"1")
        body, came = await request.body(), time.monotonic()
        reply = self.api.precheck(head)
        if reply is None and len(body) > self.api.most_body(head):
            reply = error_reply(413, f"body: more than {self.api.most_body(head)} bytes")
        if reply is None:
            self.api.memory.take(len(body))
            given = net.Request(head, [body], [], len(body), came)
            reply = await self.api.respond(given, asyncio.get_running_loop().create_future())
        self.api.replied(head, reply.status)
        fields = {name.decode(): value.decode().strip() for name, value in reply.fields}
        return Response(reply.body, reply.status, fields, reply.kind)
