"""What the gateway understands of a model where it must: requests, answers, and its own answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from dataclasses import replace
from functools import partial

import numpy as np

from codedinvnet.errors import UserError
from codedinvnet.models.base import (
    DATATYPES,
    HEADER_LENGTH,
    Signature,
    TensorSpec,
    can_be_scores,
    lacking_scores,
    scores_tensor,
)
from codedinvnet.models.probe import find_scores, in_turn, probe
from codedinvnet.models.upstream import binary_request, declared_inputs, json_request, outputs_of
from codedinvnet.scheduler.settings import MAX_BATCH
from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.faces.v2 import decompress, parse_request, render_response
from codedinvnet.serving.gateway.calls import (
    LARGEST,
    OK,
    Call,
    Headers,
    NotProtocol,
    Reply,
    Unreachable,
)
from codedinvnet.serving.gateway.upstreams import OWN_OUTPUTS, Upstream
from codedinvnet.serving.served import OwnModel
from codedinvnet.serving.service import Request, Response, outcome_name

LENGTH = HEADER_LENGTH.lower()
TIMEOUT = 20.0
"""Seconds for an answer while the gateway starts."""
LEEWAY = 1.0
"""Seconds beyond that in which the event loop has handed it on."""


def call_of(
    model: str, arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec], deadline: float
) -> Call:
    """Return a question of the gateway's own: for binary answers, over whatever transport.

    Over HTTP it can be written as JSON alone, too.

    Args:
        model: the name of the model that is asked.
        arrays: name -> (B, *shape) of its inputs.
        specs: of these.
        deadline: see `Call`.
    """
    body, told = binary_request(arrays, specs)
    own = tuple((name.lower(), value) for name, value in told.items())
    headers: Headers = (("content-type", "application/octet-stream"), *own)
    in_json = partial(json_request, arrays, specs)
    return Call(model, "", "http", body, headers, deadline, in_json=in_json)


def arrays_of(reply: Reply) -> dict[str, np.ndarray]:
    """Return the outputs of an answer.

    Raises:
        BadRequest: if it is an error, or not the protocol's.
    """
    if reply.status != OK[reply.transport]:
        raise BadRequest(str(reply))
    body, length = reply.body, dict(reply.headers).get(LENGTH)
    if reply.transport == "grpc":
        from codedinvnet.serving.faces.v2_grpc import Wanted, response_to_http

        translated = response_to_http(body, Wanted({}, True))
        body, length = translated.data, str(translated.header_length)
    else:
        body = decompress(body, dict(reply.headers).get("content-encoding"), LARGEST)
    try:
        return outputs_of(body, length)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise BadRequest(f"it is not the protocol's: {error}") from error


class NoAnswer(UserError):
    """No upstream answers a question of the gateway's own."""


