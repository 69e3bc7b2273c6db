"""A user's mistake is one line, and changes nothing, whatever the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.evaluation import stages
from tests.cli.scene import Scene, check_refusal
from tests.conftest import Command, digests

Words = Callable[[Scene], list[Any]]


def train(s: Scene, config: Path, data: Path) -> list[Any]:
    return ["reproduce", config, "--data-dir", data, "--save-dir", s.runs, "--seed", "9"]


def stage(s: Scene, name: str, config: Path, *more: Any) -> list[Any]:
    return [name, config, "--data-dir", s.data, "--save-dir", s.runs, *more]


def use(s: Scene, name: str, bundle: Any, *more: Any) -> list[Any]:
    return [name, bundle, "--data-dir", s.data, *more]


BAD: dict[str, tuple[Words, str]] = {
    "no data folder": (lambda s: train(s, s.config, s.root / "no"), "does not exist"),
    "runs below a file": (
        lambda s: ["reproduce", s.config, "--data-dir", s.data, "--save-dir", s.config / "runs"],
        "--save-dir: cannot write into ",
    ),
    "no settings": (lambda s: train(s, s.root / "no.json", s.data), "cannot read the settings"),
    "reproduce for more than the test images": (
        lambda s: stage(s, "reproduce", s.config, "--k", "201", "--seed", "9"),
        "groups of 201 cannot be drawn from 200 test images",
    ),
    "reproduce without test images": (
        lambda s: stage(s, "reproduce", s.config, "--seed", "9", "--data-dir", s.untested),
        "holds no test images",
    ),
    "image of another size": (
        lambda s: use(s, "evaluate", s.bundle, "--k", "2", "--data-dir", s.large),
        "takes (1, 28, 28)",
    ),
    "k before the images": (
        lambda s: ["evaluate", s.bundle, "--k", "5", "--data-dir", s.data / "nowhere"],
        "groups of 2 to 4, got k = 5",
    ),
    "unknown bundle": (lambda s: use(s, "evaluate", "minst"), "no bundle 'minst'"),
    "truncated weights": (lambda s: use(s, "evaluate", s.cut, "--k", "2"), "truncated"),
    "tolerance 0": (
        lambda s: use(s, "invert", s.bundle, "--tolerance", "0"),
        "tolerance must be finite and above 0, got 0.0",
    ),
    "negative limit": (lambda s: use(s, "invert", s.bundle, "--limit", "-1"), "limit"),
    "no device": (
        lambda s: use(s, "evaluate", s.bundle, "--device", "abacus"),
        "cannot use the device 'abacus'",
    ),
    "device without values": (
        lambda s: ["info", s.bundle, "--device", "meta"],
        "cannot use the device 'meta'",
    ),
    "resume with other settings": (
        lambda s: stage(s, "reproduce", s.changed("training", "weight_decay", 0.5)),
        "training.weight_decay 0.0005 -> 0.5",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str, recovery_run: stages.Run, data_dir: Path, tmp_path: Path, call: Command
) -> None:
    words, said = BAD[case]
    scene = Scene(tmp_path, data_dir, recovery_run)
    command = words(scene)
    before = digests(tmp_path, data_dir)
    outcome = call(*command)
    check_refusal(outcome.code, outcome.out, outcome.err, said)
    assert digests(tmp_path, data_dir) == before
