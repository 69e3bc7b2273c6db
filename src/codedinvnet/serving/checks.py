"""Refuses options of `codedinvnet serve` that cannot work, before anything is loaded."""

from __future__ import annotations

import logging

import torch

from codedinvnet.codes.method import Method
from codedinvnet.codes.named_policies import served_as
from codedinvnet.codes.registry import METHODS, OURS, UNTRAINED, find_method
from codedinvnet.common.engines import ONNX_RUNTIME, PYTORCH, check_engine, check_installed
from codedinvnet.common.errors import UserError
from codedinvnet.net.logs import log_event
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.settings import coded_too_late
from codedinvnet.serving.config import ServeOptions

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
    if kind == "upstream":
        why = "is served already: codedinvnet gateway stands in front of it"
        raise UserError(f"{options.source} {why}")
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
    """Refuse a device or an engine that this machine does not have."""
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise options.refuse("device", str(error).splitlines()[0]) from error
    usual = ONNX_RUNTIME if options.model.kind == "onnx" else PYTORCH
    check_engine(options.engine or usual, options.device)
    if options.pool == "local":  # of Ray's nodes each says so itself
        check_installed(options.engine or PYTORCH)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
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
