"""What operators see of each upstream, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from codedinvnet.serving.gateway.calls import STOPPED
from codedinvnet.serving.metrics import LATENCY_BUCKETS, forget_labels, remember_labels

OK, ERROR, FAILED = "ok", "error", "failed"
RESULTS = (OK, ERROR, FAILED, STOPPED)
"""How calls end, for the metrics."""
SENT, REFUSED = "sent", "refused"
"""What the budget of retries says to a call that an upstream failed."""


class UpstreamMetrics:
    """What operators see of each upstream."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.calls = Counter(
            "codedinvnet_upstream_calls",
            "Calls by upstream and result: ok, error (its answer to a bad request), failed, "
            "stopped (nobody needs its answer, or the upstream was removed).",
            ["upstream", "result"],
            registry=registry,
        )
        self.seconds = Histogram(
            "codedinvnet_upstream_seconds",
            "From sending a call to an upstream until its answer, or until it was waited for no "
            "more.",
            ["upstream"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.retries = Counter(
            "codedinvnet_upstream_retries",
            "Calls that an upstream failed: sent again, or refused that by the budget of retries.",
            ["result"],
            registry=registry,
        )
        for result in (SENT, REFUSED):
            self.retries.labels(result)
        self.up = Gauge(
            "codedinvnet_upstream_up",
            "1 if calls are sent to the upstream, 0 if it is set aside.",
            ["upstream"],
            registry=registry,
        )
        self.differs = Gauge(
            "codedinvnet_upstream_differs",
            "1 if the upstream's model is not the protected one: the small backup does not answer.",
            ["upstream"],
            registry=registry,
        )
        remember_labels(self.calls, self.seconds)

    def expect(self, url: str) -> None:
        """Create an upstream's labels, those that `forget` removes among them."""
        self.seconds.labels(url)
        self.up.labels(url)
        self.differs.labels(url)
        for result in RESULTS:
            self.calls.labels(url, result)

    def forget(self, url: str) -> None:
        """Remove an upstream's labels."""
        for result in RESULTS:
            self.calls.remove(url, result)
        self.seconds.remove(url)
        forget_labels(self.calls, self.seconds)
