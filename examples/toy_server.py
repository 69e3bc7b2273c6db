"""A toy prediction server that sometimes stalls, and a client that measures its latency.

    python examples/toy_server.py serve --port 8001 --stall 0.05
    python examples/toy_server.py ask http://127.0.0.1:8001/predict
    python examples/toy_server.py compare

The first two need nothing but Python. The server answers POST /predict with the square of a number
after ten milliseconds; with --stall, it takes half a second for a share of the requests. The client
sends requests from eight connections, checks the answers, and prints percentiles. `compare` starts
two servers of which one stalls and a gateway, and asks them without hedging and with it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVICE, STALL = 0.010, 0.5
"""Seconds of a request, and of one that stalls."""


def serve(host: str, port: int, stall: float) -> None:
    """Serve until interrupted."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body leave together

        def do_GET(self) -> None:
            self._answer({"status": "ok"})

        def do_POST(self) -> None:
            number = json.loads(self.rfile.read(int(self.headers["content-length"])))["number"]
            time.sleep(STALL if random.random() < stall else SERVICE)
            self._answer({"square": number * number})

        def _answer(self, answer: object) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer((host, port), Handler)
    print(f"serving on http://{host}:{server.server_port}", flush=True)
    server.serve_forever()


def ask(url: str, requests: int) -> None:
    """Send requests from eight connections, and print how long they took."""
    found, times, errors = urlsplit(url), list[float](), list[str]()

    def work() -> None:
        connection = http.client.HTTPConnection(found.hostname or "", found.port, timeout=10)
        for number in range(requests // 8):
            body, began = json.dumps({"number": number}), time.perf_counter()
            connection.request("POST", found.path, body, {"content-type": "application/json"})
            reply = connection.getresponse()
            answer = json.loads(reply.read())
            times.append(1000 * (time.perf_counter() - began))
            if reply.status != 200 or answer != {"square": number * number}:
                errors.append(f"{reply.status}: {answer}")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times.sort()
    told = [f"p{p:g} {times[int(len(times) * p / 100)]:.0f} ms" for p in (50, 90, 99, 99.9)]
    print(f"{len(times)} answers, {len(errors)} wrong: {', '.join(told)}")


@contextmanager
def started(*words: str) -> Iterator[str]:
    """Run a Python program until the block ends, and give the address that it prints."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"http://[\w.]+:\d+", line):
                yield found[0]
                break
        else:
            sys.exit(f"{words[-1]} didn't start: its message stands above")
    finally:
        process.terminate()
        process.wait()


def compare(requests: int) -> None:
    """Ask two servers, of which one stalls, through a gateway that hedges only the second time."""
    with ExitStack() as stack:
        gateway = ["-m", "codedinvnet", "gateway", "--port", "0", "--log-level", "warning"]
        gateway += ["--route", "POST /predict hedge=on"]
        for stall in ("0.05", "0"):
            serving = started(__file__, "serve", "--port", "0", "--stall", stall)
            gateway += ["--upstream", stack.enter_context(serving)]
        address = stack.enter_context(started(*gateway))
        for policy, told in (("uncoded", "without hedging"), ("hedge", "with hedging")):
            words = ["-m", "codedinvnet", "policy", f"{address}/codedinvnet", policy]
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            print(f"{told:>15}: ", end="", flush=True)
            ask(f"{address}/predict", requests)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    server = commands.add_parser("serve", help="serve on a port of this machine")
    server.add_argument("--host", default="127.0.0.1")
    server.add_argument("--port", type=int, default=8001)
    server.add_argument("--stall", type=float, default=0.0, help="share of requests that stall")
    client = commands.add_parser("ask", help="send requests, and print percentiles")
    client.add_argument("url")
    client.add_argument("--requests", type=int, default=4000)
    both = commands.add_parser("compare", help="ask two servers without hedging, and with it")
    both.add_argument("--requests", type=int, default=4000)
    chosen = parser.parse_args()
    if chosen.command == "serve":
        serve(chosen.host, chosen.port, chosen.stall)
    elif chosen.command == "ask":
        ask(chosen.url, chosen.requests)
    else:
        compare(chosen.requests)
