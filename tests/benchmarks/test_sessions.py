"""The benchmark of sessions: what clients ask, and a short run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import sessions
from benchmarks.prompts import WORKLOADS, Turn, message
from benchmarks.sessions import run
from codedinvnet.common.errors import UserError
from codedinvnet.common.grid import read_rows


@pytest.mark.parametrize("workload", WORKLOADS)
def test_what_is_asked_is_given_by_the_seed(workload: str) -> None:
    found = WORKLOADS[workload](1)
    assert found == WORKLOADS[workload](1)
    assert found != WORKLOADS[workload](2)


def test_the_trace_shares_what_the_public_one_does() -> None:
    """Of the whole trace 37 % of the blocks are known; a prompt has 12,035 tokens."""
    chains = sorted(WORKLOADS["trace"](1), key=lambda chain: chain[0].pause)
    prompts = [chain[0].messages[0]["content"] for chain in chains]
    seen, known = set[str](), 0
    for prompt in prompts:
        blocks = [prompt[:end] for end in range(512, len(prompt) + 1, 512)]
        known += sum(block in seen for block in blocks)
        seen.update(blocks)
    size = sum(map(len, prompts))
    assert 0.3 < 512 * known / size < 0.45
    assert size / len(prompts) == pytest.approx(12_035, rel=0.1)


@pytest.mark.parametrize("fault", ["restarted", pytest.param("slow", marks=pytest.mark.nightly)])
def test_a_short_run(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [message("user", "x" * 5000)]
    chains = [[Turn(0.1, f"s{n}", asked), Turn(0.1, f"s{n}", asked)] for n in range(3)]
    monkeypatch.setattr(sessions, "WORKLOADS", {"few": lambda seed: chains})
    monkeypatch.setattr(sessions, "DOWN", 0.1)
    out = tmp_path / "rows.jsonl"
    only, peer = [f"fault={fault}"], ["gateway-header"]
    found = run(quick=False, peer=peer, only=only, seeds=1, out=out)
    assert "x-session" in found["table"]
    (row,) = read_rows(out, "sessions")
    assert (row["requests"], row["errors"]) == (6, 0)
    assert 0.1 < row["prefill"] < 1.0, "by what was computed, not by how slowly"
    assert run(quick=False, peer=peer, only=only, seeds=1, out=out) == found
    assert len(read_rows(out, "sessions")) == 1, "what is measured is kept"


def test_a_contender_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="haproxy-hash"):
        run(quick=False, peer=["nginx"], only=[], seeds=1, out=tmp_path / "rows.jsonl")
