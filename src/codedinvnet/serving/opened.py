"""Refuses options of `serve` that cannot work, and opens what is served: model, code and pool."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import part_beside, scheme_for
from codedinvnet.codes.method import Method
from codedinvnet.codes.named_policies import served_as
from codedinvnet.codes.registry import METHODS, OURS, UNTRAINED, find_method
from codedinvnet.codes.rules import is_systematic
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import file_digest
from codedinvnet.common.user_code import import_user_module
from codedinvnet.models.base import scores_tensor
from codedinvnet.models.bundle import bundle_folder, load_bundle, weights_digest
from codedinvnet.net.logs import log_event
from codedinvnet.protection.calibration import (
    FILE,
    Calibration,
    calibration_of,
)
from codedinvnet.protection.folder import (
    description_digest,
    protected_output,
    protection_calibration,
    read_description,
)
from codedinvnet.protection.tasks import task_of
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.settings import coded_too_late
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.served import Classifier, OwnModel, ProtectedModel, Served
from codedinvnet.serving.workers.computing import BundleSpec, ModelSpec, SchemeComputer, WorkerSpec
from codedinvnet.serving.workers.faults import FaultyPool, Schedule, load_schedule
from codedinvnet.serving.workers.local import ProcessPool
from codedinvnet.serving.workers.pool import Computer, WorkerPool

SLOW, LIMIT = 5.0, 300.0
"""Seconds after which a log line says what the start waits for, and after which it is given up."""
QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Linux's file of a container's processor time: microseconds, or `max`, in a period of others."""
POOL_METHODS = ("start", "call", "replace", "stop", "pid")


@dataclass(frozen=True)
class Opened:
    """What is served, what workers load, and how many there are by default."""

    served: Served
    spec: WorkerSpec
    scheme: Scheme | None
    computer: Computer | None
    workers: int
    calibration: Calibration | None = None
    limit: float | None = None
    """On disagreement, unless the options say another."""


def open_served(options: ServeOptions) -> Opened:
    """Open the model, and make the code for it.

    Raises:
        UserError: if that cannot be.
    """
    return _open_bundle(options) if options.model.kind == "bundle" else _open_model(options)


def _open_bundle(options: ServeOptions) -> Opened:
    name = method_of(options)
    bundle = load_bundle(options.source)
    scheme = scheme_for(bundle, options.members, name, options.part)
    part = options.part
    if part is None:
        part = part_beside(bundle_folder(options.source), find_method(name), options.members)
    spec = BundleSpec(
        options.source,
        options.members,
        options.device,
        options.threads_per_worker,
        name,
        part,
        weights_digest(options.source),
        "" if part is None else file_digest(part),
    )
    info = bundle.info
    dataset = info.provenance.settings.data.name
    served = Classifier(info.name, info.input.shape, info.classes, dataset)
    tasks = scheme.rules.tasks(options.members)
    calibration = None
    if options.max_disagreement is not None or (bundle.folder / FILE).is_file():
        whose = bundle.folder, bundle.digest()
        calibration = calibration_of(*whose, name, options.members, part)
    return Opened(served, spec, scheme, SchemeComputer(scheme), len(tasks), calibration)


def method_of(options: ServeOptions) -> str:
    """Return the method of a bundle; `auto` takes the small backup in its folder."""
    if options.method is not None:
        return options.method
    small = METHODS[SmallBackup.name]
    free = options.part is None and POLICIES[options.policy_name].adapts
    found = free and part_beside(bundle_folder(options.source), small, options.members) is not None
    return small.name if found else OURS


