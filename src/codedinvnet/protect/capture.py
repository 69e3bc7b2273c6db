"""The last inputs of a running service, fetched with its token."""

from __future__ import annotations

import http.client
import io
import urllib.error
import urllib.request
import zipfile

import numpy as np

from codedinvnet.asking import open_directly
from codedinvnet.errors import UserError, one_line
from codedinvnet.files import parse_json

SECONDS = 60.0
"""Without a byte for so long, the service is given up."""


def fetch(url: str, token: str) -> dict[str, np.ndarray]:
    """Return what a service has kept, name -> (N, *shape).

    Args:
        url: the service's address, such as http://127.0.0.1:8000.
        token: the token that the service asks clients for.

    Raises:
        UserError: if it cannot be reached, refuses, or sends something else.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--capture: {url!r} is no address, such as http://127.0.0.1:8000")
    request = urllib.request.Request(
        url.rstrip("/") + "/capture", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        with open_directly(request, SECONDS) as response:
            content, kind = response.read(), response.headers.get_content_type()
    except urllib.error.HTTPError as error:
        with error:
            told = _told(error)
        raise UserError(f"--capture: {url} answered {error.code}: {told}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"--capture: {url} cannot be read: {one_line(error)}") from error
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise UserError(
            f"--capture: {url} sent {kind} of {len(content)} bytes, and no arrays (.npz)"
        )
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
        return {name: found[name] for name in found.files}
    except Exception as error:  # NumPy has many for what is damaged
        raise UserError(f"--capture: {url} sent damaged arrays: {one_line(error)}") from error


def _told(error: urllib.error.HTTPError) -> str:
    try:
        return str(parse_json(error.read(), "the answer")["error"])
    except (UserError, KeyError, TypeError, OSError, http.client.HTTPException):
        return str(error.reason)
