"""What `codedinvnet serve` is asked for, and what of it cannot work."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from codedinvnet.codes.method import Method, Tolerance
from codedinvnet.codes.registry import METHODS, OURS, UNTRAINED, find_method
from codedinvnet.engines import ENGINES, ONNX_RUNTIME, PYTORCH, check_engine, check_installed
from codedinvnet.errors import UserError
from codedinvnet.models.source import ModelSource
from codedinvnet.scheduler.policies import AUTO, CODED, POLICIES
from codedinvnet.scheduler.settings import MAX_BATCH, coded_too_late, hang_limit
from codedinvnet.serving.listening import check_limit, check_ports
from codedinvnet.serving.logs import log_event
from codedinvnet.serving.policies import check_extra, served_as
from codedinvnet.serving.reliance import CORRUPTION, REPLACE, REPORT

OFFERED = tuple(name for name, method in METHODS.items() if not method.is_policy)
"""The methods that a server is started with."""


@dataclass(frozen=True)
class ServeOptions:
    """What `codedinvnet serve` was asked for; the command line explains the fields.

    Times are in milliseconds here, as on the command line.
    """

    source: str
    """A bundle's name or folder, or a model of a user's own."""
    k: int | None = None
    """None: see `members`."""
    workers: int | None = None
    method: str | None = None
    """None: this package's own code for a bundle, none for other models."""
    part: Path | None = None
    stragglers: int = 1
    errors: int = 1
    policy: str | None = None
    """A policy, or one with a method as `served_as` takes it; None: see `policy_of`."""
    worker_batch: int = 1
    extra: float | None = None
    """None: what suits the policy."""
    pool: str = "local"
    ray_address: str | None = None
    device: str = "cpu"
    threads_per_worker: int = 1
    engine: str | None = None
    """None: ONNX Runtime for ONNX files, PyTorch for the others."""
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    """None: HTTP alone."""
    allowed_host: tuple[str, ...] = ()
    deadline_ms: float = 5000.0
    group_timeout_ms: float = 20.0
    hang_timeout_ms: float | None = None
    """None: what suits the deadline (`hang_limit`)."""
    down_timeout_ms: float = 30_000.0
    min_confidence: float = 0.0
    max_disagreement: float | None = None
    """None: approximate answers are released whatever their confidence."""
    on_corruption: str = REPORT
    max_pending: int | None = None
    """None: what suits the workers (`pending_limit`)."""
    max_batch: int = MAX_BATCH
    max_body_memory: float = 512.0
    """MiB."""
    token_file: Path | None = None
    traces: str | None = None
    faults: Path | None = None
    demo: bool = False
    weights: str | None = None
    scores: str | None = None
    inputs: tuple[str, ...] = ()
    name: str | None = None
    """None: what the source is called."""
    protection: Path | None = None
    """The folder of `codedinvnet protect`; `method` then is one of its table."""

    @property
    def members(self) -> int:
        """Queries in a group, unless a protection has its own number."""
        return 10 if self.k is None else self.k


def told_apart(options: ServeOptions) -> ServeOptions:
    """Return options whose policy names no method: `METHOD+hedge` is one of each.

    Raises:
        UserError: if there is no such policy, or another method is asked for.
    """
    if options.policy is None or options.policy in POLICIES:
        return options
    try:
        served = served_as(options.policy)
    except UserError as error:
        raise UserError(f"--policy: {error}") from error
    if options.method not in (None, served.method):
        raise UserError(f"--method: {options.method} is not that of --policy {options.policy}")
    return replace(options, policy=served.policy, method=served.method)