class AskedModel:
    """A model that upstreams have, for threads beside the event loop.

    Args:
        upstreams: which are asked in turn until one answers.
        name: the model's.
        signature: its own.
        flag: which option has the upstreams, for messages.
        version: the only one that they have; "" if there are several, or nobody says.
    """

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        name: str,
        signature: Signature,
        flag: str,
        version: str = "",
    ) -> None:
        self.upstreams, self.name, self.signature = upstreams, name, signature
        self.flag, self.version = flag, version
        self._loop = asyncio.get_running_loop()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs of a batch.

        Raises:
            NoAnswer: if no upstream answers.
            UserError: if one answers with an error.
        """
        return in_turn(self.compute, inputs, self.signature.max_batch)

    def compute(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs of a batch that the model takes at once.

        Raises:
            NoAnswer: see `run`.
            UserError: likewise.
            CancelledError: if the event loop ends.
        """
        seconds = TIMEOUT * len(self.upstreams) + LEEWAY
        answer = asyncio.run_coroutine_threadsafe(self._asked(inputs), self._loop)
        try:
            return answer.result(seconds)
        except futures.TimeoutError:
            answer.cancel()
            raise NoAnswer(f"{self.flag}: none answers in {seconds:g} s") from None
        except futures.CancelledError:  # the loop ends: that is no word of the model
            raise asyncio.CancelledError from None

    async def _asked(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        told = []
        for upstream in self.upstreams:
            until = time.monotonic() + TIMEOUT
            call = call_of(self.name, inputs, self.signature.inputs, until)
            try:
                reply = await upstream.infer(call, TIMEOUT)
                if not reply.fails and not upstream.own.refusal(reply):
                    return arrays_of(reply)
                told.append(f"{upstream.url}: {reply}")
            except Unreachable as error:
                told.append(f"{upstream.url}: {error}")
            except BadRequest as error:
                raise UserError(f"{self.flag}: {upstream.url}: {error}") from error
        raise NoAnswer(f"{self.flag}: none answers: {'; '.join(told)}")


async def understand(
    upstreams: Sequence[Upstream],
    name: str,
    scores: str | None,
    told: Sequence[TensorSpec],
    flag: str = "--upstream",
    usual: str = "",
) -> AskedModel:
    """Ask upstreams for a model's metadata, and for answers to a few queries.

    Args:
        upstreams: which have it.
        name: the model's.
        scores: see `find_scores`.
        told: see `input_specs`.
        flag: see `AskedModel`.
        usual: the output that has the scores where they are not found.

    Raises:
        UserError: if none answers, the model is none that queries can be made for, or nobody knows
            where its class scores are.
    """
    silent = []
    for upstream in upstreams:
        try:
            metadata = await upstream.metadata(name, "", TIMEOUT)
            break
        except Unreachable as error:
            silent.append(f"{upstream.url}: {error}")
        except NotProtocol as error:
            raise UserError(f"{flag}: {upstream.url}: {error}") from error
    else:
        raise UserError(f"{flag}: none answers: {'; '.join(silent)}")
    where = f"{name} of {upstream.url}"
    inputs, most = declared_inputs(metadata, told, where)
    if any(spec.datatype == "BYTES" for spec in inputs):
        raise UserError(f"{where} takes texts: nothing but a copy makes up for its late answers")
    bare = AskedModel(upstreams, name, Signature(inputs, (), most), flag)

    probed = await asyncio.to_thread(probe, bare.compute, inputs, most, where)
    found = find_scores(scores, probed, where)
    if found is None and usual in [spec.name for spec in probed.outputs if can_be_scores(spec)]:
        found = find_scores(usual, probed, where)
    platform = str(metadata.get("platform") or "")
    texts = [  # which `arrays_of` leaves out, though clients may want them
        TensorSpec(str(tensor["name"]), "BYTES", tuple(map(int, tensor["shape"][1:])))
        for tensor in metadata["outputs"]
        if tensor["datatype"] == "BYTES" and tensor["name"] not in OWN_OUTPUTS
    ]
    outputs = (*probed.outputs, *texts)
    signature = Signature(inputs, outputs, probed.max_batch, found, platform)
    if found is None:
        lacking = lacking_scores(signature)
        if usual:
            lacking = (
                f"no output is surely class scores, and none is called {usual!r} as the model's"
            )
        raise UserError(f"{flag}: {where}: {lacking}")
    versions = list(metadata.get("versions") or ())
    version = str(versions[0]) if len(versions) == 1 else ""
    return AskedModel(upstreams, name, signature, flag, version)


class Understanding:
    """Reads requests and answers of one model, and writes answers of the gateway's own.

    Args:
        served: the upstreams' model, whose scores are known.
        version: the one that is known so; "" if that has no name.
    """

    def __init__(self, served: OwnModel, version: str = "") -> None:
        self.served, self.version = served, version
        self.outcome = outcome_name(served.signature)
        self.scores = scores_tensor(served.signature)

    def request(self, call: Call, body: bytes) -> Request:
        """Read a request.

        Args:
            call: has it.
            body: its body, unpacked.

        Raises:
            BadRequest: if the model has no such tensors, it is not the protocol's, or it is for a
                version, or has a query in its URL, of which nothing is known.
        """
        if call.url_query:
            raise BadRequest("its URL has a query: nothing is known of it")
        if call.version not in ("", self.version):
            raise BadRequest(f"version {call.version!r}: nothing is known of it")
        if call.transport == "grpc":
            from codedinvnet.serving.faces.v2_grpc import request_to_http

            found, _, _ = request_to_http(body)
            length = None if found.header_length is None else str(found.header_length)
            return parse_request(found.data, length, self.served, MAX_BATCH)
        return parse_request(body, dict(call.headers).get(LENGTH), self.served, MAX_BATCH)

    def lacking(self, request: Request) -> list[str]:
        """Return what a request asks for beside the scores: no approximate answer has it."""
        known = (*self.served.decoded, self.outcome)
        return [name for name, _ in request.outputs if name not in known]

    def scores_of(self, reply: Reply) -> np.ndarray:
        """Return the scores (B, classes) in an answer.

        Raises:
            BadRequest: if there are none.
        """
        found = arrays_of(reply).get(self.scores.name)
        if found is None or found.shape[1:] != self.scores.shape:
            raise BadRequest(f"it has no output {self.scores.name!r} of scores")
        return found

    def reply(self, call: Call, request: Request, scores: np.ndarray) -> Reply:
        """Write an approximate answer as an upstream would write its own."""
        outputs = {self.scores.name: scores.astype(DATATYPES[self.scores.datatype])}
        wanted = tuple(pair for pair in request.outputs if pair[0] != self.outcome)
        told = replace(request, outputs=wanted, parameters={})
        data, length = render_response(told, Response(outputs, 0.0), self.served, self.version)
        if call.transport == "grpc":
            from codedinvnet.serving.faces.v2_grpc import response_from_http

            message = response_from_http(data, None if length is None else str(length))
            return Reply("grpc", OK["grpc"], message)
        kind = "application/json" if length is None else "application/octet-stream"
        headers: Headers = (("content-type", kind),)
        if length is not None:
            headers = (*headers, (LENGTH, str(length)))
        return Reply("http", OK["http"], data, headers)
