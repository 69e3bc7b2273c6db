"""The policy of a service over HTTP: what it is, what it can be, and changing it."""

from __future__ import annotations

import json

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.bodies import read_body
from codedinvnet.serving.frontend import FrontEnd

LONGEST_BODY = 4096
"""Bytes of a request for another policy, at most."""


def policy_routes(front: FrontEnd, *, guarded: bool) -> list[Route]:
    """Return the routes `GET /policy` and `POST /policy`.

    Args:
        front: the front end.
        guarded: whether a token is needed, or nobody else reaches the port; without either, the
            policy cannot be changed.
    """

    async def show(_: Request) -> Response:
        return JSONResponse(front.choices.told(front.scheduler.chosen))

    async def change(request: Request) -> Response:
        if not guarded:
            raise HTTPException(
                403, "whoever reaches the port could do this: it needs --token-file"
            )
        # Pages of other sites can send other kinds of content alone.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "the content type must be application/json")
        body = await read_body(request, LONGEST_BODY, front.deadline, lambda _: None)
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from error
        name = asked.get("policy") if isinstance(asked, dict) else None
        if not isinstance(name, str):
            raise BadRequest('the body must be an object, {"policy": NAME}')
        front.change_policy(front.choices.named(name))
        return JSONResponse(front.choices.told(front.scheduler.chosen))

    return [Route("/policy", show), Route("/policy", change, methods=["POST"])]
