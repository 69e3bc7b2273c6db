"""The Makefile's benchmarks: their command lines parse, and name files that are there."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from codedinvnet.cli.command_line import build_parser

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ("accuracy", "latency", "serve", "inverse", "embed", "train", "ablation", "map")


pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def commands(target: str) -> str:
    """Return what `make` would do."""
    # `make test` runs this, and what it has in the environment would make this one talk.
    environment = {key: os.environ[key] for key in os.environ if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-n", target],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.replace("\\\n", " ")


def test_the_quick_benchmarks_start_from_nothing() -> None:
    """And the whole ones do not."""
    lines = commands("bench-quick").splitlines()
    deleted = lines.index("rm -rf results/quick runs/quick")
    first = next(i for i, line in enumerate(lines) if "codedinvnet bench" in line)
    assert deleted < first
    for line in lines[first:]:
        words = shlex.split(line)
        for option in ("--out", "--save-dir"):
            if option in words:
                written = words[words.index(option) + 1]
                assert written.startswith(("results/quick/", "runs/quick"))
    assert "rm -rf" not in commands("bench")


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize(
    ("kind", "folder"), [("quick", "results/quick"), ("bench", "docs/results")]
)
def test_a_benchmarks_command_parses(kind: str, folder: str, name: str) -> None:
    words = shlex.split(commands(f"{kind}-{name}"))
    assert words[0] == ".venv/bin/codedinvnet"
    arguments = build_parser().parse_args(words[1:])
    assert arguments.out.parent == Path(folder)  # quick figures never reach the committed ones
    assert getattr(arguments, "quick", kind == "quick") == (kind == "quick")
    for key in ("grid", "scenario"):
        if hasattr(arguments, key):
            assert (ROOT / getattr(arguments, key)).is_file()
