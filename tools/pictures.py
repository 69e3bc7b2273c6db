"""Film the service's page into docs/images/page.gif; it needs Chromium.

The page is that of `codedinvnet serve mnist --demo` while queries come in. One worker is stopped
with its button, and a second one is killed. The chart and the table of latencies are left out.
"""

from __future__ import annotations

import asyncio
import io
import shutil
import time
from pathlib import Path

from PIL import Image
from playwright.async_api import Page, ViewportSize, async_playwright

from codedinvnet.files import write_atomically
from codedinvnet.processes import server

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "page.gif"
SIZE = ViewportSize(width=760, height=700)
RATE = 30
"""Queries a second that the page sends."""
COLOURS = 64
FRAME = 0.4
"""Seconds between two frames."""
LAST = 3.0
"""Seconds for which the last frame stays."""
COUNTED = "Number(document.getElementById('n-{}').textContent) > {}"
"""Whether the page shows more than so many queries of an outcome."""
STYLE = """
#caption { position: fixed; inset: auto 0 0 0; padding: 10px 16px; z-index: 1;
  background: var(--ink); color: var(--card); font-size: 19px; font-weight: 600; }
section:has(#rate), section:has(#chart), section:has(#latency), #problem { display: none; }
main { padding: 8px 12px; gap: 8px; } section { padding: 8px 12px; } h2 { margin: 0 0 4px; }
.workers { grid-template-columns: repeat(3, 1fr); }
.figures { grid-template-columns: repeat(6, 1fr); }
button:focus { outline: 3px solid var(--failed); }
"""


class Film:
    """Frames of a page, each for `FRAME` seconds."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.frames: list[Image.Image] = []

    async def say(self, caption: str) -> None:
        """Show what is to be seen below the page."""
        await self.page.evaluate(
            """text => {
                const shown = document.getElementById("caption") ||
                    document.body.appendChild(document.createElement("div"));
                shown.id = "caption"; shown.textContent = text;
            }""",
            caption,
        )

    async def shoot(self, seconds: float, until: str = "true") -> None:
        """Take frames for some seconds, and then until something holds in the page."""
        end = time.monotonic() + seconds
        while time.monotonic() < end or not await self.page.evaluate(until):
            shot = Image.open(io.BytesIO(await self.page.screenshot()))
            self.frames.append(shot.convert("RGB"))
            await asyncio.sleep(FRAME)

    def gif(self) -> bytes:
        """Return the film with one palette for all frames, which come again and again."""
        palette = self.frames[-1].quantize(COLOURS)
        first, *rest = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in self.frames]
        times = [round(1000 * FRAME)] * len(rest) + [round(1000 * LAST)]
        made = io.BytesIO()
        first.save(made, "GIF", save_all=True, append_images=rest, duration=times, loop=0)
        return made.getvalue()


async def film_page(path: Path) -> None:
    """Serve, hurt two workers, and film what the page shows of it.

    Raises:
        SystemExit: if Chromium is not installed, or the stopped worker had no query to decode.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("error: the page's film needs Chromium: install it")
    times = ("--group-timeout-ms", "500", "--hang-timeout-ms", "6000", "--deadline-ms", "20000")
    code = ("--k", "4", "--workers", "6", "--policy", "coded")
    async with (
        server("mnist", "--demo", *code, *times) as process,
        async_playwright() as playwright,
    ):
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = await browser.new_page(viewport=SIZE, color_scheme="light")
        await page.goto(process.address + "/")
        await page.add_style_tag(content=STYLE)
        await page.get_by_label("kill worker 3").wait_for()
        film = Film(page)
        await page.locator("#rate").evaluate(
            f"slider => {{ slider.value = {RATE}; slider.dispatchEvent(new Event('input')); }}"
        )
        await page.wait_for_function(COUNTED.format("direct", 300))
        await film.say("Queries come in: workers answer them, directly.")
        await film.shoot(2.0)
        await film.say("Worker 1 is stopped …")
        before = await page.locator("#n-decoded").inner_text()
        await page.get_by_label("stop worker 1").click()
        await film.shoot(2.0)
        if not await page.evaluate(COUNTED.format("decoded", before)):
            raise SystemExit("error: the stopped worker had no query's task: film anew")
        await film.say("… and what it had is decoded from the others.")
        await film.shoot(3.0)
        await film.say("Worker 3 is killed: another process takes its place.")
        await page.get_by_label("kill worker 3").click()
        await film.shoot(3.0, "document.querySelectorAll('.worker.up').length === 6")
        await film.say("Nothing failed, and both workers are back.")
        await film.shoot(FRAME)
        write_atomically(path, film.gif())
        await browser.close()


if __name__ == "__main__":
    asyncio.run(film_page(PICTURE))
