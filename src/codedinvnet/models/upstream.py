"""A model that a server elsewhere runs, asked over HTTP in the Open Inference Protocol V2."""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import ssl
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import numpy as np

from codedinvnet.asking import read_token
from codedinvnet.errors import UserError, is_host, one_line
from codedinvnet.models.base import DATATYPES, HEADER_LENGTH, TensorSpec, Unreachable
from codedinvnet.models.probe import Opened
from codedinvnet.models.specs import Declared, input_specs

PATH = "/v2/models/"
"""What a model's URL has behind the server's address."""
TOKEN_FLAG = "--model-token-file"
"""The option with the file of a server's token."""
TIMEOUT = 60.0
"""Seconds for one answer."""
Writes: TypeAlias = Callable[[], tuple[bytes, dict[str, str]]]
"""Returns the body of a request, and its headers about that."""


def declared_inputs(
    metadata: Mapping[str, Any], told: Sequence[TensorSpec], where: str
) -> tuple[tuple[TensorSpec, ...], int | None]:
    """Return the inputs of one query that a model's metadata declare, and its largest batch.

    Args:
        metadata: the protocol's model metadata.
        told: see `input_specs`.
        where: the model, for messages.

    Raises:
        UserError: see `input_specs`.
    """
    inputs = [
        Declared(
            str(tensor["name"]),
            str(tensor["datatype"]),
            tuple("?" if int(size) < 0 else int(size) for size in tensor["shape"]),
        )
        for tensor in metadata["inputs"]
    ]
    return input_specs(inputs, told, where)


def check_server(url: str, flag: str) -> None:
    """Refuse the URL of a server's model where that of the server is wanted.

    Args:
        url: of either.
        flag: the option that has it, for messages.

    Raises:
        UserError: if it is a model's.
    """
    server, of_model, _ = url.partition(PATH)
    if of_model:
        raise UserError(f"{flag}: {url!r} is a model's URL: name the server alone: {server}")


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


class Connection:
    """One kept connection to a model.

    Args:
        url: the model's, with PATH in it.
        token_file: has the token that the server wants, maybe another one by and by; None: none.

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
        self._connection = (
            http.client.HTTPSConnection(
                host, port, timeout=TIMEOUT, context=ssl.create_default_context()
            )
            if secure
            else http.client.HTTPConnection(host, port, timeout=TIMEOUT)
        )
        weakref.finalize(self, self._connection.close)

    def ask(
        self, method: str, path: str = "", body: bytes | None = None, headers: Any = None
    ) -> tuple[Mapping[str, str], bytes]:
        """Return the headers, in lower case, and the body of an answer.

        A kept connection may have been closed meanwhile: the question is asked twice then.

        Raises:
            Unreachable: if there is none.
            Refused: if it is an error.
            UserError: if the file of the token never had one.
        """
        headers = dict(headers or {})
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
        return {name.lower(): value for name, value in answer.getheaders()}, data


def open_upstream_model(
    url: str, told: Sequence[TensorSpec], token_file: str | None = None
) -> Opened:
    """Open the model that a server has, http://HOST:PORT/v2/models/NAME.

    Its digest is that of its metadata: nobody tells the weights of a server elsewhere.

    Args:
        url: the model's.
        told: its inputs whose shapes the server leaves open.
        token_file: see `Connection`.

    Raises:
        UserError: if it does not answer, or what it says is not the protocol.
    """
    connection = Connection(url, token_file)
    _, body = connection.ask("GET")
    try:
        metadata = json.loads(body)
        tensors = [
            [(t["name"], t["datatype"], [int(n) for n in t["shape"]]) for t in metadata[key]]
            for key in ("inputs", "outputs")
        ]
        name = str(metadata["name"])
        platform = str(metadata.get("platform") or "")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{url} does not speak the Open Inference Protocol V2") from error
    inputs, most = declared_inputs(metadata, told, url)
    if any(spec.datatype == "BYTES" for spec in inputs):
        raise UserError(f"{url} takes texts, which are not asked for")
    digest = hashlib.sha256(json.dumps([name, *tensors]).encode()).hexdigest()[:16]

    return Opened(inputs, most, platform, digest, Asking(connection, inputs).compute)


class Asking:
    """Asks a server's model, with binary tensors if the server takes them, else as JSON.

    Args:
        connection: to the model.
        inputs: of one query.
    """

    def __init__(self, connection: Connection, inputs: Sequence[TensorSpec]) -> None:
        self.connection, self.inputs = connection, inputs
        self.ways = [binary_request, json_request]
        """Those that the server may take: one, once it has answered."""

    def compute(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the model's answers to a batch.

        Raises:
            Unreachable: if the server does not answer.
            UserError: if it answers with an error, or what it says is not the protocol.
        """
        first: Refused | None = None
        for way in self.ways:
            body, told = way(arrays, self.inputs)
            try:
                headers, data = self.connection.ask("POST", "/infer", body, told)
            except Refused as error:
                if not 400 <= error.status < 500:
                    raise
                first = first or error
                continue
            try:
                found = outputs_of(data, headers.get(HEADER_LENGTH.lower()))
            except (ValueError, TypeError, KeyError) as error:
                where = self.connection.url
                raise UserError(f"{where} answers what is not the protocol: {error}") from error
            self.ways = [way]
            return found
        assert first is not None
        raise first


