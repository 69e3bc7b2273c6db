"""The Makefile's benchmarks: their command lines parse, and name files that are there."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import command_line
from benchmarks.bundles import BUNDLES
from codedinvnet.cli.command_line import build_parser

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "docs/results"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def commands(target: str, folder: Path = ROOT) -> str:
    """Return what `make` would do in a folder."""
    # `make test` runs this, and what it has in the environment would make this one talk.
    environment = {key: os.environ[key] for key in os.environ if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-n", target],
        cwd=folder,
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
    first = next(i for i, line in enumerate(lines) if "--out" in line)
    assert deleted < first
    for line in lines[first:]:
        words = shlex.split(line)
        for option in ("--out", "--save-dir"):
            if option in words:
                written = words[words.index(option) + 1]
                assert written.startswith(("results/quick/", "runs/quick"))
    assert "rm -rf" not in commands("bench")


@pytest.mark.parametrize("target", ["quick", "bench", "bench-bundles"])
def test_the_commands_of_a_target_parse(target: str, tmp_path: Path) -> None:
    """In a repository without results, so that nothing is left out."""
    (tmp_path / "docs" / "results").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    seen = 0
    for line in commands("bench-quick" if target == "quick" else target, tmp_path).splitlines():
        words = shlex.split(line)
        if words[0] == ".venv/bin/python" and words[1:3] == ["-m", "benchmarks"]:
            arguments = command_line.build_parser().parse_args(words[3:])
        elif words[0] == ".venv/bin/codedinvnet":
            arguments = build_parser().parse_args(words[1:])
        else:
            continue
        seen += 1
        given = vars(arguments)
        for key in ("config", "grid", "scenario", "sweep"):
            assert not given.get(key) or (ROOT / given[key]).is_file()
        if given.get("out") and target in ("quick", "bench"):
            assert arguments.out.parent == Path("results/quick" if target == "quick" else RESULTS)
            assert ("--quick" in words) == (target == "quick")  # never into the committed ones
    assert seen >= len(BUNDLES)
