"""What README shows first: two toy servers of which one stalls, without hedging and with it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TOY = str(Path(__file__).resolve().parents[2] / "examples" / "toy_server.py")
LINE = r"(with\w*) hedging: (\d+) answers, (\d+) wrong: p50 \d+ ms, p90 \d+ ms, p99 (\d+) ms"


def test_hedging_shortens_the_tail_of_two_toy_servers() -> None:
    told = subprocess.run(
        [sys.executable, TOY, "compare", "--requests", "800"],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = {
        name: (int(n), int(wrong), int(p99))
        for name, n, wrong, p99 in re.findall(LINE, told.stdout)
    }
    assert found["without"][:2] == found["with"][:2] == (800, 0)
    assert found["with"][2] < 0.5 * found["without"][2]
