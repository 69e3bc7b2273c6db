"""What operators are given: manifests, the image and the dashboard, against the package itself."""

from __future__ import annotations

import asyncio
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import kubernetes_validate
import numpy as np
import promql_parser
import pytest
import tritonclient.http.aio as triton
import yaml
from dockerfile_parse import DockerfileParser
from prometheus_client.parser import text_string_to_metric_families

from codedinvnet.cli.command_line import build_parser
from codedinvnet.cli.options import options_of
from codedinvnet.gateway.options import MIB, GatewayOptions
from codedinvnet.gateway.run import running as gateway_running
from codedinvnet.net.client import parse_origin
from codedinvnet.net.listening import free_port
from codedinvnet.serving.app import running as serve_running
from codedinvnet.serving.config import ServeOptions
from tests.gateway.support import INFER, V2, gateway
from tests.gateway.test_run import make_pair
from tests.observing import set_proxy
from tests.upstream import Upstream

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROJECT = (ROOT / "pyproject.toml").read_text()
SOCKET = "codedinvnet-gateway.socket"
NEWEST = kubernetes_validate.latest_version()
TEXT = (DEPLOY / "kubernetes" / "gateway.yaml").read_text()
MANIFESTS = list(yaml.safe_load_all(TEXT))
WITH_TOKEN = list(yaml.safe_load_all(TEXT.replace("#token ", "")))
MONITOR, AUTOSCALER = yaml.safe_load_all((DEPLOY / "kubernetes" / "monitoring.yaml").read_text())


def found(kind: str, name: str, among: Any = MANIFESTS) -> Any:
    (manifest,) = (m for m in among if (m["kind"], m["metadata"]["name"]) == (kind, name))
    return manifest


POD = found("Deployment", "resnet-gateway")["spec"]["template"]
CONTAINER = POD["spec"]["containers"][0]
PORTS = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}


@pytest.fixture
def config(tmp_path: Path) -> GatewayOptions:
    """Return the gateway's settings, as its container would read them."""
    (volume,) = (v for v in POD["spec"]["volumes"] if "configMap" in v)
    (mount,) = (m for m in CONTAINER["volumeMounts"] if m["name"] == volume["name"])
    data = found("ConfigMap", volume["configMap"]["name"])["data"]
    named = build_parser().parse_args(CONTAINER["args"]).config
    assert str(Path(named).parent) == mount["mountPath"]
    path = tmp_path / Path(named).name
    path.write_text(data[path.name])
    words = [str(path) if word == named else word for word in CONTAINER["args"]]
    return options_of(build_parser().parse_args(words), GatewayOptions)


async def status(address: str, path: str, **headers: str) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.get(address + path, headers=headers) as reply,
    ):
        return reply.status


@pytest.mark.parametrize(
    "manifest",
    [*MANIFESTS, *WITH_TOKEN, AUTOSCALER],
    ids=lambda m: f"{m['kind']} {m['metadata']['name']}",
)
def test_kubernetes_takes_each_manifest(manifest: Any) -> None:
    kubernetes_validate.validate(manifest, NEWEST, strict=True)


