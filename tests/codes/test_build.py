from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.codes.method import given_by
from codedinvnet.codes.registry import METHODS
from codedinvnet.common.errors import UserError
from codedinvnet.data import SAMPLES, sample_images
from codedinvnet.evaluation.accuracy import evaluate
from codedinvnet.models.bundle import (
    Bundle,
    bundle_folder,
    load_bundle,
    shipped_bundles,
    weights_digest,
)
from codedinvnet.models.checkpoint import PART, module_tensors, save_checkpoint
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.opened import open_served
from codedinvnet.serving.workers.computing import BundleSpec, SchemeComputer

K = 4
WITH_PARTS = [name for name, method in METHODS.items() if method.part]


@pytest.fixture(scope="module")
def mnist() -> Bundle:
    return load_bundle("mnist")


def saved(path: Path, mnist: Bundle, name: str, **changed: Any) -> tuple[Path, torch.nn.Module]:
    """Write a part as `bench accuracy` does, with weights that are not the initial ones."""
    made_with = {
        "method": name,
        "base": "invertible",
        "k": K,
        "bundle": weights_digest("mnist"),
        "width": 5,
        "encoder": {"kind": "lean", "width": 4},
        **METHODS[name].identity(),
        **changed,
    }
    part = METHODS[name].untrained(given_by(mnist, K), made_with)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    save_checkpoint(path, module_tensors({PART: part}), {"settings": made_with})
    return path, part


def spec_of(options: ServeOptions) -> BundleSpec:
    spec = open_served(options).spec
    assert isinstance(spec, BundleSpec)
    return spec


def loaded(spec: BundleSpec) -> Scheme:
    computer = spec.load()
    assert isinstance(computer, SchemeComputer)
    return computer.scheme


@pytest.mark.parametrize("name", WITH_PARTS)
def test_a_part_comes_back_as_a_method_also_in_a_worker(
    name: str, mnist: Bundle, tmp_path: Path
) -> None:
    path, part = saved(tmp_path / "best.safetensors", mnist, name)
    method = scheme_for(mnist, K, name, path)
    assert method.name == name
    group = torch.rand(2, K, 1, 28, 28)
    offline = METHODS[name].build(given_by(mnist, K, part=part.eval()))
    expected = offline.compute(K, group).output
    torch.testing.assert_close(method.compute(K, group).output, expected)
    spec = spec_of(ServeOptions(source="mnist", k=K, method=name, part=path))
    torch.testing.assert_close(loaded(spec).compute(K, group).output, expected)
    with pytest.raises(UserError, match="the front end has 123: restart the service"):
        replace(spec, part_weights="123").load()
    assert not any(p.requires_grad for p in mnist.model.parameters())


def test_a_part_beside_the_bundle_is_taken_where_none_is_named(
    mnist: Bundle, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle_folder("mnist"), tmp_path / "mnist"))
    with pytest.raises(UserError, match=r"part: parm needs the part .* trained for k = 4"):
        scheme_for(load_bundle(folder), K, "parm")
    path, _ = saved(folder / f"parm-k{K}.safetensors", mnist, "parm")
    named, other = (scheme_for(load_bundle(folder), K, "parm", given) for given in (None, path))
    group = torch.rand(2, K, 1, 28, 28)
    torch.testing.assert_close(named.compute(K, group).output, other.compute(K, group).output)
    spec = spec_of(ServeOptions(source=str(folder), k=K, method="parm"))
    torch.testing.assert_close(
        loaded(spec).compute(K, group).output, other.compute(K, group).output
    )
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UserError, match="restart the service"):
        spec.load()
    saved(path, mnist, "parm", k=3)
    with pytest.raises(UserError, match="trained for k 3, not 4"):
        scheme_for(load_bundle(folder), K, "parm")


@pytest.mark.parametrize("name", shipped_bundles())
def test_a_small_backup_ships_with_every_bundle(name: str) -> None:
    bundle = load_bundle(name)
    method = scheme_for(bundle, 10, SmallBackup.name)
    if name in SAMPLES:
        found = evaluate(method, sample_images(name), k=10, groupings=1, progress=False)
        assert found.recovered_accuracy > 0.9


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"k": 3}, "trained for k 3, not 4"),
        ({"base": "resnet"}, "trained for base 'resnet', not 'invertible'"),
        ({"bundle": "other"}, "trained for bundle 'other'"),
        ({"method": "parm-2"}, "trained for method 'parm-2', not 'parm'"),
        ({"version": 2}, "trained for version 2, not 1"),
        ({"digest": "0af1"}, "trained for digest '0af1', not None"),
    ],
)
def test_parts_of_something_else_are_refused(
    changed: dict[str, Any], told: str, mnist: Bundle, tmp_path: Path
) -> None:
    path, _ = saved(tmp_path / "best.safetensors", mnist, "parm", **changed)
    with pytest.raises(UserError, match=told):
        scheme_for(mnist, K, "parm", path)
