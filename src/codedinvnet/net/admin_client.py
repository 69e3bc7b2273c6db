"""Asks a running service over HTTP, for the commands that do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codedinvnet.common.errors import UserError
from codedinvnet.net.client import Answer, Broken, HttpClient, described, parse_origin

PATIENCE = 60.0
"""Seconds that an answer may take."""
STRANGER = "this is not a service of codedinvnet"


def read_token(path: Path | None, flag: str = "--token-file") -> str:
    """Return the token in a file; "" without one.

    Args:
        path: the file.
        flag: which option has it, for messages.

    Raises:
        UserError: if the file cannot be read or holds none.
    """
    if path is None:
        return ""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{flag}: cannot read {path}: {reason}") from error
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(f"{flag}: {path} holds no token (ASCII, one line)")
    return token


def ask(
    url: str, path: str, token: str = "", body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the JSON object that a service answers; the token goes nowhere else.

    Args:
        url: of the service, as it prints it.
        path: what is asked for.
        token: of the service; "": none.
        body: what is posted; None: nothing is.

    Raises:
        UserError: if there is no such service, it refuses, or its answer is another program's.
    """
    origin = parse_origin(url, "URL")
    headers = [("Authorization", f"Bearer {token}")] if token else []
    data, method = None, "GET"
    if body is not None:
        headers.append(("Content-Type", "application/json"))
        data, method = json.dumps(body).encode(), "POST"

    async def answered() -> Answer:
        client = HttpClient(origin, connect=PATIENCE)
        try:
            return await client.ask(method, path, PATIENCE, data, headers)
        finally:
            client.close()

    try:
        answer = asyncio.run(answered())
    except Broken as error:
        raise UserError(f"{url}: {STRANGER} ({described(error)})") from error
    except OSError as error:
        raise UserError(f"{url}: no service answers: {described(error)}") from error
    if answer.status != 200:
        raise UserError(f"{url}: {_refusal(answer)}")
    try:
        found = json.loads(answer.body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{url}: {STRANGER}")
    return found


def _refusal(answer: Answer) -> str:
    """Return in words why a service refused."""
    if answer.status == 401:
        return "the service needs its token, or another one: --token-file FILE"
    if 300 <= answer.status < 400:
        to = answer.field("Location")
        return f"it redirects to {to}: give an address that leads there itself"
    if answer.status == 404:
        return f"{STRANGER}, or one of another release"
    try:
        return str(json.loads(answer.body)["error"])
    except (ValueError, KeyError, TypeError):
        return f"{STRANGER} (status {answer.status})"
