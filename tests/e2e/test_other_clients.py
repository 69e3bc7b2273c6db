"""Clients that this package does not bring: Java's and curl's, which offer HTTP/2 first."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.processes import served

pytestmark = pytest.mark.nightly(reason="it starts a service, and Java compiles a program")

JAVA = """
import java.net.URI;
import java.net.http.*;
import java.nio.file.Path;

public class Ask {
    public static void main(String[] words) throws Exception {
        var client = HttpClient.newHttpClient();
        for (int i = 0; i < 2; i++) {
            var request = HttpRequest.newBuilder(URI.create(words[0]))
                .POST(HttpRequest.BodyPublishers.ofFile(Path.of(words[1]))).build();
            var reply = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(reply.statusCode() + " " + reply.body());
        }
    }
}
"""


@pytest.fixture(scope="module")
def infer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with served("mnist", "--k", "2", "--deadline-ms", "30000", log=log) as process:
        yield f"{process.address}/v2/models/mnist/infer"


@pytest.fixture
def body(tmp_path: Path) -> Path:
    """A request that comes in more than one part."""
    images = np.full((100, 1, 28, 28), 200)
    data = {"shape": images.shape, "datatype": "UINT8", "data": images.ravel().tolist()}
    path = tmp_path / "body"
    path.write_text(json.dumps({"id": "theirs", "inputs": [{"name": "images", **data}]}))
    return path


def check(line: str) -> None:
    status, _, text = line.partition(" ")
    assert status == "200", line
    reply = json.loads(text)
    assert reply["id"] == "theirs"
    assert reply["outputs"][0]["shape"] == [100, 10]


@pytest.mark.skipif(not shutil.which("javac"), reason="no JDK is installed")
def test_java(infer: str, body: Path, tmp_path: Path) -> None:
    program = tmp_path / "Ask.java"
    program.write_text(JAVA)
    command = ["java", str(program), infer, str(body)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        check(line)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl(infer: str, body: Path) -> None:
    offer = ("--http2", "-s", "-H", "Expect: 100-continue", "--data-binary", f"@{body}")
    command = ["curl", *offer, "-w", "\n%{http_code}", infer]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "option --http2" in found.stderr:
        pytest.skip("this curl has no HTTP/2")
    text, _, status = found.stdout.rpartition("\n")
    check(f"{status} {text}")
