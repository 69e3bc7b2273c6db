"""Prometheus evaluates the alert rules over what real gateways expose, sound ones and others."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import promql_parser
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.support import INFER, V2, Handler, Running, Upstream, gateway
from tests.upstream import saying

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "alerts.yaml"
RULES = yaml.safe_load(FILE.read_text())["groups"][0]["rules"]
PROMTOOL = shutil.which("promtool")
MINUTES = 30
prometheus = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")

Scrape: TypeAlias = dict[tuple[str, str], float]
"""A sample's name and its labels, as they are written -> its value."""


def scrape(running: Running, instance: str = "a:9000") -> Scrape:
    """Return what a gateway exposes, with the labels that Prometheus adds."""
    assert running.gateway.admin is not None
    running.gateway.admin.update_gauges()
    found: Scrape = {}
    text = generate_latest(running.gateway.metrics.registry).decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {"job": "gateway", "instance": instance, **sample.labels}
            written = ", ".join(f'{name}="{value}"' for name, value in labels.items())
            found[sample.name, written] = sample.value
    return found


def fires(folder: Path, *scrapes: Scrape, expected: set[str], minutes: int = MINUTES) -> None:
    """Check which alerts fire in the end, if the scrapes lie so many minutes apart."""
    is_counter = re.compile(r"_(total|count|bucket|sum)$")
    series = []
    for name, labels in set().union(*scrapes):
        points = [one.get((name, labels), 0.0) for one in scrapes]
        parts = [f"{points[0]}x1"]
        for before, after in pairwise(points):
            step = (after - before) / minutes if is_counter.search(name) else 0.0
            parts.append(f"{before + step if step else after}+{step}x{minutes - 1}")
        series.append({"series": f"{name}{{{labels}}}", "values": " ".join(parts)})
    query = 'group by (alertname) (ALERTS{alertstate="firing"})'
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(expected)]
    at = f"{minutes * (len(scrapes) - 1)}m"
    test = {
        "interval": "1m",
        "input_series": series,
        "promql_expr_test": [{"expr": query, "eval_time": at, "exp_samples": samples}],
    }
    path = folder / "test.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(FILE)], "tests": [test]}))
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, "test", "rules", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


async def load(running: Running, path: str = "/any", count: int = 40) -> None:
    for _ in range(count):
        await running.ask("POST", path, INFER)


@prometheus
async def test_a_sound_gateway_is_silent(tmp_path: Path) -> None:
    async with gateway(Upstream(), Upstream()) as g:
        await load(g)
        await load(g, V2)
        first = scrape(g)
        await load(g)
        await load(g, V2)
        fires(tmp_path, first, scrape(g), expected=set())


@prometheus
@pytest.mark.parametrize("path", ["/any", V2])
async def test_errors_that_clients_see(path: str, tmp_path: Path) -> None:
    """Also those that are passed on as upstreams gave them."""
    async with gateway(*[saying(b"no", 500)] * 2) as g:
        await load(g, path, 4)
        first = scrape(g)
        await load(g, path)
        fires(tmp_path, first, scrape(g), expected={"GatewayErrors"})


@prometheus
@pytest.mark.parametrize("left", [0, 1])
async def test_upstreams_that_are_away(left: int, tmp_path: Path) -> None:
    async with gateway(Upstream(), Upstream(), deadline_ms=500.0, policy="uncoded") as g:
        await load(g, V2)
        first = scrape(g)
        for upstream in g.upstreams[left:]:
            await upstream.stop()
        await load(g, V2)
        all_away = {"GatewayErrors", "GatewayWithoutUpstreams"} if not left else set()
        fires(tmp_path, first, scrape(g), expected={"GatewayUpstreamAway", *all_away})


@prometheus
async def test_a_route_that_became_slow(tmp_path: Path) -> None:
    handlers: list[Handler] = [lambda *_: kind[0](*_)] * 2
    kind: list[Handler] = [Upstream().handler]
    async with gateway(*handlers, policy="uncoded", slots=40) as g:
        scrapes = [scrape(g)]
        for handler, clients in ((kind[0], 10), (saying(after=0.2), 40)):
            kind[0] = handler
            await asyncio.gather(*(load(g, count=800 // clients) for _ in range(clients)))
            scrapes.append(scrape(g))
        fires(tmp_path, *scrapes, expected={"GatewaySlow"})


@prometheus
@pytest.mark.parametrize(
    ("alert", "metric", "part", "value"),
    [
        ("GatewayQueue", "codedinvnet_gateway_queued", "", 3),
        ("GatewayDecidesAlone", "codedinvnet_gateway_members", "", 1),
        ("GatewayUpstreamLimited", "codedinvnet_gateway_attempts_total", "limited", 10),
        ("GatewayCopiesRefused", "codedinvnet_gateway_hedges_total", "refused", 10),
    ],
)
async def test_what_one_metric_says(
    alert: str, metric: str, part: str, value: int, tmp_path: Path
) -> None:
    """Of two gateways; one has this value."""
    first, last = await two_scrapes()
    fires(tmp_path, first, last, expected=set())
    last[next(key for key in last if key[0] == metric and part in key[1])] = value
    fires(tmp_path, first, last, expected={alert})


@prometheus
async def test_a_gateway_that_ends_again_and_again(tmp_path: Path) -> None:
    first, last = await two_scrapes()
    starts = [key for key in last if key[0] == "process_start_time_seconds"][:1]
    again = [last | dict.fromkeys(starts, time) for time in range(3)]
    fires(tmp_path, first, again[0], expected=set(), minutes=5)
    fires(tmp_path, first, *again, expected={"GatewayRestarts"}, minutes=5)


async def two_scrapes() -> list[Scrape]:
    """Return what two sound gateways expose before and after some requests."""
    scrapes = []
    async with gateway(Upstream(), Upstream()) as g:
        for _ in range(2):
            await load(g, V2)
            scrapes.append(scrape(g) | scrape(g, "b:9000"))
    return scrapes


async def test_the_rules_name_only_what_there_is() -> None:
    async with gateway(Upstream(), Upstream()) as g:
        await load(g, V2)
        samples = scrape(g)
    known: dict[str, set[str]] = {}
    for name, labels in samples:
        known.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    for rule in RULES:
        expression = promql_parser.parse(rule["expr"])
        asked = {selector.name: selector for selector in selectors(expression)}
        assert asked
        for name, selector in asked.items():
            matched = {matcher.name for matcher in selector.matchers.matchers}
            assert matched <= known[name], rule["alert"]
        grouped = re.findall(r"(?:by|on) \(([^)]*)\)", rule["expr"])
        shown = re.findall(r"\$labels\.(\w+)", yaml.safe_dump(rule["annotations"]))
        used = {*(label for group in grouped for label in group.split(", ")), *shown}
        assert used <= set().union(*(known[name] for name in asked)), rule["alert"]


def selectors(node: Any) -> Iterator[Any]:
    """Return the selectors of vectors in an expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("lhs", "rhs", "expr", "vector_selector", "args"):
        below = getattr(node, name, None) or ()
        for each in below if isinstance(below, list) else [below]:
            if each != ():
                yield from selectors(each)


def test_each_rule_says_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) <= 10
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "action", "runbook"} == set(rule["annotations"])
        page, _, section = rule["annotations"]["runbook"].partition("#")
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.M)
        assert section in {heading.lower().replace(" ", "-") for heading in headings}
