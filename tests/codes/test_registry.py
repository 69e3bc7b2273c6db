"""Methods by name, and one of a user's own file in all that the records drive."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codedinvnet.codes import registry
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.plain import CopyCode
from codedinvnet.codes.registry import find_method, known_method
from codedinvnet.codes.rules import SERVED, Uncoded
from codedinvnet.common.errors import UserError
from codedinvnet.common.grid import read_rows
from codedinvnet.evaluation.tables import accuracy_frame
from tests.codes.linear import SHAPE, Linear, assert_answers, images, made, outputs_of, without
from tests.conftest import Command
from tests.evaluation import canned
from tests.evaluation.grids import write_grid

ROOT = Path(__file__).resolve().parents[2]
MINE = f"{ROOT / 'examples' / 'my_method.py'}:TwoParities"
K = 4


@pytest.mark.parametrize("size", [2, 3, K])
def test_the_example_solves_for_any_two_of_a_linear_model(size: int) -> None:
    method = made(type(find_method(MINE)), Linear(), K)
    group = images(size)
    outputs = outputs_of(method, group)
    for count in range(3):
        for lost in combinations(outputs, count):
            rest = without(outputs, *lost)
            assert_answers(method.decode(rest, size), Linear(), group, set(range(size)))


TRAINED = """
from codedinvnet.codes.backup import SmallBackup
class Mine(SmallBackup):
    name = "mine"
    def loss(self, part, batch):
        return super().loss(part, batch)  # {}
"""


def test_two_methods_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are told apart by names: one of them would be taken for the other, and not measured."""
    text = Path(MINE.removesuffix(":TwoParities")).read_text()
    first, second = (tmp_path / f"v{number}.py" for number in (1, 2))
    first.write_text(f"{text}\n\nclass Heir(TwoParities):\n    pass\n")
    second.write_text(f"{text}# another\n")
    assert find_method(f"{first}:TwoParities") is find_method("two-parities")
    for other in (f"{second}:TwoParities", f"{first}:Heir"):
        told = r"its name is 'two-parities', as that of .* in .*v1\.py"
        with pytest.raises(UserError, match=told):
            find_method(other)
    monkeypatch.chdir(tmp_path)  # one file by another path is no other method
    assert find_method("v1.py:TwoParities").digest == find_method("two-parities").digest


def test_the_part_of_a_method_whose_file_changed_is_trained_anew(
    bundle_folder: Path,
    data_dir: Path,
    tmp_path: Path,
    call: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file says how it is trained: weights of the old one are not those of the new one."""
    grid = write_grid(tmp_path / "grid.json", bundle_folder, [{"methods": ["none"]}])
    out = tmp_path / "rows.jsonl"
    words: tuple[Any, ...] = ("bench", "accuracy", grid, "--data-dir", data_dir, "--out", out)
    words += ("--save-dir", tmp_path / "runs", "--json")
    folder = tmp_path / "runs" / "bench" / "tiny" / "mnist" / "mine-of-invertible-k4"
    for state, trained in (("first", 1), ("second", 2), ("second", 2)):
        monkeypatch.setattr(registry, "_found", {})  # each is a process of its own
        path = tmp_path / state / "mine.py"  # a process reads a file once
        path.parent.mkdir(exist_ok=True)
        path.write_text(TRAINED.replace("{}", state))
        assert call(*words, "--method", f"{path}:Mine").code == 0
        assert [row["error"] for row in read_rows(out)] == [None] * trained
        assert (folder / "seed1" / "checkpoints-before-1").is_dir() == (trained == 2)


BROKEN = """
from codedinvnet.codes.method import Method
from codedinvnet.codes.plain import Plain
class Good(Plain):
    name = "good"
class Taken(Plain):
    name = "none"
class Nameless:
    pass
class Bare(Method):
    part = "backup"
class Half(Plain):
    name, part = "half", "backup"
    def loss(self, part, batch):
        raise AssertionError
"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("parm-magic", "'parm-magic' is not one of coded-invnet, small-backup.*FILE.py:CLASS"),
        ("nowhere.py:Mine", "there is no file nowhere.py with a method Mine"),
        ("/home/u@x/mine.py", "'/home/u@x/mine.py' is not one of"),
        ("small-backup@1.4", "'small-backup@1.4' is not one of"),
        ("{}:Missing", "mine.py has no subclass Missing of Method"),
        ("{}:Nameless", "mine.py has no subclass Nameless of Method"),
        ("{}:Bare", "mine.py: Bare lacks decode, encode, loss, name, untrained"),
        ("{}:Half", "mine.py: Half lacks untrained"),
        ("{}:Taken", "this package has a method 'none': choose another name"),
    ],
)
def test_what_is_no_method_is_told_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(BROKEN)
    with pytest.raises(UserError, match=told) as caught:
        find_method(text.format(path))
    assert "\n" not in str(caught.value)


def test_a_row_runs_no_file_that_it_names(tmp_path: Path) -> None:
    path, ran = tmp_path / "named.py", tmp_path / "ran"
    path.write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n{BROKEN}")
    text = f"{path}:Good"
    rows = [canned.row(text, 0.9)]
    assert list(accuracy_frame(rows)["method"]) == [text]
    assert known_method(text) is None
    assert not ran.exists()
    find_method(f"{path}:Good")
    assert ran.exists()


class Misshapen(CopyCode):
    """Answers member 0 with the shape that it was given."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(Uncoded(2))
        self.answer = torch.zeros(shape)

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        return {0: self.answer}


@pytest.mark.parametrize("shape", [(1, 3), (3,), (5, 1), (5, 3, 1), (5, 3)])
def test_answers_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    """One row for five groups would count for all of them."""
    scheme = Scheme("odd", Misshapen(shape), {SERVED: Linear()}, SHAPE, classes=3)
    outputs = {0: torch.zeros(5, 3)}
    if shape == (5, 3):
        assert scheme.decode(outputs, 2)[0].shape == shape
        return
    with pytest.raises(ValueError, match=rf"odd: .* {re.escape(str(shape))}, not \(5, 3\)$"):
        scheme.decode(outputs, 2)


def test_a_file_that_fails_ends_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("class Mine(\n")
    with pytest.raises(UserError, match=r"broken\.py:Mine: SyntaxError"):
        find_method(f"{path}:Mine")
