"""A module's digest: another one if anything is that its answers depend on, the same otherwise."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codedinvnet.models.fingerprint import module_digest
from codedinvnet.user_code import user_module

FILE = """
from dataclasses import dataclass
import torch
from torch import nn
from scales_of_mine import scaled
from sizes_of_mine import SHIFT

@dataclass
class Sizes:
    width: int = 3

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.sizes, self.norm, self.names = Sizes(), nn.LayerNorm, {"a", "b", "c"}
        self.layer = nn.Linear(4, self.sizes.width)
    def forward(self, x):
        return scaled(self.layer(x / 255)) + SHIFT
"""
HELPER = "import os\nSCALE = 2\ndef scaled(x):\n    return x * SCALE\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net_of_mine.py").write_text(FILE)
    (tmp_path / "scales_of_mine.py").write_text(HELPER)
    (tmp_path / "sizes_of_mine.py").write_text("SHIFT = 0.5\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def net(folder: Path) -> Any:
    """Return a module of the user's file, read anew with what it imports."""
    sys.modules.pop("scales_of_mine", None)
    sys.modules.pop("sizes_of_mine", None)
    return user_module(str(folder / "net_of_mine.py")).Net()


def test_another_process_comes_to_the_same_digest(folder: Path) -> None:
    code = (
        "import sys; from codedinvnet.models.fingerprint import module_digest; "
        "from codedinvnet.user_code import user_module; "
        "print(module_digest(user_module(sys.argv[1]).Net()))"
    )
    found = {module_digest(net(folder))}
    for seed in ("1", "2"):
        words = [sys.executable, "-B", "-c", code, str(folder / "net_of_mine.py")]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        found.add(done.stdout.strip())
    assert len(found) == 1
    assert None not in found


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("net_of_mine.py", "/ 255", "/ 254"),
        ("scales_of_mine.py", "SCALE = 2", "SCALE = 2.01"),
        ("sizes_of_mine.py", "SHIFT = 0.5", "SHIFT = 0.501"),
    ],
)
def test_code_counts_also_where_it_is_imported(file: str, old: str, new: str, folder: Path) -> None:
    before = module_digest(net(folder))
    assert before == module_digest(net(folder))
    path = folder / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert module_digest(net(folder)) != before


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


def with_extra(value: Any) -> nn.Module:
    module = nn.Linear(2, 2)
    torch.nn.init.ones_(module.weight)
    torch.nn.init.ones_(module.bias)
    module.__dict__["extra"] = value
    return module


def replaced_forward(factor: float) -> nn.Module:
    module = with_extra(None)
    module.forward = types.MethodType(lambda self, x: x * self.factor, module)
    module.__dict__["factor"] = factor
    return module


def hooked(factor: float) -> nn.Module:
    module = with_extra(None)
    module._forward_hooks[0] = lambda *parts: parts[-1] * factor
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda one: with_extra(torch.tensor([0.5 if one else 0.502])),
        lambda one: with_extra([1, 2.0 if one else 2.5]),
        lambda one: with_extra({"scale": torch.ones(1) if one else torch.zeros(1)}),
        lambda one: with_extra([with_extra(1 if one else 2)]),
        lambda one: with_extra(torch.ones(2).numpy() * (1 if one else 2)),
        lambda one: with_extra(times(1 if one else 1.01)),
        lambda one: with_extra(functools.partial(times, 1 if one else 1.01)),
        lambda one: with_extra(torch.relu if one else torch.tanh),
        lambda one: with_extra(nn.ReLU if one else nn.Tanh),
        lambda one: with_extra(torch.ones(1, dtype=torch.bfloat16 if one else torch.float16)),
        lambda one: replaced_forward(1 if one else 2),
        lambda one: hooked(1 if one else 2),
    ],
)
def test_attributes_of_any_kind_count(make: Callable[[bool], nn.Module]) -> None:
    one, again, other = (module_digest(make(which)) for which in (True, True, False))
    assert one is not None
    assert one == again
    assert one != other


def test_a_cycle_of_attributes_ends() -> None:
    values: list[Any] = []
    values.append(values)
    assert module_digest(with_extra(values)) is not None


def test_what_has_no_digest() -> None:
    class Local(nn.Module):
        pass

    text_function = eval("lambda x: x * 2")
    for module in (Local(), with_extra(threading.Lock()), with_extra(text_function)):
        assert module_digest(module) is None