def test_the_gateways_settings_fit_its_manifests(config: GatewayOptions) -> None:
    ports = {"http": config.port, "admin": config.admin_port, "members": config.member_port}
    assert ports == PORTS
    assert config.host == "0.0.0.0"
    (upstream,) = config.upstream
    match = re.fullmatch(r"dns\+http://([\w-]+):(\d+)", upstream)
    assert match is not None
    headless = found("Service", match[1])["spec"]
    assert headless["clusterIP"] == "None"
    assert [port["port"] for port in headless["ports"]] == [int(match[2])]
    match = re.fullmatch(r"dns\+([\w-]+):(\d+)", config.members or "")
    assert match is not None
    headless = found("Service", match[1])["spec"]
    assert headless["clusterIP"] == "None"
    assert headless["publishNotReadyAddresses"], "they find each other before upstreams are up"
    assert headless["selector"] == POD["metadata"]["labels"]
    assert int(match[2]) == config.member_port
    labels, service = POD["metadata"]["labels"], found("Service", "resnet")["spec"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert found(kind, "resnet-gateway")["spec"]["selector"]["matchLabels"] == labels
    assert service["selector"] == labels
    assert {p["port"]: PORTS[p["targetPort"]] for p in service["ports"]} == {8000: 8000}
    let_in = found("NetworkPolicy", "resnet-gateway")["spec"]
    assert let_in["podSelector"]["matchLabels"] == labels
    assert [
        [p["port"] for p in rule["ports"]] for rule in let_in["ingress"] if "from" not in rule
    ] == [["http"]]
    (term,) = POD["spec"]["affinity"]["podAntiAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    assert term["labelSelector"]["matchLabels"] == labels
    assert MONITOR["spec"]["selector"]["matchLabels"] == labels
    target = AUTOSCALER["spec"]["scaleTargetRef"]
    assert (
        found(target["kind"], target["name"])["spec"]["replicas"]
        == (AUTOSCALER["spec"]["minReplicas"])
    )
    limit = re.fullmatch(r"(\d+)Gi", CONTAINER["resources"]["limits"]["memory"])
    assert limit is not None
    assert int(limit[1]) * 1024 * MIB > 1.1 * config.memory + 256 * MIB
    probe = CONTAINER["readinessProbe"]
    assert config.drain_notice_ms / 1000 > probe["periodSeconds"] * probe["failureThreshold"]
    drained = (config.drain_notice_ms + config.drain_ms) / 1000
    assert POD["spec"]["terminationGracePeriodSeconds"] > drained


async def test_probes_and_metrics_really_answer(config: GatewayOptions) -> None:
    """No pod is killed for want of upstreams; it only gets no traffic."""
    readiness = CONTAINER["readinessProbe"]["httpGet"]
    lives = [CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness")]
    (metrics,) = MONITOR["spec"]["podMetricsEndpoints"]
    assert {PORTS[probe["port"]] for probe in (readiness, *lives, metrics)} == {config.admin_port}

    upstream = Upstream()
    await upstream.start()
    options = config.model_copy(
        update={
            **{
                "upstream": (upstream.url,),
                "port": 0,
                "drain_notice_ms": 0.0,
                "deadline_ms": 500.0,
            },
            **{"members": None, "member_port": None, "member_token_file": None, "admin_port": 0},
        }
    )
    async with gateway_running(options) as found:
        address = found.admin_url.replace("0.0.0.0", "127.0.0.1")
        for path in (probe["path"] for probe in (readiness, metrics, *lives)):
            assert await status(address, path) == 200
        await upstream.stop()
        await status(found.url.replace("0.0.0.0", "127.0.0.1"), "/any")  # which nobody answers
        assert await status(address, readiness["path"]) == 503
        assert {await status(address, probe["path"]) for probe in lives} == {200}


def test_the_tokens_of_the_manifest_are_where_the_gateway_looks(config: GatewayOptions) -> None:
    pod = found("Deployment", "resnet-gateway", WITH_TOKEN)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    secrets = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
    files = [build_parser().parse_args(container["args"]).token_file, config.member_token_file]
    for file in map(Path, files):
        (mount,) = (m for m in container["volumeMounts"] if m["mountPath"] == str(file.parent))
        secret = secrets.pop(mount["name"])
        assert f"kubectl create secret generic {secret} --from-file={file.name}=" in TEXT
    assert not secrets


@pytest.mark.parametrize(
    ("kind", "drain_ms"),
    [
        ("gateway", GatewayOptions(upstream=("http://a:1",)).drain_ms),
        ("serve", ServeOptions(source="mnist").deadline_ms),
    ],
)
def test_a_unit_of_systemd_starts_its_program_and_lets_it_drain(kind: str, drain_ms: float) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / f"codedinvnet-{kind}.service")
    service = unit["Service"]
    command, *words = shlex.split(service["ExecStart"])
    options = build_parser().parse_args(words)
    assert Path(command).name == "codedinvnet"
    assert words[0] == kind
    assert Path(options.token_file).name == service["LoadCredential"].partition(":")[0]
    assert int(service["TimeoutStopSec"]) >= drain_ms / 1000 + 10


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for name in (*(f"codedinvnet-{kind}.service" for kind in ("gateway", "serve")), SOCKET):
        text = (DEPLOY / name).read_text().replace("/opt/codedinvnet/bin/codedinvnet", "/bin/true")
        (tmp_path / name).write_text(text)
    admin = (DEPLOY / SOCKET).read_text()
    own = "FileDescriptorName=admin\nService=codedinvnet-gateway.service"
    admin = admin.replace("127.0.0.1:9000", f"127.0.0.1:9001\n{own}")
    (tmp_path / "codedinvnet-gateway-admin.socket").write_text(admin)
    units = sorted(map(str, tmp_path.iterdir()))
    found = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")


RAY = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())["spec"]


def test_rays_pods_are_pods() -> None:
    (version,) = re.findall(r"ray\[serve\]==([\d.]+)", (DEPLOY / "kuberay.yaml").read_text())
    assert version == RAY["rayClusterConfig"]["rayVersion"]
    cluster = RAY["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        meta = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
        kubernetes_validate.validate({**meta, **group["template"]}, NEWEST, strict=True)
        pod = group["template"]["spec"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    head = groups[0]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert ports["serve"] == yaml.safe_load(RAY["serveConfigV2"])["http_options"]["port"]


def test_ray_serve_takes_the_application() -> None:
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    found = ServeDeploySchema(**yaml.safe_load(RAY["serveConfigV2"]))
    (application,) = found.applications
    module, _, name = application.import_path.partition(":")
    build = getattr(__import__(module, fromlist=[name]), name)
    assert isinstance(build(application.args), serve.Application)


DOCKER = DockerfileParser(str(DEPLOY / "Dockerfile"))
LINES: list[tuple[str, str]] = [(line["instruction"], line["value"]) for line in DOCKER.structure]


def last(instruction: str) -> str:
    return [value for name, value in LINES if name == instruction][-1]


def test_what_the_image_is_made_of_is_there() -> None:
    assert last("USER").split(":")[0] == str(POD["spec"]["securityContext"]["runAsUser"])
    let_in = {
        line.removeprefix("!")
        for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for value in (value for name, value in LINES if name == "COPY"):
        *sources, _ = value.split()
        if not sources[0].startswith("--from"):
            assert all((ROOT / source).exists() for source in sources)
            assert let_in.issuperset(sources)
    extras = re.findall(r"^(\w+) = \[", PROJECT.split("[project.optional-dependencies]")[1], re.M)
    commands = "".join((DEPLOY / name).read_text() for name in ("Dockerfile", "kuberay.yaml"))
    asked = re.findall(r"EXTRAS=([\w,]+)|\.\[([\w,]+)\]", commands)
    assert len(asked) == 3
    for names in asked:
        assert set("".join(names).split(",")) <= set(extras)
    assert json.loads(last("ENTRYPOINT"))[1:] == ["-m", "codedinvnet"]


def test_the_image_is_pinned() -> None:
    """Base images by their digests, packages by the versions that the tests pass with."""
    bases = [value for name, value in LINES if name == "FROM"]
    stages = {value.split()[-1] for value in bases}
    for base in (value.split()[0] for value in bases):
        assert base in stages or re.search(r"@sha256:[0-9a-f]{64}$", base)
    for value in (value for name, value in LINES if name == "RUN" and "pip install" in value):
        assert "--constraint constraints.txt" in value
    images = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["images"]
    assert [(image["name"], "latest" in image["newTag"]) for image in images] == (
        [(CONTAINER["image"], False)]
    )


def test_commands_in_the_comments_are_ours() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    found = re.findall(r"docker run .*? codedinvnet:[\d.]+ (.+)", text)
    assert found
    for command in found:
        options_of(build_parser().parse_args(shlex.split(command)), GatewayOptions)


async def test_the_images_health_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    assert Path(command[0]).name == "python3"

    settings = last("ENV")
    own = dict(word.split("=", 1) for word in shlex.split(settings))
    usual = {name: own[name] for name in ("PORT", "SCHEME", "LIVE", "HEALTHY")}
    set_proxy(monkeypatch)  # which is not asked

    async def code(port: int, **changed: str) -> int | None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command[1:],
            env={**os.environ, **usual, "PORT": str(port), **changed},
            stderr=subprocess.DEVNULL,
        )
        return await process.wait()

    async with gateway(Upstream(), deadline_ms=500.0) as g:
        port = g.client.origin.port
        ready = {"LIVE": "/readyz", "HEALTHY": "200"}
        assert (await code(port), await code(port, **ready)) == (0, 0)
        await g.upstreams[0].stop()
        await g.ask("GET", "/any")  # which nobody answers
        assert (await code(port), await code(port, **ready)) == (0, 1)
    assert await code(free_port()) != 0
    if shutil.which("openssl"):
        async with gateway(Upstream(), **make_pair(tmp_path)) as g:
            port = parse_origin(g.gateway.url).port
            assert (await code(port), await code(port, SCHEME="https")) == (1, 0)


async def _metrics(address: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{address}/metrics") as reply:
        return await reply.text()


@pytest.fixture(scope="module")
def metrics() -> dict[str, dict[str, set[str]]]:
    """The samples' names of a running gateway and of a running service -> labels -> values."""

    async def texts() -> list[str]:
        async with gateway(Upstream(), Upstream()) as g:
            for _ in range(30):
                await g.ask("POST", V2, INFER)
            one = await _metrics(g.gateway.url)
        options = ServeOptions(source="mnist", k=2, port=0, deadline_ms=30_000)
        async with serve_running(options) as (url, _):
            tensor = triton.InferInput("images", [2, 1, 28, 28], "UINT8")
            tensor.set_data_from_numpy(np.zeros((2, 1, 28, 28), np.uint8))
            async with triton.InferenceServerClient(url.removeprefix("http://")) as client:
                await client.infer("mnist", [tensor])
            return [one, await _metrics(url)]

    names: dict[str, dict[str, set[str]]] = {}
    for text in asyncio.run(texts()):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = names.setdefault(sample.name, {"instance": set(), "job": set()})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
    return names


def test_the_dashboard_names_only_what_there_is(metrics: dict[str, dict[str, set[str]]]) -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    variables = {one["name"]: one["query"] for one in dashboard["templating"]["list"]}
    for label in ("job", "instance"):
        query = variables[label]["query"]
        values = re.match(rf'label_values\({{__name__=~"(.*?)".*}}, {label}\)$', query)
        assert values is not None
        assert {name.split("_")[1] for name in metrics if re.fullmatch(values[1], name)} == {
            *("gateway", "pending")  # both have it
        }
    asked = set()
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", ())]
    for target in targets:
        query = target["expr"].replace("$__rate_interval", "5m")
        promql_parser.parse(query)
        found = re.findall(r"((?:codedinvnet|process)_\w+)(\{.*?\})?", query)
        assert found
        known: dict[str, set[str]] = {}
        for name, selector in found:
            assert selector.endswith('job=~"$job",instance=~"$instance"}'), query
            assert name in metrics, query
            known |= metrics[name]
            asked.add(name)
        grouped = ", ".join(re.findall(r"by \(([^)]*)\)", query))
        shown = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
        assert {*filter(None, grouped.split(", ")), *shown} <= set(known), query
        for label, values in re.findall(r'(\w+)=~?"([^"$]*)"', query):
            assert set(values.split("|")) <= known[label], query
    assert {"codedinvnet_gateway_hedges_total", "codedinvnet_gateway_hedge_delay_seconds"} <= asked


@pytest.fixture(scope="module")
def for_language_models() -> list[Any]:
    """Return the manifests for language models, as kubectl puts them together."""
    if (program := shutil.which("kustomize")) is None:
        pytest.skip("kustomize is not installed")
    words = [program, "build", "language-models"]
    return list(yaml.safe_load_all(subprocess.check_output(words, cwd=DEPLOY)))


def test_kubernetes_takes_the_manifests_for_language_models(for_language_models: Any) -> None:
    names = {(m["kind"], m["metadata"]["name"]) for m in MANIFESTS}
    assert {(m["kind"], m["metadata"]["name"]) for m in for_language_models} == names
    for manifest in for_language_models:
        kubernetes_validate.validate(manifest, NEWEST, strict=True)


def test_the_settings_for_language_models_fit(
    for_language_models: Any, config: GatewayOptions, tmp_path: Path
) -> None:
    data = found("ConfigMap", "resnet-gateway", for_language_models)["data"]
    (tmp_path / "own.json").write_text(data["gateway.json"])
    words = ["gateway", "--config", str(tmp_path / "own.json")]
    own = options_of(build_parser().parse_args(words), GatewayOptions)
    own.check()
    changed = {"affinity", "route", "health", "deadline_ms", "drain_ms"}
    assert {n for n in GatewayOptions.model_fields if getattr(own, n) != getattr(config, n)} == (
        changed
    )
    pod = found("Deployment", "resnet-gateway", for_language_models)["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > (own.drain_notice_ms + own.drain_ms) / 1000


COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]


def test_compose_starts_a_gateway_that_prometheus_and_grafana_watch() -> None:
    words = COMPOSE["gateway"]["command"]
    options = options_of(build_parser().parse_args(words), GatewayOptions)
    hosts = {parse_origin(url).host for url in options.upstream}
    assert hosts <= set(COMPOSE)
    settings = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())
    (job,) = settings["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"gateway:{options.admin_port}"]
    for service in COMPOSE.values():
        assert "build" in service or "@sha256:" in service["image"]
        for volume in service.get("volumes", ()):
            assert (DEPLOY / "compose" / volume.split(":")[0]).is_file()


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose isn't installed")
def test_compose_takes_its_file() -> None:
    words = ["docker-compose", "-f", str(DEPLOY / "compose" / "compose.yaml"), "config", "--quiet"]
    assert subprocess.run(words, check=False).returncode == 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_its_settings(tmp_path: Path) -> None:
    for file in (DEPLOY / "compose" / "prometheus.yml", DEPLOY / "alerts.yaml"):
        shutil.copy(file, tmp_path)
    words = ["promtool", "check", "config", str(tmp_path / "prometheus.yml")]
    assert subprocess.run(words, check=False).returncode == 0
