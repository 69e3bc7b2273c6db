"""Proxies, each with the configuration it is measured with.

`configurations/` has what the documents print; comments there give the reason of each line.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from codedinvnet.common.errors import UserError
from codedinvnet.common.grid import key_of

TIMEOUT = 15
"""Seconds that every proxy waits for an answer, and lets a request queue."""
RETRIES = 2
"""How often each sends a failed request again: as often as the gateway."""
MEMBER = -5_000
"""From a gateway's port to the one for other members."""
CHAT = "/v1/chat/completions"
UNNAMED = "/predict"
"""A path whose requests nobody has called safe to repeat; all others are."""
INSTALL = "pip install -e bundles -e '.[benchmarks]' && apt-get install haproxy nginx-light"
CONFIGURATIONS = Path(__file__).parent / "configurations"


@dataclass(frozen=True)
class Site:
    """Where a proxy runs.

    Attributes:
        folder: for its files.
        port: that it listens on, of 127.0.0.1.
        upstreams: ports of the servers.
        slots: requests that an upstream should handle at a time, for proxies that must know it.
        tuning: seconds of the setting that is tuned, where there is one.
        instances: ports of all instances, this one's among them.
    """

    folder: Path
    port: int
    upstreams: list[int]
    slots: int = 1
    tuning: float = 0.0
    instances: list[int] = field(default_factory=list)

    def each(self, text: str) -> str:
        """Return a line for each upstream, in which N is its number and PORT its port."""
        lines = [text.replace("PORT", str(port)) for port in self.upstreams]
        return "\n".join(line.replace("N", str(n)) for n, line in enumerate(lines))


EXAMPLE = Site(Path("/tmp/peers"), 8000, [9001, 9002], tuning=0.025)
"""The one whose configurations are printed."""


@dataclass(frozen=True)
class Contender:
    """A proxy and its configuration.

    Attributes:
        words: the command that runs it, after the program; FILE is its configuration's path.
        program: the program; "": this package.
        file: of `configurations/`; "": it is configured by words alone.
        values: returns what is filled in there.
        tunings: timeouts of a try, in seconds; it gets the best for each situation.
        only: the kind of servers that it is for, where it isn't for all; see `upstreams.KINDS`.
        copies: whether it sends copies, for which requests must be safe to repeat.
        several: whether it is more than one instance.
    """

    words: Callable[[Site], list[str]]
    program: str = ""
    file: str = ""
    values: Callable[[Site], Mapping[str, object]] = lambda site: {}
    tunings: tuple[float, ...] = ()
    only: str = ""
    copies: bool = False
    several: bool = False

    def configuration(self, site: Site) -> str:
        """Return the text of its configuration, or the words of its command."""
        if not self.file:
            return " ".join([self.program, *self.words(site)])
        text = (CONFIGURATIONS / self.file).read_text(encoding="utf-8")
        usual = {"port": site.port, "folder": site.folder, "slots": site.slots}
        usual |= {"retries": RETRIES, "unnamed": UNNAMED}
        return Template(text).substitute({**usual, **self.values(site)})

    def command(self, site: Site) -> list[str]:
        """Write the configuration into the site's folder; return the command that runs it.

        Raises:
            UserError: if the program is not installed.
        """
        if not self.program:
            return [sys.executable, "-m", "codedinvnet", *self.words(site)]
        path = site.folder / self.file
        if self.file:
            path.write_text(self.configuration(site), encoding="utf-8")
        name = self.program
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
        beside = Path(sys.executable).with_name(name)
        if found is None and not beside.is_file():
            raise UserError(f"{name} is not installed: {INSTALL}")
        words = [word.replace("FILE", str(path)) for word in self.words(site)]
        return [found or str(beside), *words]

    @property
    def settings(self) -> dict[str, str]:
        """What rows of another configuration differ in; ours runs on its defaults."""
        return {"configuration": key_of(self.configuration(EXAMPLE))} if self.program else {}


