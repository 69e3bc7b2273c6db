"""Which upstreams there are, which of them are up, and how ejected ones come back.

An upstream is ejected when it refuses connections, when it does not say that it is ready, when it
fails several requests in a row while another fails none, or when it fails more of a route's
requests than the others do (`outliers`). It gets nothing but probes then, and comes back when one
is answered over HTTP; on probation, the first failure ejects it again. What was ejected for its
answers is away for longer each time, since probes say little about them, or for as long as its
`Retry-After` says.

One whose answers cannot be trusted (`Endpoint.distrust`) comes back only after it was seen to
restart: its connections were closed, or it refused one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from codedinvnet.gateway.calls import Cause, Failure
from codedinvnet.gateway.metrics import GatewayMetrics, RollingQuantiles
from codedinvnet.gateway.outliers import Outliers
from codedinvnet.net.background import Background
from codedinvnet.net.client import HttpClient, described, open_socket
from codedinvnet.net.logs import Lasting, Quiet, log_event

MOST_FAILURES = 3
"""Failed requests in a row that eject an upstream, unless all upstreams fail."""
PERIOD, PROBE_TIMEOUT = 1.0, 1.0
"""Seconds between probes of upstreams that have answered nothing since, and for an answer."""
MOST_SILENT = 2
"""Probes in a row without success that eject an upstream."""
DELAYS = (0.1, 0.25, 0.5, 1.0)
"""Seconds until an ejected upstream is probed again, the more the oftener it was ejected."""
AWAY, LONGEST_AWAY = 1.0, 60.0
"""Seconds that an upstream is away which answers probes but fails requests: at first, doubled each
time, and at most. A minute costs little, and few clients wait longer for a `Retry-After`."""
MOST_EJECTED = 0.7
"""The largest share of the upstreams that is ejected for its answers: two of three, one of two. If
more fail, the fault is likely to be in what they share, and the others would be overrun."""
STEADY = 30.0
"""Seconds up, after which earlier ejections are forgotten."""
START_TIMEOUT = 2.0
"""Seconds that the start waits for upstreams."""
SILENCE = 2.0
"""Seconds without a byte after which a connection that shows a restart is replaced."""
FORGOTTEN = 300.0
"""Seconds after which the metrics of an upstream that was removed are."""
LIMITED = "limited"
"""How an attempt ended that was answered by 429: the upstream has too much to do, not a fault."""
V2_READY = "/v2/health/ready"
UNKNOWN = frozenset({301, 302, 303, 307, 308, 401, 403, 404, 405, 501})
"""Statuses of a server that does not know `V2_READY`."""


class Endpoint:
    """One upstream.

    Args:
        url: as the user gave it.
        client: sends requests to it.
        worker: its place, as the scheduler numbers workers.
        metrics: where its attempts are counted.

    Attributes:
        is_fallback: whether it is a cheaper server for late requests.
        is_up: whether it gets requests.
        is_trusted: whether its answers are certain to be those of their requests.
        on_probation: whether it has answered nothing since it was ejected.
        sheds_until: when it may take again what others have shed (429).
        failures: requests in a row that it failed.
        heard: when it last answered a request.
        answered_at: when it last answered as a sound server does, or said that it is ready.
    """

    def __init__(self, url: str, client: HttpClient, worker: int, metrics: GatewayMetrics) -> None:
        self.url, self.client, self.worker, self.metrics = url, client, worker, metrics
        self.is_fallback = self.is_up = self.on_probation = False
        self.is_trusted = True
        self.failures = self.silent = self.ejections = 0
        self.sheds_until = 0.0
        self.heard = self.answered_at = self.since = 0.0
        self.has_v2: bool | None = None
        """Whether it knows `V2_READY`; None before that is known."""
        self.reason = ""
        """Why it is ejected."""
        self.on_distrust: Callable[[Endpoint, str], None] | None = None
        self._results = {
            result: metrics.attempts.labels(url, result)
            for result in ("ok", "error", *(cause.value for cause in Cause), LIMITED, "cancelled")
        }
        for cause in Cause:
            metrics.ejections.labels(url, cause.value)
        self._seconds = metrics.attempt_seconds.labels(url)
        metrics.up.labels(url).set(0)
        metrics.in_flight.labels(url).set(0)
        self.latencies = RollingQuantiles()

    def answered(self, began: float, now: float, is_ok: bool) -> None:
        """Record an answer to a request that was sent at a time."""
        self.heard = now
        if is_ok:
            self.answered_at, self.failures, self.silent = now, 0, 0
            self.on_probation = False

    def count(self, result: str, seconds: float) -> None:
        """Count an attempt that has ended."""
        self._results[result].inc()
        self._seconds.observe(seconds)
        self.latencies.add(seconds)

    def doubt(self) -> None:
        """Have it probed over HTTP: the kernel accepts connections for a hung process as well."""
        self.has_v2 = self.has_v2 or None

    def distrust(self, reason: str) -> None:
        """Its answers may be those of other requests."""
        if self.on_distrust is not None:
            self.on_distrust(self, reason)

    def forget(self) -> None:
        """Remove its metrics."""
        for result in self._results:
            self.metrics.attempts.remove(self.url, result)
        for cause in Cause:
            self.metrics.ejections.remove(self.url, cause.value)
        self.metrics.attempt_seconds.remove(self.url)


class Cluster:
    """The upstreams, each at a place that is a worker of the scheduler.

    Args:
        open_client: returns what sends requests to the server at a URL.
        places: how many upstreams there may be.
        metrics: where ejections are counted.
        health: the path that is probed; None: V2's readiness where it exists, else a connection.
        fallback: the URL of a cheaper server, which has the last place; None without one.

    Attributes:
        endpoints: by place; None where there is none.
        on_lost: called when an endpoint is ejected, with why, and whether its answers still count.
        on_up: called when one takes requests.
    """

    def __init__(
        self,
        open_client: Callable[[str], HttpClient],
        places: int,
        metrics: GatewayMetrics,
        health: str | None = None,
        fallback: str | None = None,
    ) -> None:
        self.open_client, self.metrics, self.health = open_client, metrics, health
        self.endpoints: list[Endpoint | None] = [None] * places
        self.mains = places
        if fallback is not None:
            cheap = self._open(fallback, places)
            cheap.is_fallback = True
            self.endpoints.append(cheap)
        self.on_lost: Callable[[Endpoint, str, bool], None] = lambda *_: None
        self.on_up: Callable[[Endpoint], None] = lambda _: None
        self.watch = Watch(self)
        self.outliers = Outliers()
        self._left_out: set[str] = set()
        self._background = Background()

    def _open(self, url: str, worker: int, client: HttpClient | None = None) -> Endpoint:
        endpoint = Endpoint(url, client or self.open_client(url), worker, self.metrics)
        endpoint.on_distrust = self._distrust
        return endpoint

    def __iter__(self) -> Iterator[Endpoint]:
        return (endpoint for endpoint in self.endpoints if endpoint is not None)

    @property
    def is_ready(self) -> bool:
        """Whether an upstream is up."""
        return any(endpoint.is_up for endpoint in self)

    def takes(self, may_fall_back: bool) -> bool:
        """Return whether an upstream is up that a request may go to: each asks this first."""
        for endpoint in self.endpoints:
            if endpoint is not None and endpoint.is_up and not endpoint.is_fallback:
                return True
        return may_fall_back and self.is_ready

    def has_others(self, endpoint: Endpoint) -> bool:
        """Return whether another upstream is up."""
        return any(other.is_up and other is not endpoint for other in self.mains_here())

    def mains_here(self) -> Iterator[Endpoint]:
        """Return the upstreams, without the fallback."""
        return (endpoint for endpoint in self if not endpoint.is_fallback)

    # Coming and going

    def fill(self, urls: Sequence[str]) -> None:
        """Have these upstreams at first; `start` looks at them."""
        for place, url in enumerate(urls):
            self.endpoints[place] = self._open(url, place)

    async def start(self) -> None:
        """Find out which upstreams are up, and watch them from now on."""
        looks = [asyncio.ensure_future(self.watch.first_look(endpoint)) for endpoint in self]
        if looks:
            await asyncio.wait(looks, timeout=START_TIMEOUT + PROBE_TIMEOUT)
            self._note_if_down()
        self._background.spawn(self.watch.watch())

    def change(self, urls: Sequence[str]) -> None:
        """Have these upstreams from now on; the last have no place if there are too many.

        Raises:
            UserError: if one is no URL; all is left as it was.
        """
        here = {endpoint.url: endpoint for endpoint in self.mains_here()}
        coming = [url for url in dict.fromkeys(urls) if url not in here]
        gone = [endpoint for url, endpoint in here.items() if url not in urls]
        free = self.mains - len(here) + len(gone)
        opened = [(url, self.open_client(url)) for url in coming[:free]]
        for url in coming[free:]:
            if url not in self._left_out:
                log_event("no place for an upstream", logging.WARNING, upstream=url)
        self._left_out = set(coming[free:])
        for endpoint in gone:
            self._remove(endpoint)
        for url, client in opened:
            place = self.endpoints.index(None)
            endpoint = self.endpoints[place] = self._open(url, place, client)
            endpoint.reason = "it is new"
            log_event("upstream added", upstream=url)
            self._background.spawn(self.watch.recover(endpoint, 0.0))

    def _remove(self, endpoint: Endpoint) -> None:
        self.endpoints[endpoint.worker] = None
        endpoint.is_up = False
        self.outliers.forget(endpoint.worker)
        self.on_lost(endpoint, "it was removed", True)
        endpoint.client.close()
        self.metrics.up.remove(endpoint.url)
        self.metrics.in_flight.remove(endpoint.url)
        log_event("upstream removed", upstream=endpoint.url)
        asyncio.get_running_loop().call_later(FORGOTTEN, self._forget, endpoint)

    def _forget(self, endpoint: Endpoint) -> None:
        if all(other.url != endpoint.url for other in self):
            endpoint.forget()

    def is_here(self, endpoint: Endpoint) -> bool:
        """Return whether an endpoint was not removed."""
        return self.endpoints[endpoint.worker] is endpoint

    # Ejection

    def blame(self, endpoint: Endpoint, failure: Failure) -> None:
        """Record a failure, and eject the endpoint if it is to blame."""
        if failure.cause in (Cause.LOST, Cause.NO_FILES) or not self.is_here(endpoint):
            return
        endpoint.failures += 1
        if failure.cause is Cause.SILENT:
            endpoint.doubt()
        if not endpoint.is_up:
            return
        if failure.cause is Cause.UNSENT:
            self.eject(endpoint, failure)
            return
        others = [other for other in self.mains_here() if other is not endpoint and other.is_up]
        sound = any(other.failures == 0 and other.heard for other in others)
        if sound and (endpoint.on_probation or endpoint.failures >= MOST_FAILURES):
            self.eject(endpoint, failure)

    def compare(
        self, endpoint: Endpoint, route: str, seconds: float, failure: Failure | None
    ) -> None:
        """Take in an answer to a request that went to one upstream only, and eject an outlier.

        Args:
            endpoint: that answered.
            route: that the request came on.
            seconds: that it took.
            failure: its error; None if it answered as a sound server does.
        """
        if not self.is_here(endpoint):
            return
        now, others = time.monotonic(), self._compared(endpoint) if failure else set()
        why = self.outliers.took(
            now, route, endpoint.worker, seconds, failure is not None, others, endpoint.on_probation
        )
        if why is not None and failure is not None:
            self.eject(endpoint, failure._replace(reason=f"{failure.reason}; {why}"))

    def _compared(self, endpoint: Endpoint) -> set[int]:
        """Return with which upstreams one is compared: none if it must not be ejected."""
        mains = list(self.mains_here())
        up = {other.worker for other in mains if other.is_up}
        if endpoint.worker not in up or 1 + len(mains) - len(up) > MOST_EJECTED * len(mains):
            return set()
        return up - {endpoint.worker}

    def eject(self, endpoint: Endpoint, failure: Failure) -> None:
        """Send an endpoint nothing but probes until one succeeds."""
        if not endpoint.is_up:
            return
        endpoint.is_up = False
        endpoint.doubt()
        endpoint.client.close_idle()
        self.outliers.forget(endpoint.worker)
        away = failure.retry_after if failure.cause is Cause.STATUS else 0.0
        self.note_ejection(endpoint, failure.cause.value, failure.reason, away)
        self._note_if_down()
        self.on_lost(endpoint, failure.reason, endpoint.is_trusted)

    def note_ejection(self, endpoint: Endpoint, cause: str, reason: str, away: float = 0.0) -> None:
        """Count an ejection, and probe the endpoint after some seconds, at least those given."""
        now = time.monotonic()
        endpoint.ejections = endpoint.ejections + 1 if now - endpoint.since < STEADY else 1
        endpoint.reason = reason
        self.metrics.up.labels(endpoint.url).set(0)
        self.metrics.ejections.labels(endpoint.url, cause).inc()
        url = endpoint.url
        log_event("upstream ejected", logging.WARNING, upstream=url, cause=cause, reason=reason)
        delay = DELAYS[min(endpoint.ejections, len(DELAYS)) - 1]
        if cause == Cause.STATUS.value and endpoint.is_trusted:
            doublings = min(endpoint.ejections - 1, 10)  # beyond, all are the longest
            delay = min(AWAY * 2.0**doublings, LONGEST_AWAY)
        delay = min(max(delay, away), LONGEST_AWAY)
        self._background.spawn(self.watch.recover(endpoint, delay))

    def suspect(self, place: int, reason: str) -> None:
        """Eject an upstream as another gateway has, unless it has answered well just now."""
        endpoint = self.endpoints[place]
        if endpoint is None or not endpoint.is_up:
            return
        if endpoint.failures or time.monotonic() - endpoint.answered_at > PERIOD:
            self.eject(endpoint, Failure(Cause.LOST, f"of another gateway: {reason}"))

    def _note_if_down(self) -> None:
        if not any(endpoint.is_up for endpoint in self.mains_here()):
            log_event("no upstream is up", logging.ERROR)

    def _distrust(self, endpoint: Endpoint, reason: str) -> None:
        if not endpoint.is_trusted:
            return
        endpoint.is_trusted = False
        was_up = endpoint.is_up
        self.eject(endpoint, Failure(Cause.STATUS, reason))
        if not was_up:  # it was ejected for something else: what it has in hand is lost now
            endpoint.client.close_idle()
            self.on_lost(endpoint, reason, False)
        log_event("upstream must restart", logging.ERROR, upstream=endpoint.url, reason=reason)

    async def until_restart(self, endpoint: Endpoint) -> None:
        """Return once an endpoint was seen to restart.

        A server that ends closes a connection on which nothing was sent, or refuses the next one.
        Each is replaced before a server would close it for its silence.
        """
        loop, client = asyncio.get_running_loop(), endpoint.client
        with ExitStack() as kept:
            while self.is_here(endpoint):
                try:
                    opened = await open_socket(client.origin, client.resolver)
                except ConnectionRefusedError:
                    return
                except OSError:  # it may be stopped
                    await asyncio.sleep(PERIOD)
                    continue
                kept.close()
                kept.enter_context(opened)
                try:
                    while await asyncio.wait_for(loop.sock_recv(opened, 1024), SILENCE):
                        pass
                    return
                except TimeoutError:
                    continue
                except OSError:
                    return

    # Probes

    async def probe(self, endpoint: Endpoint) -> str:
        """Return why an endpoint is not ready; "" if it is."""
        try:
            if self.health is not None:
                answer = await endpoint.client.ask("GET", self.health, PROBE_TIMEOUT)
                return "" if 200 <= answer.status < 300 else f"{self.health}: {answer.status}"
            if endpoint.has_v2 is not False:
                answer = await endpoint.client.ask("GET", V2_READY, PROBE_TIMEOUT)
                if answer.status == 200:
                    endpoint.has_v2 = True
                    return ""
                if endpoint.has_v2 or answer.status not in UNKNOWN:
                    return f"{V2_READY}: {answer.status}"
                endpoint.has_v2 = False
            else:
                endpoint.client.keep(await endpoint.client.connect())
        except OSError as error:
            return described(error)
        return ""

    async def stop(self) -> None:
        """Probe no more, and close all connections."""
        await self._background.stop()
        for endpoint in self:
            endpoint.client.close()


class Watch:
    """Looks at upstreams at the start, while they are quiet, and until they are back.

    A probe that raises is our own mistake: it is logged, and ends no other probe.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._mistakes = Quiet()

    async def _probe(self, endpoint: Endpoint) -> tuple[str, bool]:
        """Return why an endpoint is not ready ("" if it is), and whether it said so itself."""
        try:
            return await self.cluster.probe(endpoint), True
        except Exception as error:
            reason = described(error)
            url = endpoint.url
            self._mistakes.log(
                "probe failed", logging.ERROR, reason=reason, upstream=url, error=error
            )
            return reason, False

    async def first_look(self, endpoint: Endpoint) -> None:
        """Find out whether an endpoint is up when the gateway starts."""
        cluster = self.cluster
        reason, _ = await self._probe(endpoint)
        log_event("upstream added", upstream=endpoint.url)
        if reason:
            cluster.on_lost(endpoint, reason, True)
            cluster.note_ejection(endpoint, Cause.UNSENT.value, reason)
        else:
            endpoint.is_up, endpoint.since = True, time.monotonic()
            cluster.metrics.up.labels(endpoint.url).set(1)

    async def recover(self, endpoint: Endpoint, delay: float) -> None:
        """Probe an ejected endpoint until it is ready again."""
        cluster = self.cluster
        step = max(0, endpoint.ejections - 1)
        failing = Lasting()
        while True:
            await asyncio.sleep(delay)
            if not cluster.is_here(endpoint):
                return
            if not endpoint.is_trusted:
                await cluster.until_restart(endpoint)
                endpoint.is_trusted = True
            reason, _ = await self._probe(endpoint)
            if not cluster.is_here(endpoint):
                return
            if not reason and endpoint.is_trusted:
                break
            step = min(step + 1, len(DELAYS) - 1)
            delay, endpoint.reason = DELAYS[step], reason
            if reason:
                url = endpoint.url
                failing.log("upstream is not ready", logging.WARNING, reason=reason, upstream=url)
        now = time.monotonic()
        endpoint.is_up = endpoint.on_probation = True
        endpoint.silent, endpoint.since, endpoint.answered_at = 0, now, now
        cluster.metrics.up.labels(endpoint.url).set(1)
        log_event("upstream is up", upstream=endpoint.url)
        cluster.on_up(endpoint)

    async def watch(self) -> None:
        """Probe upstreams that have not answered for a while, for ever."""
        cluster = self.cluster
        while True:
            await asyncio.sleep(PERIOD)
            now = time.monotonic()
            quiet = [one for one in cluster if one.is_up and now - one.answered_at > PERIOD]
            await asyncio.gather(*map(self.look, quiet))

    async def look(self, endpoint: Endpoint) -> None:
        """Probe an endpoint that is up, and eject it if it was silent too often."""
        cluster = self.cluster
        reason, is_told = await self._probe(endpoint)
        if not endpoint.is_up or not is_told or not cluster.is_here(endpoint):
            return
        if not reason:
            endpoint.silent, endpoint.answered_at = 0, time.monotonic()
            return
        endpoint.silent += 1
        if endpoint.silent >= MOST_SILENT:
            cluster.eject(endpoint, Failure(Cause.SILENT, reason))