def binary_request(
    arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]
) -> tuple[bytes, dict[str, str]]:
    """Return the body of a request with binary tensors, and its headers."""
    head, blobs = described(arrays, specs)
    return b"".join([head, *blobs]), {HEADER_LENGTH: str(len(head))}


def json_request(
    arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]
) -> tuple[bytes, dict[str, str]]:
    """Return the body of a request in JSON alone, and its headers: some servers take no other."""
    inputs = [
        {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": list(arrays[spec.name].shape),
            "data": arrays[spec.name].astype(DATATYPES[spec.datatype]).ravel().tolist(),
        }
        for spec in specs
    ]
    return json.dumps({"inputs": inputs}).encode(), {"Content-Type": "application/json"}


def described(
    arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]
) -> tuple[bytes, list[bytes]]:
    """Return the JSON part of a request for binary answers, and its tensors."""
    blobs = [
        np.ascontiguousarray(arrays[s.name], DATATYPES[s.datatype].newbyteorder("<")).tobytes()
        for s in specs
    ]
    inputs = [
        {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": list(arrays[spec.name].shape),
            "parameters": {"binary_data_size": len(blob)},
        }
        for spec, blob in zip(specs, blobs, strict=True)
    ]
    asked = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    return json.dumps(asked).encode(), blobs


def outputs_of(data: bytes, length: str | None) -> dict[str, np.ndarray]:
    """Return an answer's outputs of numbers; texts are left out."""
    place = len(data) if length is None else int(length)
    found = {}
    for tensor in json.loads(data[:place])["outputs"]:
        shape, datatype = tuple(map(int, tensor["shape"])), str(tensor["datatype"])
        size = (tensor.get("parameters") or {}).get("binary_data_size")
        begin = place
        place += size or 0
        if datatype == "BYTES":
            continue
        if datatype not in DATATYPES:
            name = tensor["name"]
            told = "which is not read here: let the server return FP32"
            raise ValueError(f"output {name!r} is {datatype}, {told}")
        dtype = DATATYPES[datatype]
        if size is None:
            found[tensor["name"]] = np.array(tensor["data"], dtype).reshape(shape)
            continue
        if size != math.prod(shape) * dtype.itemsize or place > len(data):
            raise ValueError(f"output {tensor['name']!r} has {size} bytes")
        array = np.frombuffer(data, dtype.newbyteorder("<"), math.prod(shape), begin)
        found[tensor["name"]] = array.astype(dtype).reshape(shape)
    return found
