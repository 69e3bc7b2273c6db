"""Build the two distributions, and check them as their users meet them.

    python tools/release.py           # all that a release needs but the upload, then the tag
    python tools/release.py --draft   # the distributions alone, of whatever is here

`make release` runs the tests and builds the site before.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 1_500_000
"""Bytes of the wheel that the gateway's users download."""
NEVER = ("numpy", "torch", "tqdm", "codedinvnet_bundles")
"""What the gateway's users must not get."""
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info")
GATEWAY = """
import http.server, json, re, subprocess, sys, threading, urllib.request

class Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = lambda self: self.send_error(404)
    log_message = lambda *_: None

servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) for _ in range(2)]
for server in servers:
    threading.Thread(target=server.serve_forever, daemon=True).start()
upstreams = [f"--upstream=http://127.0.0.1:{server.server_port}" for server in servers]
gateway = subprocess.Popen(
    [sys.argv[1], "gateway", *upstreams, "--port", "0", "--route", "POST /predict hedge=on"],
    stdout=subprocess.PIPE, text=True,
)
try:
    url = re.search(r"http://[\\d.:]+", gateway.stdout.readline())[0]
    for number in range(50):
        sent = json.dumps(number).encode()
        assert urllib.request.urlopen(f"{url}/predict", sent, timeout=10).read() == sent
    page = urllib.request.urlopen(f"{url}/codedinvnet", timeout=10).read()
    assert b"<html" in page
finally:
    gateway.terminate()
assert gateway.wait(30) == 0
"""
BUNDLE = """
import sys
from pathlib import Path

import codedinvnet
from codedinvnet.data import sample_images
from codedinvnet.models.bundle import shipped_bundles, weights_digest

folder = Path(sys.argv[1])
assert folder in Path(codedinvnet.__file__).parents
assert len(shipped_bundles()) == 3
for name in shipped_bundles():
    weights_digest(name)
bundle, (images, labels) = codedinvnet.load_bundle("mnist"), sample_images("mnist").batch(range(8))
assert bundle.classify(bundle.embed(images)).argmax(1).eq(labels).sum() >= 7
"""


class Unfit(Exception):
    """What keeps this tree from being released."""