def check(options: ServeOptions) -> None:
    """Refuse what cannot work, before anything is loaded.

    Raises:
        UserError: naming the option.
    """
    options = told_apart(options)
    own = model_source(options).kind != "bundle"
    if model_source(options).kind == "upstream":
        raise UserError(f"{options.source} is served already: codedinvnet gateway stands before it")
    method = _method(options)
    choices = (
        ("--engine", options.engine, ENGINES),
        ("--on-corruption", options.on_corruption, CORRUPTION),
    )
    for flag, value, known in choices:
        if value is not None and value not in known:
            raise UserError(f"{flag}: {value!r} is not one of {', '.join(known)}")
    if ":" not in options.pool and options.pool not in ("local", "ray"):
        raise UserError(f"--pool: {options.pool!r} is not local, ray or FILE.py:CLASS")
    times = ("deadline_ms", "group_timeout_ms", "hang_timeout_ms", "down_timeout_ms")
    for name in (
        *times,
        "threads_per_worker",
        "worker_batch",
        "max_pending",
        "max_batch",
        "max_body_memory",
    ):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:  # NaN neither
            raise UserError(f"--{name.replace('_', '-')}: must be above 0, got {value}")
    if options.k is not None and options.k < 1:
        raise UserError(f"--k: must be at least 1, got {options.k}")
    check_extra(options.extra)
    groups = method is not None or options.protection is not None
    if groups and (why := coded_too_late(options.group_timeout_ms, options.deadline_ms)):
        raise UserError(f"--group-timeout-ms: {why}")
    if not 0 <= options.min_confidence <= 1:
        raise UserError(f"--min-confidence: must lie in 0..1, got {options.min_confidence}")
    limit = options.max_disagreement
    check_limit(limit)
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise UserError(f"--device: {str(error).splitlines()[0]}") from error
    usual = ONNX_RUNTIME if model_source(options).kind == "onnx" else PYTORCH
    check_engine(options.engine or usual, options.device)
    if options.pool == "local":  # of Ray's nodes each tells for itself
        check_installed(options.engine or PYTORCH)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device: this machine has no {options.device}")
    for name in Tolerance._fields:
        value = getattr(options, name)
        if value < 1:
            raise UserError(f"--{name}: must be at least 1, got {value}")
        if value > 1 and (method is None or name not in method.chooses):
            chosen = (known for known in OFFERED if name in METHODS[known].chooses)
            whose = "no method" if method is None else method.name
            raise UserError(
                f"--{name}: {whose} makes up for what it can; it is of {', '.join(chosen)}"
            )
    check_source(options, own, method)
    if options.ray_address is not None and options.pool != "ray":
        raise UserError("--ray-address: goes with --pool ray")
    policy = POLICIES[options.policy or policy_of(options)]
    if options.min_confidence > 0 and not (policy.hedged and policy.takes_code):
        raise UserError("--min-confidence: goes with a policy that can send a copy, coded+hedge")
    calibrated = not own or options.protection is not None
    relies = {
        "--max-disagreement": limit is not None,
        "--on-corruption replace": options.on_corruption == REPLACE,
    }
    for flag, asked in relies.items():
        if asked and not (calibrated and policy.takes_code):
            raise UserError(
                f"{flag}: goes with a coded policy, and a calibrated bundle or a protection"
            )
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers: must be at least 1, got {options.workers}")
    check_ports(options.port, options.grpc_port)


def check_source(options: ServeOptions, own: bool, method: Method | None) -> None:
    """Refuse options that do not go with what is served.

    Raises:
        UserError: naming the option.
    """
    if not own:
        for name in ("weights", "scores", "name", "protection"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name}: is for a model of your own, not for a bundle")
        if options.inputs:
            raise UserError("--input: is for a model of your own, not for a bundle")
        return
    if "/" in (options.name or ""):
        raise UserError(f"--name: no URL over HTTP leads to {options.name!r}: leave out the /")
    if options.protection is not None and options.k is not None:
        raise UserError("--k: goes without --protection, which has its own")
    if options.part is not None:
        raise UserError("--part: is for a bundle, not for a model of your own")
    policy = POLICIES[policy_of(options)]
    coded = policy.takes_code
    if options.protection is not None:
        if not coded:
            raise UserError(f"--protection: goes with a coded policy, not {options.policy}")
        return
    if policy.coded and method is None:
        raise UserError(
            f"--policy: {options.policy} needs a --method, such as {UNTRAINED[0]}, which needs "
            "no training, or a --protection"
        )
    if method is not None and not coded:
        raise UserError(f"--method: {method.name} goes with a coded policy, not {options.policy}")


def model_source(options: ServeOptions) -> ModelSource:
    """Return what the model is opened from, a bundle or a user's own."""
    return ModelSource(
        options.source,
        options.weights,
        options.scores,
        options.engine,
        options.inputs,
        options.device,
        options.threads_per_worker,
    )


def policy_of(options: ServeOptions) -> str:
    """Return the policy: `auto`, unless the command line says another, or names a method alone."""
    if options.policy is not None:
        return options.policy
    return (AUTO if options.method is None else CODED).name


def _method(options: ServeOptions) -> Method | None:
    """Return the method that is asked for; None for a model of a user's own without one."""
    name = options.method
    if name is None or options.protection is not None:
        if model_source(options).kind != "bundle":
            return None
        name = OURS
    try:
        method = find_method(name)
    except UserError as error:
        raise UserError(f"--method: {error}") from error
    if method.is_policy:
        raise UserError(f"--method: {name!r} is not one of {', '.join(OFFERED)}")
    return method


def hang_timeout(options: ServeOptions) -> float:
    """Return the seconds that a worker may be at one task; tell if that is too long.

    A query on a hung worker is sent again only when that worker is given up, and is over at its
    deadline.
    """
    given = options.hang_timeout_ms
    if given is None:
        return hang_limit(options.deadline_ms) / 1000
    if given >= options.deadline_ms:
        why = f"--hang-timeout-ms {given:g} is not below --deadline-ms {options.deadline_ms:g}"
        log_event("queries on hung workers are not sent again", logging.WARNING, reason=why)
    return given / 1000


def tell_open(host: str, demo: bool = False) -> None:
    """Log what others may do who reach the port, and need no token."""
    open_to = "whoever reaches the port may send queries, and sees the last ones' images"
    if demo:
        open_to += " and stops workers"
    log_event("no token", logging.WARNING, host=host, reason=open_to)
