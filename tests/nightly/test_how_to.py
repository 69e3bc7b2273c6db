"""README's and the pages' commands run as they stand; only hosts, ports and minutes are others."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from codedinvnet.net.listening import free_port
from tests.pages import FENCE, ROOT, is_like, run, steps
from tests.processes import served
from tests.test_readme import PAGES, commands

pytestmark = pytest.mark.nightly

TOY = str(ROOT / "examples" / "toy_server.py")
PYTHON = sys.executable
STARTED = r"(https?://[\w.]+:\d+)"


@contextmanager
def toys(*stalls: float) -> Iterator[list[str]]:
    """Run toy servers, and yield their addresses."""
    with ExitStack() as stack:
        words = [(PYTHON, TOY, "serve", "--port", "0", "--stall", str(each)) for each in stalls]
        yield [stack.enter_context(program(*each)) for each in words]


@contextmanager
def program(*words: str, cwd: Path = ROOT) -> Iterator[str]:
    """Run a program until the block ends, and yield the address that it prints."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=cwd) as process:
        try:
            assert process.stdout is not None
            found = next(filter(None, (re.search(STARTED, line) for line in process.stdout)), None)
            assert found is not None, words
            yield found[1].replace("0.0.0.0", "127.0.0.1")
        finally:
            process.terminate()
    assert process.returncode in (0, -15), words


GATEWAYS = [
    pytest.param(words, id=f"{page} {number}")
    for page in PAGES
    if page == "README.md" or page.startswith(("docs/how-to", "docs/tutorials", "docs/reference"))
    for number, words in enumerate(commands(PAGES[page]))
    if words[:2] == ["codedinvnet", "gateway"]
]


