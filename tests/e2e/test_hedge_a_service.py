"""The tutorial on hedging, with its toy servers: stalls of one server leave the tail."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.processes import Running, running
from codedinvnet.net.listening import free_port

TOY = str(Path(__file__).resolve().parents[2] / "examples" / "toy_server.py")
PERCENTILES = r"(\d+) answers, (\d+) wrong: p50 (\d+) ms, p90 (\d+) ms, p99 (\d+) ms"


def output(*words: str) -> str:
    return subprocess.run(
        [sys.executable, *words], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def ask(gateway: Running) -> tuple[int, int, int]:
    """Return the answers, the wrong ones among them, and the 99th percentile in ms."""
    told = output(TOY, "ask", f"{gateway.address}/predict", "--requests", "1600")
    found = re.search(PERCENTILES, told)
    assert found is not None, told
    return int(found[1]), int(found[2]), int(found[5])


def test_the_tutorial_shortens_the_tail() -> None:
    with ExitStack() as stack:
        upstreams = []
        for stall in (("--stall", "0.06"), ()):
            serve = (sys.executable, TOY, "serve", "--port", str(free_port()), *stall)
            toy = stack.enter_context(running(*serve, ready=r"(http://\S+)"))
            upstreams.append(f"--upstream={toy.address}")
        words = ("-m", "codedinvnet", "gateway", *upstreams, "--route", "POST /predict hedge=on")
        gateway = stack.enter_context(running(sys.executable, *words, "--port", "0"))
        policy = ("-m", "codedinvnet", "policy", f"{gateway.address}/codedinvnet")
        output(*policy, "uncoded")
        before = ask(gateway)
        output(*policy, "hedge")
        assert "* hedge" in output(*policy).splitlines()
        wrong = (sys.executable, *policy[:-1], gateway.address)  # which upstreams answer
        assert subprocess.run(wrong, capture_output=True, timeout=60).returncode == 2
        after = ask(gateway)
    assert before[:2] == after[:2] == (1600, 0)
    assert before[2] > 400
    assert after[2] < 0.5 * before[2]