def run(*words: str | Path, cwd: Path = ROOT) -> str:
    """Run a command, and return what it prints.

    Raises:
        Unfit: if it fails, with all that it said.
    """
    usual = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=usual, capture_output=True, text=True)
    if done.returncode:
        raise Unfit(f"{' '.join(map(str, words[:6]))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def project(folder: Path = ROOT) -> dict[str, str]:
    """Return the table `project` of a pyproject.toml."""
    found: dict[str, str] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return found


def check_tree() -> str:
    """Check that version, changelog and citation name one release, and return its tag.

    Raises:
        Unfit: if they don't, if something is not committed, or if the tag is of another commit.
    """
    version = project()["version"]
    changes = re.findall(r"^## \[(\d.+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    cited = (ROOT / "CITATION.cff").read_text()
    for name, (release, date) in {
        "CHANGELOG.md": changes[0],
        "CITATION.cff": re.findall(r"^version: (.+)\ndate-released: (.+)$", cited, re.M)[0],
    }.items():
        if (release, date) != (version, changes[0][1]):
            raise Unfit(f"{name} has {release} of {date}, pyproject.toml {version}")
    if run("git", "status", "--porcelain"):
        raise Unfit("commit everything first: git status")
    tag = f"v{version}"
    if tag in tags() and run("git", "rev-parse", f"{tag}^{{}}") != run("git", "rev-parse", "HEAD"):
        raise Unfit(f"{tag} is the tag of another commit: raise the version")
    return tag


def tags() -> list[str]:
    return run("git", "tag").split()


def build(to: Path) -> list[Path]:
    """Build sdist and wheel of both distributions, the wheel out of the sdist."""
    for folder in (ROOT, ROOT / "bundles"):
        with tempfile.TemporaryDirectory() as empty:  # a build folder here has modules of before
            shutil.copytree(folder / "src", Path(empty) / "src", ignore=LEFT_OUT)
            for file in ("pyproject.toml", "README.md", "LICENSE"):
                shutil.copyfile(folder / file, Path(empty) / file)
            run(sys.executable, "-m", "build", "--outdir", to, empty)
    return sorted(to.iterdir())


def check_contents(wheel: Path, sdist: Path) -> None:
    """Check that sdist and wheel have the same modules and data, and that the wheel is small.

    Raises:
        Unfit: if not.
    """
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        names = (name.partition("/src/")[2] for name in archive.getnames())
        in_sdist = {name for name in names if Path(name).suffix and ".egg-info" not in name}
    package = min(in_wheel).partition("/")[0]
    here = {
        str(path.relative_to(folder))
        for folder in (ROOT / "src", ROOT / "bundles" / "src")
        for path in (folder / package).rglob("*.*")
        if path.is_file() and path.suffix != ".pyc"
    }
    if in_wheel != here or in_sdist != here:
        odd = sorted((in_wheel ^ here) | (in_sdist ^ here))
        raise Unfit(f"{package}: wheel, sdist and repository differ by {', '.join(odd[:5])}")
    if package == "codedinvnet" and wheel.stat().st_size > LARGEST:
        raise Unfit(f"{wheel.name} has {wheel.stat().st_size:,} bytes, more than {LARGEST:,}")


def check_gateway(installed: Path, scratch: Path) -> None:
    """Install a distribution into an empty environment, and run a gateway there.

    Raises:
        Unfit: if it doesn't run, or brought more than it needs.
    """
    venv.create(scratch, with_pip=True, clear=True)
    run(scratch / "bin" / "pip", "install", "-q", "--no-cache-dir", installed)
    run(
        scratch / "bin" / "python",
        "-I",
        "-c",
        GATEWAY,
        scratch / "bin" / "codedinvnet",
        cwd=scratch,
    )
    (packages,) = scratch.glob("lib/python*/site-packages")
    brought = [name for name in NEVER if (packages / name).exists()]
    if brought:
        raise Unfit(f"the gateway's users would get {', '.join(brought)}")


def check_bundles(wheels: Sequence[Path], scratch: Path) -> None:
    """Load the shipped bundles from both wheels, with the packages of this environment.

    Raises:
        Unfit: if they are not found.
    """
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps")
    run(*pip, "--target", scratch, *wheels)
    program = f"import sys; sys.path.insert(0, sys.argv[1])\n{BUNDLE}"
    run(sys.executable, "-c", program, scratch, cwd=scratch)


def check_metadata(files: Sequence[Path], scratch: Path) -> None:
    """Check by twine that an index would take the files."""
    venv.create(scratch, with_pip=True, clear=True)
    run(scratch / "bin" / "pip", "install", "-q", "twine")
    run(scratch / "bin" / "twine", "check", "--strict", *files)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draft", action="store_true", help="of any tree, and without a tag")
    parser.add_argument("--to", type=Path, default=ROOT / "dist", help="the folder to write into")
    arguments = parser.parse_args(words)
    try:
        tag = None if arguments.draft else check_tree()
        shutil.rmtree(arguments.to, ignore_errors=True)
        files = build(arguments.to)
        sdists, wheels = ([f for f in files if f.suffix == kind] for kind in (".gz", ".whl"))
        for wheel, sdist in zip(wheels, sdists, strict=True):
            check_contents(wheel, sdist)
        with tempfile.TemporaryDirectory() as folder:
            check_metadata(files, Path(folder) / "twine")
            for number, gateway in enumerate((wheels[0], sdists[0])):
                check_gateway(gateway, Path(folder) / f"gateway-{number}")
            check_bundles(wheels, Path(folder) / "bundles")
        if tag and tag not in tags():
            run("git", "tag", "--annotate", "--message", f"codedinvnet {tag[1:]}", tag)
    except Unfit as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for file in files:
        print(f"{file.stat().st_size:>12,}  {file}")
    if tag:
        print(f"Left to do: git push origin {tag} && twine upload {arguments.to}/*")
    return 0


if __name__ == "__main__":
    sys.exit(main())