def _open_model(options: ServeOptions) -> Opened:
    with limited(f"the model {options.source}"):
        model = options.model.open()
    signature = model.signature
    name = options.name or called(options.source)
    protected = options.protection is not None
    if not POLICIES[options.policy_name].takes_code or not (protected or options.method):
        processors = usable_processors() // options.threads_per_worker
        served = OwnModel(name, signature, texts=model.source.kind == "onnx")
        return Opened(served, ModelSpec(model.source), None, None, max(2, processors))
    spec = ModelSpec(model.source, options.method or "", options.members)
    if options.protection is not None:
        spec = replace(
            spec,
            protection=options.protection,
            protection_digest=description_digest(options.protection),
        )
    with limited(f"the protection {options.protection}" if protected else "the code"):
        computer = spec.computer(model)
    scheme = computer.scheme
    assert scheme is not None
    if not is_systematic(scheme.rules):  # no answer has any other output
        signature = replace(signature, outputs=(scores_tensor(signature),))
    workers = len(scheme.rules.tasks(scheme.rules.k))
    served, calibration, limit = OwnModel(name, signature), None, None
    if options.protection is not None:
        found = read_description(options.protection)
        calibration = protection_calibration(options.protection)
        output, task = protected_output(found, model), task_of(found.model.task)
        served = ProtectedModel(name, signature, output=output, task=task)
        limit = found.limit if scheme.name == found.recommended else None
    return Opened(served, spec, scheme, computer, workers, calibration, limit)


@contextmanager
def limited(what: str) -> Iterator[None]:
    """End this process if something takes too long to be opened: a model may compute for ever.

    Nothing else ends a loop in native code. ONNX Runtime lets other threads run meanwhile.
    """
    opened = threading.Event()

    def watch() -> None:
        if opened.wait(SLOW):
            return
        log_event("opening takes long", logging.WARNING, what=what, limit=LIMIT)
        if not opened.wait(LIMIT - SLOW):
            reason = f"{what} was not opened within {LIMIT:g} s: does it compute for ever?"
            print(f"error: {reason}", file=sys.stderr, flush=True)
            os._exit(2)

    threading.Thread(target=watch, name="limit", daemon=True).start()
    try:
        yield
    finally:
        opened.set()


def called(source: str) -> str:
    """Return what a model of a user's own is called in requests: its file's or function's name."""
    _, colon, function = source.rpartition(":")
    word = function if colon and not Path(source).exists() else Path(source).stem
    return re.sub(r"[^\w.-]+", "-", word) or "model"


