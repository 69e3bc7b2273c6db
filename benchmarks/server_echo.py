"""A bare Starlette server that `scheduling` compares the service with; its argument is a port."""

from __future__ import annotations

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


async def answer(request: Request) -> Response:
    """Answer with the body of the request."""
    return Response(await request.body())


if __name__ == "__main__":
    app = Starlette(routes=[Route("/predict", answer, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
