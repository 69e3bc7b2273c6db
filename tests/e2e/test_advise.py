"""Advice for a real service, and the switch that it names, as users run them."""

from __future__ import annotations

import asyncio
import http.server
import json
import socketserver
import threading
from pathlib import Path

from codedinvnet.data import sample_images
from codedinvnet.evaluation.client import connect
from tests.conftest import Command
from tests.processes import served

REQUESTS, TOGETHER = 210, 6
"""Some more than advice needs, and so many at once."""
FAULTS = {
    "faults": [
        {"kind": "slow", "delay": {"ms": 10}},
        {"kind": "slow", "worker": 0, "delay": {"ms": 150}},
    ]
}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Another program's server, which logs nothing."""

    def log_message(self, *_: object) -> None:
        pass


def load(address: str, requests: int = REQUESTS) -> int:
    """Send requests; return how many were answered."""
    images = sample_images("mnist").images.numpy()

    async def run() -> int:
        answered = 0
        async with connect(address, "mnist", images) as client:
            for start in range(0, requests, TOGETHER):
                calls = (client.infer(str(i), [i]) for i in range(start, start + TOGETHER))
                answered += sum(reply.ok for reply in await asyncio.gather(*calls))
        return answered

    return asyncio.run(run())


def test_what_a_service_is_advised_and_goes_over_to(tmp_path: Path, call: Command) -> None:
    faults = tmp_path / "faults.json"
    faults.write_text(json.dumps(FAULTS))
    options = ("--policy", "uncoded", "--k", "4", "--workers", "5", "--faults", str(faults))
    times = ("--deadline-ms", "60000", "--hang-timeout-ms", "30000")
    with served("mnist", *options, *times, log=tmp_path / "log") as process:
        address = process.address
        few = call("advise", address)
        assert (few.code, few.out) == (2, "")
        assert "requests are too few" in few.err
        assert "Traceback" not in few.err
        assert load(address) == REQUESTS

        found = call("advise", address, "--queries", "2000", "--json")
        assert found.code == 0, found.err
        report = json.loads(found.out)
        rows = {row["policy"]: row for row in report["simulated"]}
        assert {"uncoded", "hedge", "coded", "coded+hedge"} <= set(rows)
        assert report["measured"]["requests"] == REQUESTS
        assert report["stragglers"] != []
        assert report["right_by"] == "labels"
        assert rows["uncoded"]["right"] > 0.98
        assert rows["uncoded"]["work"] < rows["coded"]["work"]

        told = call("advise", address, "--queries", "2000")
        assert "measured now" in told.out
        switched = call("policy", address, "coded+hedge")
        assert switched.out == "policy coded+hedge, before uncoded\n"
        assert load(address, 30) == 30
        offered = call("policy", address).out
        assert "* coded+hedge" in offered
        assert "method: coded-invnet" in offered
        assert "'quick'" in call("policy", address, "quick").err


def test_who_cannot_advise(call: Command) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), Quiet) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        port = other.server_address[1]
        strange = call("advise", f"http://127.0.0.1:{port}")
        other.shutdown()
    nobody = call("advise", f"http://127.0.0.1:{port}")
    wrong = call("advise", "127.0.0.1:8000")
    for found, words in (
        (strange, "not a service of codedinvnet"),
        (nobody, "no service answers"),
        (wrong, "http://"),
    ):
        assert (found.code, found.out) == (2, "")
        (line,) = found.err.splitlines()
        assert words in line
