"""The gateway in processes that have no PyTorch, nor what comes with it."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.load import Load
from codedinvnet.cli.common import OF_MODELS
from tests.upstream import Upstream

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
TENSOR = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
JSON = (("Content-Type", "application/json"),)
PROGRAM = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OF_MODELS}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from codedinvnet.cli import main
sys.exit(main(sys.argv[1:]))
"""


async def started(*words: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, *words, stdout=pipe, stderr=pipe
    )


async def ran(*words: str) -> tuple[int, str, str]:
    """Return the exit code of a command, and what it wrote."""
    process = await started(*words)
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def gateway(upstreams: list[str], *words: str) -> AsyncIterator[str]:
    """Yield the address of a gateway, and end it."""
    chosen = [word for url in upstreams for word in ("--upstream", url)]
    process = await started("gateway", *chosen, "--port", "0", *words)
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        found = re.search(r"http://[\d.:]+", line)
        assert found, (line, (await process.communicate())[1].decode())
        yield found[0]
    finally:
        process.terminate()
        await process.communicate()
    assert process.returncode == 0


def test_a_gateway_under_load() -> None:
    async def run() -> None:
        fakes = [Upstream(), Upstream()]
        for fake in fakes:
            await fake.start()
        try:
            async with gateway([fake.url for fake in fakes]) as address:
                bodies = [json.dumps({"inputs": [TENSOR]}).encode()]
                load = Load(f"{address}/v2/models/m/infer", bodies, JSON)
                assert (await load.run([i / 100 for i in range(100)]))["answered"] == 100
                assert all(fake.requests for fake in fakes)
                code, out, err = await ran("policy", f"{address}/codedinvnet", "uncoded")
                assert (code, out) == (0, "policy uncoded, before hedge\n"), err
        finally:
            for fake in fakes:
                await fake.stop()

    asyncio.run(run())


def test_what_needs_it_says_how_it_is_installed() -> None:
    code, out, err = asyncio.run(ran("info", "mnist"))
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    extra = re.search(r"codedinvnet\[(\w+)\]", line)
    assert extra, line
    assert f"\n{extra[1]} = [" in PROJECT.read_text()


def test_the_extra_installs_what_is_missing_here() -> None:
    extra = PROJECT.read_text().split("\nmodels = [")[1].split("\n]")[0]
    names = set(re.findall(r'^ +"([\w-]+)', extra, re.MULTILINE)) - {"codedinvnet-bundles"}
    assert sorted(OF_MODELS) == sorted("PIL" if name == "pillow" else name for name in names)
