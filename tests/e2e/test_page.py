"""The pages in a real browser: a service's, with buttons that kill workers, and a gateway's."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from benchmarks.processes import running
from tests.processes import PATIENT, served, slow, write_faults

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 60_000
"""Milliseconds."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()


def test_hurt_workers_and_watch(browser: Any, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("an open+secret\n")
    faults = write_faults(tmp_path, slow(1000, probability=0.1))
    options = ("--demo", "--k", "4", "--workers", "6", "--policy", "coded", "--faults", faults)
    times = ("--set", "group-timeout-ms=500", "--set", "hang-timeout-ms=1500")
    secret = ("--token-file", str(token))
    with served("mnist", *options, *times, *PATIENT, *secret, log=tmp_path / "log") as process:
        context = browser.new_context(viewport={"width": 390, "height": 844})
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(process.address + "/")
        page.locator("#problem").wait_for()
        assert "#token=TOKEN" in page.locator("#problem").inner_text()
        assert page.locator("#send").is_hidden()

        problems: list[str] = []
        requests: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.on("requestfailed", lambda request: problems.extend(failed(request)))
        page.goto(process.address + "/#token=an%20open+secret")
        page.get_by_label("kill worker 2").wait_for()  # without loading the page again
        page.on("console", lambda message: problems.append(message.text) if loud(message) else None)
        assert page.locator(".worker").count() == 6
        assert "6 workers" in page.locator("#summary").inner_text()

        page.locator("#rate").evaluate(
            "slider => { slider.value = 40; slider.dispatchEvent(new Event('input')); }"
        )
        page.wait_for_function("Number(document.getElementById('n-direct').textContent) > 10")
        assert page.locator("#rate-shown").inner_text() == "40"
        page.get_by_label("stop worker 1").click()
        page.get_by_label("kill worker 2").click()
        page.wait_for_function("Number(document.getElementById('n-decoded').textContent) > 0")
        for worker in (1, 2):  # the killed one at once, the stopped one when it counts as hung
            page.wait_for_function(
                """worker => {
                    const card = document.querySelectorAll(".worker")[worker];
                    return card.matches(".up") && !card.textContent.includes(" 0 restarts");
                }""",
                arg=worker,
            )
        assert page.locator("#n-failed").inner_text() == "0"
        page.wait_for_function("document.getElementById('problem').textContent === ''")
        assert page.locator("#latency td.decoded").count() == 1

        page.wait_for_function(
            """() => {
                const canvas = document.getElementById("chart");
                const pen = canvas.getContext("2d");
                return pen.getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean);
            }"""
        )
        page.get_by_label("slow worker 0").click()
        page.get_by_label("heal worker 0").click()
        page.locator("#rate").evaluate("slider => { slider.value = 0; }")
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width
        assert problems == []
        assert {url.split("/", 3)[2] for url in requests if not url.startswith("data:")} == {
            process.address.removeprefix("http://")
        }
        page.route(
            "**/demo/workers/0/slow",
            lambda route: route.fulfill(status=409, json={"error": "not now"}),
        )
        page.get_by_label("slow worker 0").click()
        page.get_by_text("not now").wait_for()
        with page.expect_response("**/page/state"):
            pass
        assert page.locator("#problem").inner_text() == "not now"
        context.close()


class Toy(BaseHTTPRequestHandler):
    """Has an answer to GET, and none to POST."""

    def do_GET(self) -> None:
        self._say(200)

    def do_POST(self) -> None:
        self._say(500)

    def _say(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def toys() -> Iterator[list[str]]:
    """Two upstreams."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Toy) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever).start()
    try:
        yield [f"http://127.0.0.1:{server.server_port}" for server in servers]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def test_a_gateways_errors_come_first_and_its_requests_are_drawn(
    browser: Any, toys: list[str], tmp_path: Path
) -> None:
    upstreams = [word for url in toys for word in ("--upstream", url)]
    command = (sys.executable, "-m", "codedinvnet", "gateway", *upstreams, "--port", "0")
    with running(*command, log=tmp_path / "log") as process:
        for number in range(40):
            with suppress(HTTPError):
                urlopen(f"{process.address}/any", b"" if number < 5 else None).close()
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        problems: list[str] = []
        requests: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if loud(message) else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"{process.address}/codedinvnet")
        page.locator("#errors-drawn .bar").wait_for(state="attached")
        for column, what in (("errors", "0.5 errors"), ("requests", "4 requests")):
            told = page.locator(f"#{column}-drawn title").all_text_contents()
            assert len(told) == 90
            assert any(f": {what} per second" in each for each in told)
        assert "p99 " in page.locator("#times-drawn title").last.text_content()
        assert page.locator("#times-drawn path.p99").get_attribute("d")
        (row,) = page.locator("#errors tbody tr").all()
        assert row.locator("td").all_inner_texts()[::2] == ["other", "5"]
        assert "500" in row.inner_text()
        assert page.locator("section").first.locator("#health").inner_text().startswith("5 of 40 ")
        page.get_by_label("Draw").select_option("other")
        page.locator("#requests-drawn title", has_text=": 0.5 requests per").wait_for(
            state="attached"
        )
        for width in (400, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("document.head.append(Object.assign(document.createElement('script'), "
                      "{textContent: 'document.title = 1'}))")  # fmt: skip
        assert page.title() == "codedinvnet gateway"  # it runs no script but its own
        (refused,) = problems
        assert "Content Security Policy" in refused
        assert {url.partition("//")[2].partition("/")[0] for url in requests} == {
            process.address.removeprefix("http://")
        }
        context.close()


def failed(request: Any) -> list[str]:
    """Return what went wrong; the page asks again for its state when an answer takes long."""
    return [] if request.url.endswith("/page/state") else [f"failed: {request.url}"]


def loud(message: Any) -> bool:
    return message.type in ("error", "warning")
