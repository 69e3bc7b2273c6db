"""A code beside the upstreams: the gateway encodes, upstreams compute, the gateway decodes.

An upstream runs nothing but its model. A task's query is made here, in a thread, and is an ordinary
request to an upstream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import SERVED
from codedinvnet.errors import UserError
from codedinvnet.models.base import DATATYPES, Signature, mixed_tensor, scores_tensor
from codedinvnet.serving.answers import BadRequest, described
from codedinvnet.serving.gateway.pool import CALL, REPLY, UpstreamPool, boxed
from codedinvnet.serving.gateway.understanding import arrays_of, call_of
from codedinvnet.serving.workers.pool import Death, GivenUp, Task, WorkerFailed
from codedinvnet.serving.workers.result import OUTPUT, Result, floated


class CodedPool:
    """Upstreams that do the tasks of a scheme.

    Args:
        upstreams: the workers.
        scheme: a code around their model.
        signature: the model's.

    Raises:
        UserError: if a task is for another model than the upstreams'.
    """

    def __init__(self, upstreams: UpstreamPool, scheme: Scheme, signature: Signature) -> None:
        self.tasks = scheme.rules.tasks(scheme.rules.k)
        others = {task.model for task in self.tasks.values()} - {SERVED}
        if others:
            raise UserError(
                f"--method: {scheme.name} has tasks for a {min(others)} model, which the upstreams "
                "do not run"
            )
        self.upstreams, self.scheme, self.signature = upstreams, scheme, signature
        self.scores = scores_tensor(signature)
        self.encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")

    @property
    def on_death(self) -> Death | None:
        """See `WorkerPool`."""
        return self.upstreams.on_death

    @on_death.setter
    def on_death(self, told: Death | None) -> None:
        self.upstreams.on_death = told

    async def start(self, size: int) -> None:
        await self.upstreams.start(size)

    async def call(self, worker: int, task: Task) -> Result:
        began, inputs, side, encoding = time.perf_counter(), task.inputs, None, 0.0
        encoded = self.tasks[task.number].encoded
        if encoded:
            loop = asyncio.get_running_loop()
            try:
                inputs, side = await loop.run_in_executor(self.encoder, self._encoded, task)
            except Exception as error:  # whatever a user's own code raises
                told = f"{self.scheme.name} cannot encode: {described(error)}"
                raise WorkerFailed(told) from error
            encoding = time.perf_counter() - began
        call = call_of(self.upstreams.model, inputs, self.signature.inputs, task.until)
        call.has_hung = True  # a code makes up for what is late: no other is asked again
        try:
            result = await self.upstreams.call(worker, task._replace(inputs={CALL: boxed(call)}))
        except GivenUp as error:  # one task of several: the code may make up for it
            raise WorkerFailed(str(error), blamed=error.blamed) from error
        try:
            outputs = arrays_of(result.outputs[REPLY][0])
            scores = outputs[self.scores.name].astype(np.float32).reshape(1, -1)
        except (BadRequest, LookupError, AttributeError) as error:
            raise WorkerFailed(f"an upstream's answer: {error}") from error
        if encoded:
            parts = [scores] if side is None else [scores, side]
            outputs = {OUTPUT: np.concatenate(parts, axis=1)}
        return result._replace(
            outputs=outputs, seconds=time.perf_counter() - began, encode_seconds=encoding
        )

    def _encoded(self, task: Task) -> tuple[Mapping[str, np.ndarray], np.ndarray | None]:
        (rows,) = floated(task.inputs).values()
        encoded = self.scheme.encode(task.number, torch.from_numpy(rows)[None])
        spec = mixed_tensor(self.signature)
        query = encoded.query.numpy().astype(DATATYPES[spec.datatype])
        side = encoded.side
        return {spec.name: query}, None if side is None else side.float().numpy()

    async def replace(self, worker: int) -> None:
        await self.upstreams.replace(worker)

    async def stop(self) -> None:
        self.encoder.shutdown(wait=False, cancel_futures=True)
        await self.upstreams.stop()

    def pid(self, worker: int) -> int | None:
        return None
