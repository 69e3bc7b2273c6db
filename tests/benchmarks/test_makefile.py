"""The Makefile's benchmarks: their command lines parse, and name files that are there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import command_line
from benchmarks.bundles import BUNDLES
from codedinvnet.cli.command_line import build_parser
from codedinvnet.common.config import load_settings

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = re.findall("^BENCHMARKS := (.+)$", (ROOT / "Makefile").read_text(), re.M)[0].split()

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


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize(
    ("kind", "folder"), [("quick", "results/quick"), ("bench", "docs/results")]
)
def test_a_benchmarks_command_parses(kind: str, folder: str, name: str) -> None:
    words = shlex.split(commands(f"{kind}-{name}").splitlines()[-1])  # behind the set-up
    if words[0] == ".venv/bin/python":
        assert words[1:3] == ["-m", "benchmarks"]
        arguments = command_line.build_parser().parse_args(words[3:])
    else:
        assert words[0] == ".venv/bin/codedinvnet"
        arguments = build_parser().parse_args(words[1:])
    assert arguments.out.parent == Path(folder)  # quick figures never reach the committed ones
    shortened = "--queries" if "validation" in words else "--quick"
    assert (shortened in words) == (kind == "quick")
    for key in ("grid", "scenario"):
        if getattr(arguments, key, None):
            assert (ROOT / getattr(arguments, key)).is_file()


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A repository without results."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "docs" / "results").mkdir(parents=True)
    return tmp_path


def results(target: str, folder: Path) -> dict[str, list[str]]:
    """Return for each file that `make` would bring into docs/results the command for it."""
    found: dict[str, list[str]] = {}
    before: list[str] = []
    for line in commands(target, folder).splitlines():
        words = shlex.split(line)
        if words[0] == "mv":
            source, name = words[1:]
            assert before[-2:] == [">", source]  # what is cut off is not brought there
            assert name.startswith("docs/results/")
            found[Path(name).name] = before[1:-2]
        if words[1:5] == ["-m", "benchmarks", "figures", "--measure"]:
            found[f"{words[-1]}.json"] = words[5:-1]
        before = words
    return found


@pytest.mark.parametrize("data", [None, Path("data")])
def test_each_bundle_is_trained_from_another_seed(data: Path | None, bare: Path) -> None:
    if data is not None:
        (bare / data).mkdir()
    found = results("bench-seeds", bare)
    assert set(found) == {f"seed-{name}.json" for name in BUNDLES}
    for name in BUNDLES:
        arguments = build_parser().parse_args(found[f"seed-{name}.json"])
        settings = load_settings(ROOT / arguments.config)
        assert settings == load_settings(ROOT / "configs" / f"{name}-recovery.json")
        assert arguments.seed != settings.seed
        assert (arguments.data_dir, arguments.json) == (data, True)