def _envoy(site: Site) -> Mapping[str, object]:
    hedging = f"""\
                    per_try_timeout: {site.tuning:g}s    # tuned for each fault
                  # What has no answer by then is sent to another server, too.
                  hedge_policy: {{hedge_on_per_try_timeout: true}}"""
    timeouts = """\
      # A try that took too long calls for a copy; it is no failure of its server.
      split_external_local_origin_errors: true
      enforcing_consecutive_local_origin_failure: 0
      enforcing_local_origin_success_rate: 0"""
    address = "{socket_address: {address: 127.0.0.1, port_value: PORT}}"
    return {
        "count": len(site.upstreams),
        "timeouts": timeouts if site.tuning else "",
        "hedging": hedging if site.tuning else "",
        "servers": site.each(f"        - endpoint: {{address: {address}}}"),
    }


def _haproxy(site: Site) -> Mapping[str, object]:
    return {
        "patience": f"{1000 * (site.tuning or TIMEOUT):.0f}ms",
        "servers": site.each("    server sN 127.0.0.1:PORT"),
    }


def _nginx(site: Site) -> Mapping[str, object]:
    return {
        "tries": RETRIES + 1,
        "servers": site.each("        server 127.0.0.1:PORT max_fails=3 fail_timeout=1s;"),
    }


def envoy_words(_: Site) -> list[str]:
    """Return the words of Envoy."""
    return ["-c", "FILE", "--concurrency", "1", "--log-level", "off", "--use-dynamic-base-id"]


VLLM_ROUTER = {
    "--policy": ("power_of_two", "the less loaded of two, because no prompts here are alike"),
    "--retry-max-retries": (RETRIES + 1, "tries, as many as the gateway has"),
    "--retry-initial-backoff-ms": (1, "at once, because it goes to another server"),
    "--cb-failure-threshold": (3, "failures in a row eject a server, as at the gateway"),
    "--cb-timeout-duration-secs": (1, "after which it is tried again"),
    "--health-check-interval-secs": (1, "as for all here; the usual is 60"),
    "--health-failure-threshold": (2, "failed checks take a server out"),
    "--health-success-threshold": (1, "good one brings it back"),
    "--request-timeout-secs": (TIMEOUT, "clients wait as long"),
    "--worker-startup-check-interval": (1, "the usual 30 s only delay the start"),
    "--log-level": ("error", "it would write two lines a request"),
}
"""Option -> its value, and why."""


def _vllm_router(site: Site) -> list[str]:
    servers = [f"http://127.0.0.1:{port}" for port in site.upstreams]
    options = [str(word) for name, (value, _) in VLLM_ROUTER.items() for word in (name, value)]
    own = ["--port", str(site.port), "--prometheus-port", str(site.port + 20_000)]
    return [*own, "--worker-urls", *servers, *options]


def _ours(*options: str, members: bool = False) -> Contender:
    """Return this gateway on its defaults, told that chats may be repeated."""

    def words(site: Site) -> list[str]:
        upstreams = [f"--upstream=http://127.0.0.1:{port}" for port in site.upstreams]
        lines = ",".join(f"127.0.0.1:{port + MEMBER}" for port in site.instances)
        together = ("--members", lines, "--member-port", str(site.port + MEMBER))
        return [
            "gateway",
            "--port",
            str(site.port),
            *upstreams,
            "--route",
            f"POST {CHAT} hedge=on",
            *options,
            *(together if members else ()),
        ]

    return Contender(words, several=members)


def _haproxy_with(*tunings: float) -> Contender:
    words = ["-db", "-q", "-f", "FILE"]
    return Contender(lambda _: words, "haproxy", "haproxy.cfg", _haproxy, tunings)


CONTENDERS: Mapping[str, Contender] = {
    "envoy-least-request": Contender(envoy_words, "envoy", "envoy.yaml", _envoy),
    "envoy-hedge": Contender(
        *(envoy_words, "envoy", "envoy.yaml", _envoy, (0.015, 0.025, 0.05, 0.1)), copies=True
    ),
    "haproxy-leastconn": _haproxy_with(),
    "haproxy-timeout": _haproxy_with(0.05, 0.1, 0.25, 1.0),
    "nginx": Contender(
        *(lambda site: ["-e", str(site.folder / "start.log"), "-c", "FILE"], "nginx", "nginx.conf"),
        _nginx,
    ),
    "vllm-router": Contender(_vllm_router, "vllm-router", only="streams"),
    "ours-uncoded": _ours("--policy", "uncoded"),
    "ours-hedge": _ours("--policy", "hedge"),
    "ours-members": _ours("--policy", "hedge", members=True),
}
