"""A bundle behind a front end, for tests that send images and look at probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np

from codedinvnet.codes.base import Scheme
from codedinvnet.scheduler.settings import Rules
from codedinvnet.serving.answers import Answered, QueryFailed
from codedinvnet.serving.decoding import Decoder
from codedinvnet.serving.dispatch import Dispatcher, Timing
from codedinvnet.serving.gate import AnswerGate
from codedinvnet.serving.metrics import Metrics, Recent
from codedinvnet.serving.served import IMAGES, PROBABILITIES, Classifier, TensorCodec
from codedinvnet.serving.workers.computing import SchemeComputer
from codedinvnet.serving.workers.pool import OUTPUT, Result, WorkerPool
from codedinvnet.serving.workers.supervisor import Worker
from tests.serving.in_process import InProcessPool

CLASSES = tuple("0123456789")


class BundlePool(InProcessPool):
    """Threads that compute with a scheme."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(SchemeComputer(scheme))


class BundleFront(Dispatcher):
    """A dispatcher of a scheme for images."""

    def __init__(
        self,
        scheme: Scheme,
        pool: WorkerPool,
        rules: Rules,
        classes: tuple[str, ...] = CLASSES,
        gate: AnswerGate | None = None,
        **timing: float,
    ) -> None:
        channels, height, width = scheme.shape
        self.served = Classifier("mnist", (channels, height, width), classes)
        metrics = Metrics()
        codec = TensorCodec(self.served, scheme, SchemeComputer(scheme))
        decoder = Decoder(scheme, self.served, metrics)
        super().__init__(pool, rules, codec, decoder, Timing(**timing), gate, metrics)

    @property
    def workers(self) -> list[Worker]:
        return self.supervisor.workers

    @property
    def recent(self) -> Recent:
        return self.metrics.recent

    async def ask(self, images: np.ndarray, **options: Any) -> list[Answered | QueryFailed]:
        """Answer images (B, C, H, W)."""
        return await self.infer([{IMAGES: image[None]} for image in images], **options)


def probabilities(answer: Answered) -> np.ndarray:
    """Return an answer's probabilities (classes,)."""
    return np.asarray(answer.outputs[PROBABILITIES][0])


def output(result: Result) -> np.ndarray:
    """Return a scheme's output (n,)."""
    return np.asarray(result.outputs[OUTPUT][0])


def with_output(result: Result, values: np.ndarray) -> Result:
    """Return a result with another output (n,), and the same answer if it has one."""
    return result._replace(outputs={**result.outputs, OUTPUT: values[None]})
