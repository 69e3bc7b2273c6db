"""A user's mistake is one line, and changes nothing, whatever the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.evaluation import stages
from codedinvnet.models.bundle import WEIGHTS
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
    "settings that are a list": (
        lambda s: train(s, s.listed, s.data),
        "the settings must be one JSON object",
    ),
    "empty data folder": (lambda s: train(s, s.config, s.bundle), "put one of these there"),
    "no settings": (lambda s: train(s, s.root / "no.json", s.data), "cannot read the settings"),
    "settings not JSON": (lambda s: train(s, s.bundle / WEIGHTS, s.data), "not text"),
    "unknown key": (
        lambda s: train(s, s.changed("training", "epoch", 3), s.data),
        "did you mean 'epochs'",
    ),
    "one member": (
        lambda s: train(s, s.changed("fusion", "members", 1), s.data),
        "fusion.members",
    ),
    "too many for validation": (
        lambda s: train(s, s.changed("data", "validation", 800), s.data),
        "cannot set 800 of 800 images aside",
    ),
    "size that no squeeze divides": (
        lambda s: train(s, s.changed("data", "padding", 1), s.data),
        "do not fit 1x30x30 inputs",
    ),
    "size that the encoder cannot halve": (
        lambda s: train(s, s.changed("data", "padding", 4), s.data),
        "the lean encoder needs sides divisible by 8, got 36x36",
    ),
    "fewer validation images than members": (
        lambda s: train(s, s.changed("data", "validation", 3), s.data),
        "groups of 4 cannot be drawn from 3 validation images",
    ),
    "reproduce for more than a mosaic's cells": (
        lambda s: stage(s, "reproduce", s.mosaic, "--k", "20", "--seed", "9"),
        "k = 20: fusion: a mosaic has at most 16 members",
    ),
    "reproduce for more than the validation images": (
        lambda s: stage(s, "reproduce", s.config, "--k", "101", "--seed", "9"),
        "groups of 101 cannot be drawn from 100 validation images",
    ),
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
    "invert another size": (
        lambda s: use(s, "invert", s.bundle, "--data-dir", s.large),
        "takes (1, 28, 28)",
    ),
    "k before the images": (
        lambda s: ["evaluate", s.bundle, "--k", "5", "--data-dir", s.data / "nowhere"],
        "groups of 2 to 4, got k = 5",
    ),
    "k = 1": (lambda s: use(s, "evaluate", s.bundle, "--k", "1"), "groups of 2 to 4, got k = 1"),
    "k = 5": (lambda s: use(s, "evaluate", s.bundle, "--k", "5"), "groups of 2 to 4, got k = 5"),
    "groups of one": (lambda s: stage(s, "reproduce", s.pixels, "--k", "1"), "at least 2, got 1"),
    "no groupings": (
        lambda s: use(s, "evaluate", s.bundle, "--k", "2", "--groupings", "0"),
        "groupings must be at least 1",
    ),
    "unknown bundle": (lambda s: use(s, "evaluate", "minst"), "no bundle 'minst'"),
    "info of no bundle": (lambda s: ["info", s.data], "neither a folder with bundle.json"),
    "truncated weights": (lambda s: use(s, "evaluate", s.cut, "--k", "2"), "truncated"),
    "info of no file": (lambda s: ["info", s.data / "a.onnx"], "there is no file"),
    "info of a bundle's scores": (lambda s: ["info", s.bundle, "--scores", "x"], "no output 'x'"),
    "info of truncated weights": (lambda s: ["info", s.cut, "--json"], "truncated"),
    "tolerance 0": (
        lambda s: use(s, "invert", s.bundle, "--tolerance", "0"),
        "tolerance must be finite and above 0, got 0.0",
    ),
    "tolerance without end": (
        lambda s: use(s, "invert", s.bundle, "--tolerance", "inf"),
        "tolerance must be finite and above 0, got inf",
    ),
    "tolerance that is no number": (
        lambda s: use(s, "invert", s.bundle, "--tolerance", "nan"),
        "tolerance must be finite and above 0, got nan",
    ),
    "negative limit": (lambda s: use(s, "invert", s.bundle, "--limit", "-1"), "limit"),
    "no device": (
        lambda s: use(s, "evaluate", s.bundle, "--device", "abacus"),
        "cannot use the device 'abacus'",
    ),
    "training on a device without values": (
        lambda s: [*train(s, s.config, s.data), "--device", "meta"],
        "cannot use the device 'meta'",
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
