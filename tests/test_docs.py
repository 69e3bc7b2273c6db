"""The documents' site is built: every page is reached, and every link leads somewhere."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """All but the writing of its pages, which takes as long again."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "dummy"]
    built = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr


def test_the_page_of_metrics_has_labels_and_whole_rows() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "conf.py"))["metrics"]()
    rows = [
        re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("|")
    ]
    assert {len(row) for row in rows} == {4}
    labels = {row[0].strip(): row[2].strip() for row in rows}
    assert labels["`codedinvnet_queries_total`"] == "`outcome`"
    assert labels["`codedinvnet_gateway_hedges_total`"] == "`route`, `result`"
    assert labels["`codedinvnet_pending_queries`"] == ""
    assert "`codedinvnet_queries_total`" not in page.split("## A gateway")[1]