def usable_processors(quota: Path = QUOTA) -> int:
    """Return how many processors this process may use, at least 1.

    A container's may be fewer than the machine's. A quota of a part of one counts as a whole one.

    Args:
        quota: Linux's file.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        allowed, period = quota.read_text(encoding="ascii").split()
        count = min(count, math.ceil(int(allowed) / int(period)))  # "max" is no number
    return max(1, count)


def make_pool(options: ServeOptions, opened: Opened) -> WorkerPool:
    """Return the pool of the options, not yet started.

    Raises:
        UserError: if it is a user's own, and there is none, or if the faults can't be injected.
    """
    pool: WorkerPool
    spec, scheme = opened.spec, opened.scheme
    if options.pool == "ray":
        from codedinvnet.serving.workers.ray import RayPool

        pool = RayPool(spec, options.ray_address)
    elif options.pool == "local":
        pool = ProcessPool(spec)
    else:
        pool = own_pool(options.pool, spec)
    if options.faults is not None or options.demo:
        schedule = load_schedule(options.faults) if options.faults else Schedule()
        mixes = scheme is not None and not is_systematic(scheme.rules)
        if mixes and any(fault.per_request for fault in schedule.faults):
            raise UserError(
                f"--faults: {options.faults}: per_request hits a data task of a request, and a "
                "method without direct answers has none"
            )
        return FaultyPool(pool, schedule)
    return pool


def own_pool(text: str, spec: WorkerSpec) -> WorkerPool:
    """Return a user's own pool, of the class that FILE.py:CLASS or package.module:CLASS names.

    Raises:
        UserError: if there is no such class, or it lacks a method.
    """
    place, _, name = text.rpartition(":")
    if place.endswith(".py") and not Path(place).is_file():
        raise UserError(f"--pool: there is no file {place}")
    kind = getattr(import_user_module(place, f"--pool {text}"), name, None)
    if kind is None:
        raise UserError(f"--pool: {place} has no class {name}")
    lacking = [word for word in POOL_METHODS if not callable(getattr(kind, word, None))]
    if lacking:
        raise UserError(f"--pool: {name} of {place} lacks {', '.join(lacking)}")
    pool: WorkerPool = kind(spec)
    return pool


OFFERED = tuple(name for name, method in METHODS.items() if not method.is_policy)
"""The methods that a server is started with."""


def split_policy(options: ServeOptions) -> ServeOptions:
    """Return options whose policy names no method: `METHOD+hedge` is one of each.

    Raises:
        UserError: if there is no such policy, or the options name another method.
    """
    if options.policy is None or options.policy in POLICIES:
        return options
    try:
        served = served_as(options.policy)
    except UserError as error:
        raise options.refuse("policy", str(error)) from error
    if options.method not in (None, served.method):
        why = f"{options.method} is not that of --policy {options.policy}"
        raise options.refuse("method", why)
    return options.model_copy(update={"policy": served.policy, "method": served.method})


def check(options: ServeOptions) -> None:
    """Refuse what cannot work, before anything is loaded.

    Raises:
        UserError: naming the option.
    """
    options = split_policy(options)
    refuse, kind = options.refuse, options.model.kind
    method = _method(options)
    if ":" not in options.pool and options.pool not in ("local", "ray"):
        raise refuse("pool", f"{options.pool!r} is not local, ray or FILE.py:CLASS")
    if options.ray_address is not None and options.pool != "ray":
        raise refuse("ray_address", "goes with --pool ray")
    groups = method is not None or options.protection is not None
    if groups and (why := coded_too_late(options.group_timeout_ms, options.deadline_ms)):
        raise refuse("group_timeout_ms", why)
    check_device(options)
    if kind == "bundle":
        for name in ("weights", "scores", "inputs", "name", "protection"):
            if getattr(options, name):
                raise refuse(name, "is for a model of your own, not for a bundle")
    else:
        check_own_model(options, method)
    policy = POLICIES[options.policy_name]
    calibrated = kind == "bundle" or options.protection is not None
    for name, given in (
        ("max_disagreement", options.max_disagreement is not None),
        ("on_corruption", options.on_corruption == "replace"),
    ):
        if given and not (calibrated and policy.takes_code):
            raise refuse(name, "goes with a coded policy, and a calibrated bundle or a protection")
    hang = options.hang_timeout_ms
    if hang is not None and hang >= options.deadline_ms:
        why = f"hang-timeout-ms {hang:g} is not below --deadline-ms {options.deadline_ms:g}"
        log_event("queries on hung workers are not sent again", logging.WARNING, reason=why)


def check_device(options: ServeOptions) -> None:
    """Refuse a device that this machine does not have."""
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise options.refuse("device", str(error).splitlines()[0]) from error
    missing = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if missing and options.pool == "local":  # of Ray's nodes each says so itself
        raise options.refuse("device", f"this machine has no {options.device}")


def check_own_model(options: ServeOptions, method: Method | None) -> None:
    """Refuse options that do not go with a user's own model."""
    refuse = options.refuse
    if "/" in (options.name or ""):
        raise refuse("name", "must not have a slash, which no address in requests can have")
    if options.part is not None:
        raise refuse("part", "is for a bundle, not for a model of your own")
    if options.protection is not None and options.k is not None:
        raise refuse("k", "goes without --protection, which has its own")
    policy = POLICIES[options.policy_name]
    if options.protection is not None:
        if not policy.takes_code:
            raise refuse("protection", f"goes with a coded policy, not {options.policy}")
        return
    if policy.coded and method is None:
        raise refuse(
            "policy",
            f"{options.policy} needs a --method, such as {UNTRAINED[0]}, which needs no training, "
            "or a --protection",
        )
    if method is not None and not policy.takes_code:
        raise refuse("method", f"{method.name} goes with a coded policy, not {options.policy}")


def _method(options: ServeOptions) -> Method | None:
    """Return the method of the options; None for a model of a user's own without one."""
    name = options.method
    if name is None or options.protection is not None:
        if options.model.kind != "bundle":
            return None
        name = OURS
    try:
        method = find_method(name)
    except UserError as error:
        raise options.refuse("method", str(error)) from error
    if method.is_policy:
        raise options.refuse("method", f"{name!r} is not one of {', '.join(OFFERED)}")
    return method