@pytest.mark.parametrize("words", GATEWAYS)
def test_a_gateway_starts_and_answers(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a" * 64)
    with toys(0, 0) as servers:
        ports, each = [free_port() for _ in range(2)], cycle(servers)
        own = []
        for option, value in zip(["", *words[1:]], words[1:], strict=False):
            if option == "--upstream":
                value = value if "grpc" in value else next(each)
            elif option == "--members":
                value = f"127.0.0.1:{ports[0]}"
            elif option == "--member-port":
                value = str(ports[0])
            elif option in ("--port", "--grpc-port"):
                value = "0"
            elif option == "--admin-port":
                value = str(ports[1])
            elif option == "--health" and value != "/health":
                value = "/any"  # toy servers answer every GET
            own.append(value)
        if not {"--port", "--grpc-port"} & set(own):
            own += ["--port", "0"]
        with program(PYTHON, "-m", "codedinvnet", *own, cwd=tmp_path) as address:
            if "--grpc-port" in own:
                return
            sent = Request(f"{address}/predict", b'{"number": 12}', method="POST")
            with urlopen(sent, timeout=20) as reply:
                assert json.load(reply) == {"square": 144}


def test_the_tutorial_on_the_gateway(tmp_path: Path) -> None:
    _, start, without, with_copies, metrics, *_ = steps("tutorials/hedge-a-service.md")
    ports = {"8001": free_port(), "8002": free_port(), "9000": free_port()}

    def own(code: str) -> str:
        for usual, port in ports.items():
            code = code.replace(usual, str(port))
        return code.replace("examples/", f"{ROOT}/examples/")

    with ExitStack() as stack:
        for line in own(start.code).strip().splitlines():
            words = [PYTHON if word == "python" else word for word in shlex.split(line)]
            if words[0] == "codedinvnet":
                words[:1] = [PYTHON, "-m", "codedinvnet"]
            stack.enter_context(program(*words))
        for step in (without, with_copies):
            printed = run(own(step.code), tmp_path)
            shown = re.sub(r"\d+ ms", "1 ms", step.shown)
            assert re.sub(r"\d+ ms", "1 ms", printed) == shown
        told = {line.split("{")[0] for line in run(own(metrics.code), tmp_path).splitlines()}
        assert told == {line.split("{")[0] for line in metrics.shown.splitlines() if line != "..."}


def test_the_page_on_fastapi(tmp_path: Path) -> None:
    app, start, ask = steps("how-to/fastapi.md")
    (tmp_path / "app.py").write_text(app.code)
    with ExitStack() as stack:
        ports = {port: str(free_port()) for port in ("8001", "8002", "9000")}
        for line in start.code.strip().splitlines():
            words = shlex.split(re.sub("|".join(ports), lambda port: ports[port[0]], line))
            words = [PYTHON, "-m", *words]
            process = stack.enter_context(subprocess.Popen(words, cwd=tmp_path))
            stack.callback(process.terminate)
        code = f"sleep 3; {ask.code.replace('9000', ports['9000'])}"
        assert run(code, tmp_path).strip() == ask.shown.strip()


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed")
def test_haproxy_takes_the_settings_of_the_page(tmp_path: Path) -> None:
    settings = next(code for _, code in FENCE.findall(PAGES["docs/how-to/failover.md"]))
    (tmp_path / "haproxy.cfg").write_text(settings)
    run("haproxy -c -f haproxy.cfg", tmp_path)


SERVICES = [
    pytest.param(words, id=f"{page} {number}")
    for page in PAGES
    if page.startswith("docs/how-to")
    for number, words in enumerate(commands(PAGES[page]))
    if words[:3] == ["codedinvnet", "serve", "mnist"] and "ray" not in words
]


@pytest.mark.parametrize("words", SERVICES)
def test_a_service_starts(words: list[str], tmp_path: Path) -> None:
    fences = FENCE.findall(PAGES["docs/how-to/inject-faults.md"])
    (tmp_path / "faults.json").write_text(next(code for kind, code in fences if kind == "json"))
    own = [str(tmp_path / word) if word == "faults.json" else word for word in words[2:]]
    own = [str(ROOT / word) if word.startswith("examples/") else word for word in own]
    with served(*own, log=tmp_path / "log"):
        pass


def test_a_server_is_measured(tmp_path: Path) -> None:
    (step,) = [s for s in steps("how-to/measure-a-server.md") if s.language == "bash"]
    with served("mnist", log=tmp_path / "log") as service:
        code = step.code.replace("http://127.0.0.1:8000", service.address)
        code = code.replace("--seconds 60", "--seconds 2")
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        printed = run(f"export PYTHONPATH={shlex.quote(path)}\n{code}", tmp_path)
    assert "p999_ms" in printed
    assert re.search(r"errors +0|no errors|\{\}", printed), printed


def test_a_client_hedges(tmp_path: Path) -> None:
    """The first program of the page, as the body of a coroutine."""
    step = next(s for s in steps("how-to/hedge-from-python.md") if s.language == "python")
    with toys(0, 0) as servers:
        code = step.code
        for name, address in zip(("http://a:8000", "http://b:8000"), servers, strict=True):
            code = code.replace(name, address)
        code = code.replace('{"x": [1, 2, 3]}', '{"number": 3}')
        shown = code.rpartition("# ")[2].strip()
        body = textwrap.indent(code, "    ")
        program = f"async def main():\n{body}\nimport asyncio\nasyncio.run(main())\n"
        (tmp_path / "client.py").write_text(program)
        assert run("python client.py", tmp_path).strip() == shown


def test_a_module_in_memory_is_protected(tmp_path: Path) -> None:
    blocks = [s for s in steps("how-to/protect.md") if s.language == "python"]
    (tmp_path / "own.py").write_text(blocks[-1].code)
    printed = run("python own.py", tmp_path, timeout=900)
    assert re.fullmatch(r"\d+% may be released, and agree with a probability of [\d.]+\n", printed)
    assert (tmp_path / "model-protection").is_dir()


def test_a_bundle_is_evaluated(tmp_path: Path) -> None:
    (words, *_) = commands(PAGES["docs/how-to/compare-methods.md"])
    assert words[:2] == ["codedinvnet", "evaluate"]
    if not (ROOT / "data").is_dir():
        pytest.skip("it would download MNIST: `data/` is not there")
    words += ["--data-dir", str(ROOT / "data")]
    assert "coded" in run(shlex.join(words), tmp_path, timeout=600)


def test_readme_prints_what_it_shows() -> None:
    found = FENCE.findall(PAGES["README.md"])
    shown = next(code for kind, code in found if kind == "text")
    assert is_like(shown, run("python examples/toy_server.py compare", ROOT))
    (code,) = (code for kind, code in found if kind == "python")
    assert run(f"python - <<'END'\n{code}END", ROOT).strip() == code.rpartition("# ")[2].strip()
