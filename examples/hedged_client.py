"""Hedge requests from Python, without a gateway: two toy servers, one in a hundred answers late.

pip install -e '.[httpx]'
python examples/hedged_client.py
"""

import asyncio
import random
import statistics
import time

import httpx

from codedinvnet.hedging import HedgingTransport

STALL = 0.5
"""Seconds by which one answer in a hundred is late."""


async def toy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer "ok" after 10 ms, mostly."""
    try:
        while await reader.readuntil(b"\r\n\r\n"):
            await asyncio.sleep(0.01 + STALL * (random.random() < 0.01))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def measure(transport: httpx.AsyncBaseTransport | None, url: str) -> str:
    """Return percentiles of 600 requests, four at a time, once others have taught the delay."""
    times = []

    async def some(client: httpx.AsyncClient) -> None:
        for number in range(160):
            began = time.perf_counter()
            (await client.get("/predict")).raise_for_status()
            if number >= 10:
                times.append(1000 * (time.perf_counter() - began))

    async with httpx.AsyncClient(transport=transport, base_url=url) as client:
        await asyncio.gather(*(some(client) for _ in range(4)))
    cuts = statistics.quantiles(times, n=1000)
    return f"p50 {cuts[499]:.0f} ms, p99 {cuts[989]:.0f} ms, p99.9 {cuts[998]:.0f} ms"


async def main() -> None:
    """Measure one server alone, then both behind the transport."""
    servers = [await asyncio.start_server(toy, "127.0.0.1", 0) for _ in range(2)]
    urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    print("one server:", await measure(None, urls[0]))
    transport = HedgingTransport(urls)
    print("hedged:    ", await measure(transport, "http://model"))
    print(transport.stats)
    for server in servers:
        server.close()
    await asyncio.sleep(STALL + 0.1)  # what is late ends


if __name__ == "__main__":
    asyncio.run(main())
