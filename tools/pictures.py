"""Draw the service's page into docs/images/page.png; it needs Chromium.

The page is that of `codedinvnet serve mnist --demo` while queries come in, after one worker was
stopped and another killed with its buttons.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from playwright.async_api import ViewportSize, async_playwright

from codedinvnet.files import write_atomically
from codedinvnet.processes import server

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "page.png"
SIZE = ViewportSize(width=1280, height=1000)
RATE = 60
"""Queries a second that the page sends."""
COUNTED = "Number(document.getElementById('n-{}').textContent)"
"""What the page shows of an outcome."""


async def draw_page(path: Path) -> None:
    """Serve, hurt two workers, wait for decoded answers, and take the picture.

    Raises:
        SystemExit: if Chromium is not installed.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("error: the page's picture needs Chromium: install it")
    times = ("--group-timeout-ms", "500", "--hang-timeout-ms", "6000", "--deadline-ms", "20000")
    options = ("mnist", "--demo", "--k", "10", "--routing", "round-robin", *times)
    async with server(*options) as process, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = await browser.new_page(viewport=SIZE)
        await page.goto(process.address + "/")
        await page.get_by_label("kill worker 3").wait_for()
        await page.locator("#rate").evaluate(
            f"slider => {{ slider.value = {RATE}; slider.dispatchEvent(new Event('input')); }}"
        )
        await page.wait_for_function(
            "Number(document.getElementById('n-direct').textContent) > 900"
        )
        await page.get_by_label("stop worker 7").click()
        await page.get_by_label("kill worker 3").click()
        await page.wait_for_function(f"{COUNTED.format('decoded')} > 4")
        write_atomically(path, await page.screenshot())
        await browser.close()


if __name__ == "__main__":
    asyncio.run(draw_page(PICTURE))
