"""Opens what is served: the model, its code, and the pool of its workers."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.base import Scheme, blamed
from codedinvnet.codes.build import part_beside, scheme_for
from codedinvnet.codes.registry import METHODS, OURS, find_method
from codedinvnet.codes.rules import is_systematic
from codedinvnet.common.engines import PYTORCH
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import file_digest
from codedinvnet.common.processes import usable_processors
from codedinvnet.common.user_code import user_module
from codedinvnet.models.base import scores_tensor
from codedinvnet.models.bundle import bundle_folder, load_bundle, weights_digest
from codedinvnet.protect.calibration import (
    FILE,
    Calibration,
    calibration_of,
    protection_calibration,
)
from codedinvnet.protect.folder import description_digest
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.served import Classifier, OwnModel, Served
from codedinvnet.serving.workers.computing import BundleSpec, ModelSpec, SchemeComputer, WorkerSpec
from codedinvnet.serving.workers.faults import FaultyPool, Schedule, load_schedule
from codedinvnet.serving.workers.local import ProcessPool
from codedinvnet.serving.workers.pool import WorkerPool
from codedinvnet.serving.workers.result import Computer

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
        options.engine or PYTORCH,
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
    computer = spec.computer(model)
    scheme = computer.scheme
    assert scheme is not None
    if not is_systematic(scheme.rules):  # no answer has any other output
        signature = replace(signature, outputs=(scores_tensor(signature),))
    workers = len(scheme.rules.tasks(scheme.rules.k))
    calibration = None
    if options.protection is not None:
        needed = options.max_disagreement is not None
        calibration = protection_calibration(options.protection, needed)
    return Opened(OwnModel(name, signature), spec, scheme, computer, workers, calibration)


def called(source: str) -> str:
    """Return what a model of a user's own is called in requests: its file's or function's name."""
    _, colon, function = source.rpartition(":")
    word = function if colon and not Path(source).exists() else Path(source).stem
    return re.sub(r"[^\w.-]+", "-", word) or "model"


def make_pool(options: ServeOptions, spec: WorkerSpec) -> WorkerPool:
    """Return the pool of the options, not yet started.

    Raises:
        UserError: if it is a user's own, and there is none.
    """
    pool: WorkerPool
    if options.pool == "ray":
        from codedinvnet.serving.workers.ray import RayPool

        pool = RayPool(spec, options.ray_address)
    elif options.pool == "local":
        pool = ProcessPool(spec)
    else:
        pool = own_pool(options.pool, spec)
    if options.faults is not None or options.demo:
        return FaultyPool(pool, load_schedule(options.faults) if options.faults else Schedule())
    return pool


def own_pool(text: str, spec: WorkerSpec) -> WorkerPool:
    """Return a user's own pool, of the class that FILE.py:CLASS or package.module:CLASS names.

    Raises:
        UserError: if there is no such class, or it raises; its traceback is printed then.
    """
    place, _, name = text.rpartition(":")
    if place.endswith(".py") and not Path(place).is_file():
        raise UserError(f"--pool: there is no file {place}")
    with blamed(f"the pool {name}", place):
        kind = getattr(user_module(place), name, None)
        if kind is None:
            raise UserError(f"--pool: {place} has no class {name}")
        lacking = [word for word in POOL_METHODS if not callable(getattr(kind, word, None))]
        if lacking:
            raise UserError(f"--pool: {name} of {place} lacks {', '.join(lacking)}")
        pool: WorkerPool = kind(spec)
    return pool
