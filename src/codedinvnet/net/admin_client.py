"""Asks a running service over HTTP, for the commands that do."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from codedinvnet.common.errors import UserError, one_line

PATIENCE = 60.0
"""Seconds that an answer may take."""


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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: the token would go along, to whatever host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> NoReturn:
        told = f"it redirects to {newurl}: give an address that leads there itself"
        raise urllib.error.HTTPError(req.full_url, code, told, headers, fp)


def open_directly(request: urllib.request.Request, seconds: float) -> Any:
    """Return the answer to a request, by no proxy and no redirect: its token is only for it.

    `http_proxy` would lead there even if the service is on this machine.

    Args:
        request: to a service.
        seconds: without a byte, after which it is given up.

    Raises:
        urllib.error.HTTPError: if the service refuses, or redirects.
        OSError: if it does not answer.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    return opener.open(request, timeout=seconds)


def ask(
    url: str, path: str, token: str = "", body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the JSON object that a service answers.

    Args:
        url: of the service, as it prints it.
        path: what is asked for.
        token: of the service; "": none.
        body: what is posted; None: nothing is.

    Raises:
        UserError: if there is no such service, it refuses, or its answer is another program's.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url!r} is not a service's address, such as http://127.0.0.1:8000")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    data = None
    if body is not None:
        headers["Content-Type"], data = "application/json", json.dumps(body).encode()
    try:
        request = urllib.request.Request(url.rstrip("/") + path, data, headers)
        with open_directly(request, PATIENCE) as reply:
            found = json.load(reply)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: {_refusal(error)}") from error
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url}: no service answers: {reason}") from error
    except (ValueError, http.client.HTTPException) as error:  # no address, no HTTP, or no JSON
        told = one_line(error)
        raise UserError(f"{url}: this is not a service of codedinvnet ({told})") from error
    if not isinstance(found, dict):
        raise UserError(f"{url}: this is not a service of codedinvnet")
    return found


def _refusal(error: urllib.error.HTTPError) -> str:
    """Return in words why a service refused."""
    if error.code == 401:
        return "the service needs its token, or another one: --token-file FILE"
    if 300 <= error.code < 400:
        return f"{error.reason} (status {error.code})"
    try:
        told = str(json.loads(error.read())["error"])
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        told = f"this is not a service of codedinvnet (status {error.code})"
    if error.code == 404:
        told = "this is not a service of codedinvnet, or one of another release"
    return told
