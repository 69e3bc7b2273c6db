"""A smaller model on a server of its own as the backup: which tensors of it are taken."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from aiohttp import web

from codedinvnet.models.base import DATATYPES, HEADER_LENGTH
from codedinvnet.models.upstream import described
from tests.protect.conftest import PLACE
from tests.serving.gateway.asking import ask
from tests.serving.gateway.fakes import gateway
from tests.serving.gateway.servers import LENGTH, Beside, Server, asked, queries, scores
from tests.serving.gateway.test_protection import refused

OTHER = np.array([0, 1, 2], np.float32).tobytes()
POLICY = {"policy": "small-backup", "k": 2}


def beside(name: str) -> Server:
    other = {"name": name, "datatype": "FP32", "shape": [-1, 3]}
    return Beside(other, OTHER, f"{PLACE}:smaller")


@asynccontextmanager
async def served(small: Server) -> AsyncIterator[str]:
    await small.start()
    try:
        yield f"{small.url}/v2/models/m"
    finally:
        await small.stop()


async def test_of_several_outputs_that_of_the_models_name_has_the_scores() -> None:
    server, small = Server(), beside("aux")
    async with served(small) as url, gateway(server, backup_upstream=url, **POLICY) as (at, _, _):
        server.hold()
        x = queries(1)
        answer, outcome = scores(await asked(at, x))
        assert outcome == "decoded"
        assert answer == pytest.approx(small.model.run({"x": x})["output"], abs=1e-5)
        server.go()


async def test_outputs_none_of_which_is_surely_the_scores_are_told_with_the_option() -> None:
    main = {"name": "main", "datatype": "FP32", "shape": [-1, 3]}
    told = "--backup-upstream: m of http://.*: no output is surely class scores, .* 'main'"
    async with served(beside("aux")) as url:
        await refused(told, Beside(main, OTHER), backup_upstream=url, scores="main")
    told = "--upstream: m of http://.*: tell which output .* --scores NAME"
    await refused(told, *(Beside(main, OTHER) for _ in range(3)), method="approxifer")


class TwoInputs(Server):
    """Has a model of two inputs, in the order that it likes."""

    def __init__(self, step: int) -> None:
        super().__init__(f"{PLACE}:two_inputs")
        self.metadata["inputs"] = self.metadata["inputs"][::step]

    async def _infer(self, request: web.Request) -> web.Response:
        body = await request.read()
        await self.held.wait()
        place = int(request.headers[HEADER_LENGTH])
        arrays = {}
        for tensor in json.loads(body[:place])["inputs"]:
            end = place + tensor["parameters"]["binary_data_size"]
            values = np.frombuffer(body[place:end], DATATYPES[tensor["datatype"]])
            arrays[tensor["name"]], place = values.reshape(tensor["shape"]), end
        (y,) = self.model.run(arrays).values()
        told = {"name": "output", "datatype": "FP32", "shape": y.shape, "data": y.ravel().tolist()}
        return web.json_response({"model_name": "m", "outputs": [told]})


async def test_the_order_of_inputs_is_a_servers_own() -> None:
    server, small = TwoInputs(1), TwoInputs(-1)
    async with served(small) as url, gateway(server, backup_upstream=url, **POLICY) as (at, _, _):
        server.hold()
        x = {"numbers": np.full((1, 5), 0.5, np.float32), "flags": np.ones((1, 3), bool)}
        head, blobs = described(x, server.model.signature.inputs)
        got = await ask(at, head + b"".join(blobs), **{LENGTH: str(len(head))})
        answer, outcome = scores(got)
        assert outcome == "decoded"
        assert answer == pytest.approx(server.model.run(x)["output"], abs=1e-5)
        server.go()
