"""`.ci/run`: red when a test fails twice, green when all pass."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")

MAKEFILE = """\
setup triton mlserver:
\t@true
lint:
\t@exit {lint}
test:
\t@exit {test}
"""


def run_ci(folder: Path, test: int, lint: int, again: int) -> tuple[int, list[str]]:
    """Run a copy of `.ci/run` whose steps exit as told; return its status and what ran again."""
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    (folder / "Makefile").write_text(MAKEFILE.format(test=test, lint=lint))
    programs = {
        "programs/chromium": "exit 0",  # else it would be installed
        "programs/promtool": "exit 0",
        "programs/kustomize": "exit 0",
        ".venv/bin/pytest": f'echo "$@" >> runs; exit {again}',
    }
    for name, script in programs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    environment = {key: os.environ[key] for key in os.environ if not key.startswith("MAKE")}
    environment["PATH"] = f"{folder / 'programs'}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", ".ci/run"], cwd=folder, env=environment, capture_output=True, timeout=60
    )
    runs = folder / "runs"
    return done.returncode, runs.read_text().splitlines() if runs.exists() else []


def test_it_is_green_when_all_pass(tmp_path: Path) -> None:
    assert run_ci(tmp_path, test=0, lint=0, again=1) == (0, [])


def test_it_is_red_when_a_test_fails_twice(tmp_path: Path) -> None:
    status, runs = run_ci(tmp_path, test=1, lint=0, again=1)
    assert status != 0
    assert len(runs) == 1


def test_it_is_green_when_what_failed_passes_alone(tmp_path: Path) -> None:
    status, runs = run_ci(tmp_path, test=1, lint=0, again=0)
    assert status == 0
    assert "--last-failed" in runs[0]


def test_it_is_red_when_the_style_is_wrong_whatever_the_tests_say(tmp_path: Path) -> None:
    status, _ = run_ci(tmp_path, test=1, lint=1, again=0)
    assert status != 0
