"""Upstreams that have a model, and what is asked of a gateway before them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from aiohttp import web
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.models import open_model
from codedinvnet.models.base import HEADER_LENGTH
from codedinvnet.models.upstream import described, json_request, outputs_of
from tests.protect.conftest import PLACE
from tests.protect.factories import FEATURES
from tests.serving.gateway.asking import Got, ask
from tests.serving.gateway.fakes import Fake, GrpcFake

SMALL = {"method": "small-backup", "policy": "small-backup"}
MODEL = open_model(f"{PLACE}:vectors")
SMALLER = open_model(f"{PLACE}:smaller")
LENGTH = HEADER_LENGTH.lower().replace("-", "_")


class Server(Fake):
    """A server over HTTP that has a model."""

    def __init__(self, source: str = f"{PLACE}:vectors") -> None:
        super().__init__()
        self.model = open_model(source)
        self.takes_binary = True
        """Otherwise it understands JSON alone, as MLServer does."""
        self.misunderstood, self.refusal = 0, 500
        signature = self.model.signature
        tensors = {"inputs": signature.inputs, "outputs": signature.outputs}
        self.metadata = {
            "name": "m",
            **{
                key: [
                    {"name": t.name, "datatype": t.datatype, "shape": [-1, *t.shape]} for t in specs
                ]
                for key, specs in tensors.items()
            },
        }

    async def _infer(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.seen.append((request.path, {}, body))
        await self.held.wait()
        length = int(request.headers.get(HEADER_LENGTH, len(body)))
        if not self.takes_binary and (
            length < len(body) or request.headers["Content-Type"] != "application/json"
        ):
            self.misunderstood += 1
            return web.json_response({"error": "'utf-8' codec can't decode"}, status=self.refusal)
        if self.status != 200:
            return web.json_response({"error": "broken"}, status=self.status)
        (tensor,) = json.loads(body[:length])["inputs"]
        rows = np.array(tensor["data"], np.float32) if length == len(body) else body[length:]
        x = np.frombuffer(rows, np.float32).reshape(tensor["shape"])
        if x.shape[1:] != self.model.signature.inputs[0].shape:
            return web.json_response({"error": "a wrong shape"}, status=400)
        (y,) = self.model.run({"x": x}).values()
        head = {"name": "output", "datatype": "FP32", "shape": list(y.shape)}
        if not self.takes_binary:
            outputs = [{**head, "data": y.ravel().tolist()}]
            return web.json_response({"model_name": "m", "outputs": outputs})
        told = {**head, "parameters": {"binary_data_size": y.nbytes}}
        text = json.dumps({"model_name": "m", "outputs": [told]}).encode()
        headers = {HEADER_LENGTH: str(len(text))}
        return web.Response(body=text + y.tobytes(), headers=headers)


class Beside(Server):
    """Has another output beside that of its model.

    Args:
        other: as metadata have it.
        row: its bytes for a query.
        source: of the model.
    """

    def __init__(
        self, other: Mapping[str, Any], row: bytes, source: str = f"{PLACE}:vectors"
    ) -> None:
        super().__init__(source)
        self.other, self.row = other, row
        self.metadata["outputs"].append(other)

    async def _infer(self, request: web.Request) -> web.Response:
        found = await super()._infer(request)
        assert isinstance(found.body, bytes)
        length = int(found.headers[HEADER_LENGTH])
        told = json.loads(found.body[:length])
        rows = told["outputs"][0]["shape"][0]
        size = {"binary_data_size": rows * len(self.row)}
        shape = [rows, *self.other["shape"][1:]]
        told["outputs"].append({**self.other, "shape": shape, "parameters": size})
        text = json.dumps(told).encode()
        body = text + found.body[length:] + rows * self.row
        return web.Response(body=body, headers={HEADER_LENGTH: str(len(text))})


class GrpcServer(GrpcFake):
    """A server over gRPC that has the model of vectors."""

    tensors: ClassVar[dict[str, Any]] = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, FEATURES]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 3]}],
    }

    async def _infer(self, message: bytes, context: Any) -> bytes:
        asked = pb.ModelInferRequest.FromString(message)
        x = np.frombuffer(asked.raw_input_contents[0], np.float32).reshape(asked.inputs[0].shape)
        (y,) = MODEL.run({"x": x}).values()
        self.answer = pb.ModelInferResponse(model_name="m", raw_output_contents=[y.tobytes()])
        self.answer.outputs.add(name="output", datatype="FP32", shape=y.shape)
        return await super()._infer(message, context)


def queries(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, FEATURES), np.float32)


def message(x: np.ndarray, version: str = "") -> bytes:
    request = pb.ModelInferRequest(
        model_name="m", model_version=version, id="9", raw_input_contents=[x.tobytes()]
    )
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    found: bytes = request.SerializeToString()
    return found


async def asked(
    address: str, x: np.ndarray, identity: str = "mine", version: str = "", **parameters: Any
) -> Got:
    head, blobs = described({"x": x}, MODEL.signature.inputs)
    told = {**json.loads(head), "id": identity}
    told["parameters"].update(parameters)
    text = json.dumps(told).encode()
    path = f"/v2/models/m{version and f'/versions/{version}'}/infer"
    return await ask(address, b"".join([text, *blobs]), path, **{LENGTH: str(len(text))})


async def asked_in_json(address: str, x: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the scores of an answer in JSON, and its outcome."""
    body, _ = json_request({"x": x}, MODEL.signature.inputs)
    got = await ask(address, body, content_type="application/json")
    assert got.status == 200, got.body
    return outputs_of(got.body, None)["output"], json.loads(got.body)["parameters"]["outcome"]


def scores(got: Got) -> tuple[np.ndarray, str]:
    """Return the scores of an answer and its outcome, which it tells twice."""
    assert got.status == 200, got.body
    length = got.headers[HEADER_LENGTH]
    told = json.loads(got.body[: int(length)])
    assert told["parameters"]["outcome"] == got.headers["codedinvnet-outcome"]
    return outputs_of(got.body, length)["output"], told["parameters"]["outcome"]
