"""A model that a server has, called over HTTP in the Open Inference Protocol V2."""

from __future__ import annotations

import hashlib
import http.client
import json
import ssl
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from codedinvnet.common.errors import UserError, is_host, one_line
from codedinvnet.models.base import DATATYPES, TensorSpec, Unreachable
from codedinvnet.models.probe import Opened
from codedinvnet.models.specs import Declared, input_specs
from codedinvnet.net.admin_client import read_token
from codedinvnet.net.protocol.http import parse_response, render_request
from codedinvnet.net.protocol.messages import HEADER_LENGTH, InferRequest, ProtocolError

PATH = "/v2/models/"
"""What a model's URL has behind the server's address."""
TOKEN_FLAG = "--model-token-file"
"""The option with the file of a server's token."""
TIMEOUT = 60.0
"""Seconds for one answer."""


class Refused(UserError):
    """A server answers with an error.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, url: str, status: int, body: bytes) -> None:
        said = body[:200].decode(errors="replace").strip()
        hint = f" ({TOKEN_FLAG} has the token for it)" if status in (401, 403) else ""
        super().__init__(f"{url} answers with HTTP status {status}: {said}{hint}")
        self.status = status


class RemoteModel:
    """One kept connection to a model.

    Args:
        url: the model's, with PATH in it.
        token_file: the file of the server's token, which may be renewed; None: it wants none.

    Raises:
        UserError: if that is no URL.
    """

    def __init__(self, url: str, token_file: str | None = None) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        try:
            host, port = parts.hostname, parts.port or (443 if secure else 80)
        except ValueError as error:
            raise UserError(f"{url!r} is no URL: {error}") from error
        if not host or not parts.path.rpartition(PATH)[2] or parts.query:
            raise UserError(f"{url!r} is not http://HOST:PORT{PATH}NAME")
        if not is_host(host):
            raise UserError(f"{url!r} is no URL: {host!r} is no host's name")
        self.url, self.path = url, parts.path.rstrip("/")
        self.token_file = None if token_file is None else Path(token_file)
        self._token = ""
        self._binary: bool | None = None  # whether the server takes binary tensors, once known
        self._connection = (
            http.client.HTTPSConnection(
                host, port, timeout=TIMEOUT, context=ssl.create_default_context()
            )
            if secure
            else http.client.HTTPConnection(host, port, timeout=TIMEOUT)
        )
        weakref.finalize(self, self._connection.close)

    def ask(
        self, method: str, path: str = "", body: bytes | None = None, **headers: str
    ) -> tuple[http.client.HTTPMessage, bytes]:
        """Return the headers and the body of an answer.

        A kept connection may have been closed meanwhile, so a request is sent twice at most.

        Raises:
            Unreachable: if there is none.
            Refused: if it is an error.
            UserError: if the file of the token never had one.
        """
        if self.token_file is not None:
            try:
                self._token = read_token(self.token_file, TOKEN_FLAG)
            except UserError:  # it is being written: the last one may still do
                if not self._token:
                    raise
            headers["Authorization"] = f"Bearer {self._token}"
        for attempt in range(2):
            try:
                self._connection.request(method, self.path + path, body, headers)
                answer = self._connection.getresponse()
                data = answer.read()
                break
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                if attempt or isinstance(error, ConnectionRefusedError | TimeoutError):
                    raise Unreachable(f"{self.url} does not answer: {one_line(error)}") from error
        if answer.status != 200:
            raise Refused(self.url, answer.status, data)
        return answer.headers, data

    def infer(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the model's outputs for a batch, without those of texts.

        Tensors are binary if the server takes such, else JSON.

        Raises:
            Unreachable: if the server does not answer.
            UserError: if it answers with an error, or what it says is not the protocol.
        """
        request = InferRequest(dict(arrays), binary=self._binary is not False)
        try:
            headers, data = self._post(request)
        except Refused as error:
            if self._binary is not None or not 400 <= error.status < 500:
                raise
            try:
                headers, data = self._post(InferRequest(dict(arrays)))
            except Refused:
                raise error from None
            self._binary = False
        else:
            self._binary = request.binary
        try:
            outputs = parse_response(data, headers.get(HEADER_LENGTH)).outputs
        except ProtocolError as error:
            raise UserError(f"{self.url} answers what is not the protocol: {error}") from error
        return {name: array for name, array in outputs.items() if array.dtype != object}

    def _post(self, request: InferRequest) -> tuple[http.client.HTTPMessage, bytes]:
        body = render_request(request, binary=request.binary)
        return self.ask("POST", "/infer", body.data, **body.headers)


def open_remote_model(
    url: str, told: Sequence[TensorSpec], token_file: str | None = None
) -> Opened:
    """Open the model that a server has, http://HOST:PORT/v2/models/NAME.

    Its digest is that of its metadata, because a server does not tell its weights.
    """
    model = RemoteModel(url, token_file)
    _, body = model.ask("GET")
    try:
        metadata = json.loads(body)
        tensors = [
            [(str(t["name"]), str(t["datatype"]), [*map(int, t["shape"])]) for t in metadata[key]]
            for key in ("inputs", "outputs")
        ]
        model_name = str(metadata["name"])
        platform = str(metadata.get("platform") or "")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{url} does not speak the Open Inference Protocol V2") from error
    declared = [
        Declared(name, datatype, tuple("?" if size < 0 else size for size in shape))
        for name, datatype, shape in tensors[0]
    ]
    inputs, most = input_specs(declared, told, url)
    if any(spec.datatype == "BYTES" for spec in inputs):
        raise UserError(f"{url}: string inputs are not supported")
    digest = hashlib.sha256(json.dumps([model_name, *tensors]).encode()).hexdigest()[:16]

    def compute(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return model.infer(
            {spec.name: arrays[spec.name].astype(DATATYPES[spec.datatype]) for spec in inputs}
        )

    return Opened(inputs, most, platform, digest, compute)
