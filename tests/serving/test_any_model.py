"""Models of users' own behind the real HTTP face, asked by Triton's client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.models import open_model
from codedinvnet.net.protocol.messages import InferRequest, ProtocolError, RequestedOutput
from codedinvnet.serving.app import open_app, running
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.opened import check
from codedinvnet.serving.workers.faults import FaultyPool
from tests.codes.linear import assert_is_decoded
from tests.models import factories
from tests.models.factories import PLACE, TOKENS, WORDS, save_onnx
from tests.protection.test_served import HELD, ExtraLast

triton = pytest.importorskip("tritonclient.http")
aio = pytest.importorskip("tritonclient.http.aio")
utils = pytest.importorskip("tritonclient.utils")

POOL = "examples/my_pool.py:Pool"
BATCH = 3

Arrays = Mapping[str, np.ndarray]


def images(size: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda generator: generator.random((BATCH, 3, size, size), np.float32)


def vectors(generator: np.random.Generator) -> np.ndarray:
    return generator.random((BATCH, 16), np.float32)


def tokens(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(0, WORDS, (BATCH, TOKENS), np.int32)


MODELS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "resnet.onnx": images(32),
    f"{PLACE}:mlp": vectors,
    f"{PLACE}:words": tokens,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    save_onnx(factories.resnet, made / "resnet.onnx")
    return made


def place(source: str, folder: Path) -> str:
    return source if ":" in source else str(folder / source)


def tensors(inputs: Arrays, *, binary: bool) -> list[Any]:
    found = []
    for name, array in inputs.items():
        tensor = triton.InferInput(name, list(array.shape), utils.np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array, binary_data=binary)
        found.append(tensor)
    return found


async def asked(
    client: Any, name: str, inputs: Arrays, outputs: list[str], *, binary: bool
) -> Arrays:
    wanted = [triton.InferRequestedOutput(output, binary_data=binary) for output in outputs]
    answer = await client.infer(name, tensors(inputs, binary=binary), outputs=wanted)
    return {output: answer.as_numpy(output) for output in outputs}


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # of aiohttp
@pytest.mark.parametrize("source", MODELS)
async def test_a_model_is_served_as_it_computes(source: str, folder: Path) -> None:
    model = open_model(place(source, folder))
    spec = model.signature.inputs[0]
    inputs = {spec.name: MODELS[source](np.random.default_rng(7))}
    rows = [{name: array[i : i + 1] for name, array in inputs.items()} for i in range(BATCH)]
    own = [model.run(row) for row in rows]
    options = ServeOptions(
        source=place(source, folder), port=0, workers=2, policy="hedge", pool=POOL
    )

    async with running(options) as (address, app):
        client = aio.InferenceServerClient(address.removeprefix("http://"))
        try:
            name = app.service.served.name
            metadata = await client.get_model_metadata(name)
            assert metadata["inputs"] == [
                {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.shape]}
            ]
            outputs = [output["name"] for output in metadata["outputs"]]
            assert outputs == [*own[0], "outcome"]
            for binary, sent in ((True, inputs), (False, rows[0])):  # JSON may not be long
                found = await asked(client, name, sent, outputs, binary=binary)
                for i, row in enumerate(own[: len(sent[spec.name])]):
                    for output, array in row.items():
                        assert found[output].dtype == array.dtype
                        assert found[output][i : i + 1].tobytes() == array.tobytes()
                assert set(found["outcome"]) == {b"direct" if binary else "direct"}
        finally:
            await client.close()


def answers(options: ServeOptions, inputs: Arrays, late: bool = False, **request: Any) -> Arrays:
    """Return all outputs of a service that was asked once, for one full group.

    Args:
        options: of the service.
        inputs: of the request.
        late: whether the second member is late, and the extra tasks come after the others.
        request: its parameters, and the outputs that it wants.
    """

    async def ask() -> Arrays:
        app = open_app(options)
        dispatcher, outputs = app.dispatcher, request.pop("outputs", ())
        if late:
            faulty = cast(FaultyPool, dispatcher.pool)
            faulty.pool = ExtraLast(faulty.pool, len(next(iter(inputs.values()))))
        await dispatcher.start()
        try:
            if late:
                faulty.add(HELD)
            wanted = tuple(RequestedOutput(name, True) for name in outputs)
            asked = InferRequest(inputs, outputs=wanted, parameters=request)
            return (await app.service.answer(asked, time.monotonic())).message.outputs
        finally:
            await dispatcher.stop()

    return asyncio.run(ask())


@pytest.mark.parametrize("method", ["approxifer", "nercc"])
def test_a_code_without_direct_answers_approximates_the_model(method: str) -> None:
    source = f"{PLACE}:mlp"
    inputs = {"input": np.random.default_rng(1).random((4, 16), np.float32)}
    options = ServeOptions(source=source, k=4, method=method, pool=POOL)
    found = answers(options, inputs)
    assert list(found) == ["output", "outcome"]
    assert set(found["outcome"]) == {b"decoded"}
    assert_is_decoded(found["output"], open_model(source), method, inputs["input"])
    with pytest.raises(ProtocolError, match=r"accept_decoded: this method has no direct answers"):
        answers(options, inputs, accept_decoded=False)


METHOD = "examples/my_method.py:TwoParities"


@pytest.mark.parametrize("outputs", [["scores_0"], ["scores_0", "label"]])
def test_a_method_of_ones_own_protects_a_model_of_ones_own(outputs: list[str]) -> None:
    """Direct answers stay the model's own; decoded ones have only the scores."""
    options = ServeOptions(source=f"{PLACE}:two_headed", k=3, method=METHOD, pool=POOL, demo=True)
    inputs = {"x": np.random.default_rng(2).random((3, 4), np.float32)}
    model = open_model(options.source)
    own = [model.run({"x": inputs["x"][i : i + 1]}) for i in range(3)]
    found = answers(options, inputs, late=True, outputs=[*outputs, "outcome"])
    direct = "label" in outputs  # of which nothing is decoded
    assert found["outcome"].tolist() == [b"direct", b"direct" if direct else b"decoded", b"direct"]
    for i in (0, 1, 2) if direct else (0, 2):
        for name in outputs:
            assert found[name][i : i + 1].tobytes() == own[i][name].tobytes()
    assert found[outputs[0]][1] == pytest.approx(own[1][outputs[0]][0], abs=1e-3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "approxifer"}, "a code mixes queries of one floating input, and the model"),
        ({"policy": "coded"}, "--policy: coded needs a --method, such as approxifer"),
        ({"method": "approxifer", "policy": "hedge"}, "--method: approxifer goes with a coded"),
        ({"method": "parm"}, "--method: parm is trained together with a bundle"),
        ({"method": "coded-invnet"}, "--method: coded-invnet is trained together with a bundle"),
        ({"part": Path("x")}, "--set part: is for a bundle, not for a model of your own"),
        ({"scores": "nothing"}, "scores: 'nothing' is no output of"),
    ],
)
def test_what_a_model_of_ones_own_cannot_have(options: dict[str, Any], told: str) -> None:
    def serve() -> None:
        asked = ServeOptions(source=f"{PLACE}:words", pool=POOL, **options)
        check(asked)
        open_app(asked)

    with pytest.raises(UserError, match=told):
        serve()
    with pytest.raises(UserError, match="--set name: is for a model of your own, not for a bundle"):
        check(ServeOptions(source="mnist", name="numbers"))
    with pytest.raises(UserError, match=r"not on cuda: give a factory"):
        check(ServeOptions(source="model.onnx", device="cuda"))
