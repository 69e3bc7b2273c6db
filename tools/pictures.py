"""Draw the pictures of README.md into docs/images: a group of each bundle whose images
ship, and the service's page.

    python tools/pictures.py          all
    python tools/pictures.py mnist    one bundle's group
    python tools/pictures.py page     the page, which needs Chromium

The page is that of `codedinvnet serve mnist --demo` while queries come in, after one worker was
stopped and another killed with its buttons.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
from pathlib import Path

from playwright.async_api import ViewportSize, async_playwright

from codedinvnet.bench.load import server
from codedinvnet.data import SAMPLES, sample_images
from codedinvnet.demo import draw_group
from codedinvnet.files import write_atomically
from codedinvnet.models.bundle import load_bundle, shipped_bundles

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
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
        raise SystemExit("error: the page's picture needs Chromium: install it, or name a bundle")
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


def main() -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (*(name for name in shipped_bundles() if name in SAMPLES), "page")
    parser.add_argument("names", nargs="*", help=f"{', '.join(known)} (default: all)")
    names = parser.parse_args().names or known
    for name in names:
        if name not in known:
            parser.error(f"unknown picture {name!r}: {', '.join(known)}")
        path = IMAGES / f"{name}.png"
        if name == "page":
            asyncio.run(draw_page(path))
        else:
            draw_group(load_bundle(name), sample_images(name), path, k=10, seed=0)
        print(path)


if __name__ == "__main__":
    main()
