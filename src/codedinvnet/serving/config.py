"""The options of `codedinvnet serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from codedinvnet.common.options import Options, option
from codedinvnet.net.listening import is_loopback
from codedinvnet.scheduler.policies import AUTO, CODED
from codedinvnet.scheduler.settings import MAX_BATCH, hang_limit

if TYPE_CHECKING:  # the command line is made without PyTorch
    from codedinvnet.models.source import ModelSource

MODEL, ANSWERS, WORKERS, NETWORK = "model", "late and missing answers", "workers", "network"
MOST_K = 100
"""Queries in a group, at most: a larger code would take the memory and time of the start."""


class ServeOptions(Options):
    """Options of `codedinvnet serve`."""

    source: str = option(
        ..., "name of a shipped bundle, a bundle's folder, FILE.onnx, or package.module:function, "
        "which makes a torch.nn.Module"
    )  # fmt: skip
    weights: str | None = option(
        None, "safetensors file with the weights of a factory's module", MODEL, unset="its own"
    )  # fmt: skip
    scores: str | None = option(
        None, "output with the class scores; KIND: logits or probabilities", MODEL,
        metavar="NAME[:KIND]", unset="found if there is one candidate"
    )  # fmt: skip
    inputs: tuple[str, ...] = option(
        (), "an input that the model leaves open, of one query, as x:FP32:3x224x224; repeatable",
        MODEL, metavar="NAME:DATATYPE:SHAPE", flag="input"
    )  # fmt: skip
    name: str | None = option(
        None, "what requests call a model of your own", MODEL, rare=True,
        unset="its file's or function's name"
    )  # fmt: skip

    policy: str | None = option(
        None, "uncoded, replicate, hedge, coded, coded+hedge, a method, METHOD+hedge, "
        "or auto, which decides by what it measures", ANSWERS,
        unset="auto; coded with a --method"
    )  # fmt: skip
    method: str | None = option(
        None, "what makes up for missing answers: a method of docs/reference/methods.md, or one "
        "of your own, FILE.py:CLASS", ANSWERS, unset="of a bundle with auto the small backup in "
        "its folder, if there is one, else Coded-InvNet; of a model of your own none"
    )  # fmt: skip
    k: int | None = option(None, "queries in a group", ANSWERS, ge=1, le=MOST_K, unset="10")
    protection: Path | None = option(
        None, "folder that `codedinvnet protect` wrote for this model", ANSWERS
    )  # fmt: skip
    max_disagreement: float | None = option(
        None, "share of approximate answers that may differ from direct ones, such as 0.01; less "
        "certain ones wait for the direct answer", ANSWERS, gt=0, lt=1,
        unset="the one that a protection suggests for its recommended backup; else all are released"
    )  # fmt: skip
    extra: float | None = option(
        None, "extra work per query, at most, in service times: copies, parities and backups",
        ANSWERS, rare=True, ge=0, allow_inf_nan=False,
        unset="0.2 with auto; else 1/k of copies, and all that a code sends"
    )  # fmt: skip
    part: Path | None = option(
        None, "the checkpoint that `bench accuracy` left for the method and k", ANSWERS, rare=True
    )  # fmt: skip
    group_timeout_ms: float = option(
        20.0, "until a group that is not full is coded", ANSWERS, rare=True, gt=0, unit="ms"
    )  # fmt: skip
    on_corruption: Literal["report", "replace"] = option(
        "report", "what is done about a worker that answers wrongly: report or replace; needs a "
        "calibration", ANSWERS, rare=True
    )  # fmt: skip

    workers: int | None = option(
        None, "worker processes", WORKERS, ge=1,
        unset="as many as a group has tasks; without a code one a processor, at least 2"
    )  # fmt: skip
    pool: str = option("local", "local processes, ray, or FILE.py:CLASS", WORKERS)
    device: str = option("cpu", "of the workers: cpu, cuda, cuda:1", WORKERS)
    ray_address: str | None = option(
        None, "a running Ray cluster", WORKERS, rare=True, unset="one is started here"
    )  # fmt: skip
    threads_per_worker: int = option(1, "threads of a worker", WORKERS, rare=True, ge=1)
    worker_batch: int = option(
        1, "waiting queries that a worker computes in one call, at most; more pays on a GPU",
        WORKERS, rare=True, ge=1
    )  # fmt: skip
    deadline_ms: float = option(
        5000.0, "until a query is guessed or fails", WORKERS, gt=0, allow_inf_nan=False, unit="ms"
    )  # fmt: skip
    hang_timeout_ms: float | None = option(
        None, "ms until a silent worker is replaced", WORKERS, rare=True, gt=0, allow_inf_nan=False,
        unset="0.6 of the deadline, at least 1000"
    )  # fmt: skip
    down_timeout_ms: float = option(
        30_000.0, "without any worker until /v2/health/live fails", WORKERS, rare=True, gt=0,
        allow_inf_nan=False, unit="ms"
    )  # fmt: skip
    faults: Path | None = option(
        None, "inject the faults of this JSON file, for experiments", WORKERS
    )  # fmt: skip
    demo: bool = option(False, "let the page send images and hurt workers", WORKERS, unset="no")

    host: str = option("127.0.0.1", "address to listen on", NETWORK)
    port: int = option(8000, "port of HTTP; 0: a free one", NETWORK, ge=0, le=65535)
    grpc_port: int | None = option(
        None, "port of gRPC; 0: a free one", NETWORK, ge=0, le=65535, unset="HTTP only"
    )  # fmt: skip
    tls_cert: Path | None = option(
        None, "PEM file with the server's certificate and its chain, read again when it changes",
        NETWORK, unset="no TLS"
    )  # fmt: skip
    tls_key: Path | None = option(None, "PEM file with the certificate's key", NETWORK)
    token_file: Path | None = option(
        None, "file with the token that clients must send; read again when it changes", NETWORK,
        unset="no token is needed"
    )  # fmt: skip
    allow_host: tuple[str, ...] = option(
        (), "other names that clients may call the service by (Host header), separated by commas; "
        "*: any", NETWORK, rare=True, unset="localhost and --host"
    )  # fmt: skip
    max_pending: int | None = option(
        None, "unanswered queries before 503, even if they could be answered in time", NETWORK,
        rare=True, ge=1, unset="200 a worker, at least 2000"
    )  # fmt: skip
    max_batch: int = option(MAX_BATCH, "queries of one request, at most", NETWORK, rare=True, ge=1)
    max_body_memory: float = option(
        512.0, "of all requests that are here, as bodies or tensors, before 503", NETWORK,
        rare=True, gt=0, allow_inf_nan=False, unit="MiB"
    )  # fmt: skip

    @property
    def members(self) -> int:
        """Queries in a group, unless a protection has its own number."""
        return 10 if self.k is None else self.k

    @property
    def policy_name(self) -> str:
        """The policy: `auto`, unless the options say another, or name only a method."""
        if self.policy is not None:
            return self.policy
        return (AUTO if self.method is None else CODED).name

    @property
    def is_open(self) -> bool:
        """Whether other machines reach the port, and need no token."""
        return self.token_file is None and not is_loopback(self.host)

    @property
    def model(self) -> ModelSource:
        """What the model is opened from, a bundle or a user's own."""
        from codedinvnet.models.source import ModelSource

        return ModelSource(
            self.source,
            self.weights,
            self.scores,
            self.inputs,
            self.device,
            self.threads_per_worker,
        )

    @property
    def hang_timeout(self) -> float:
        """The seconds that a worker may be at one task."""
        given = self.hang_timeout_ms
        return (hang_limit(self.deadline_ms) if given is None else given) / 1000
