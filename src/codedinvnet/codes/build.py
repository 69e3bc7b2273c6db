"""Methods made for a bundle, with their trained parts from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.method import Method, given_by, given_of
from codedinvnet.codes.registry import OURS, find_method
from codedinvnet.common.devices import first_tensor
from codedinvnet.common.errors import UserError
from codedinvnet.models.bundle import Bundle
from codedinvnet.models.checkpoint import PART, load_checkpoint, load_modules
from codedinvnet.models.coded import CodedModel


def part_beside(folder: Path, method: Method, k: int) -> Path | None:
    """Return the part that lies next to a bundle's weights, `NAME-kK.safetensors`; None without."""
    path = folder / f"{method.name}-k{k}.safetensors"
    return path if method.part and path.is_file() else None


def scheme_for(
    bundle: Bundle | CodedModel,
    k: int,
    method: str = OURS,
    part: Path | None = None,
) -> Scheme:
    """Return a method's scheme for a bundle, with the part in a checkpoint if it needs one.

    Args:
        bundle: the bundle, or the model, that it is made around.
        k: members of a group.
        method: its name, as `find_method` takes it.
        part: what `bench accuracy` left, `best.safetensors` in the part's folder; None: the one
            in the bundle's folder, if there is one.

    Raises:
        UserError: if the part is missing, not needed, or was trained for something else.
    """
    own = find_method(method)
    given = given_of(bundle, k) if isinstance(bundle, CodedModel) else given_by(bundle, k)
    if not own.part:
        if part is not None:
            raise UserError(f"part: {own.name} needs no trained part")
        return own.build(given)
    if isinstance(bundle, CodedModel):
        raise UserError(f"{own.name} needs a trained part: codedinvnet.fit trains one")
    part = part or part_beside(bundle.folder, own, k)
    if part is None:
        raise UserError(
            f"part: {own.name} needs the part that `codedinvnet bench accuracy` trained for k = {k}"
        )
    own.check(k, bundle.info.input.shape, bundle.info)
    tensors, header = load_checkpoint(part)
    made_with = header.get("settings", {})
    wanted = {"method": own.name, "base": "invertible", "k": k, "bundle": bundle.digest()}
    wanted |= {"version": 1, "digest": None, **own.identity()}
    for key, value in wanted.items():
        found = made_with.get(key, 1 if key == "version" else None)
        if found != value:
            raise UserError(f"part: {part} was trained for {key} {found!r}, not {value!r}")
    module = own.untrained(given, made_with)
    load_modules({PART: module}, tensors, part)
    device = first_tensor(bundle.model).device
    module = module.to(device).eval().requires_grad_(False)
    return own.build(replace(given, part=module))
