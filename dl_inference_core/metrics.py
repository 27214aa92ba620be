"""Every counter and histogram, one object, handed in."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """The metrics of one process. Safe from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "dl_inference_requests",
            "Requests answered, by protocol, upstream (the model's or route's name) and gRPC status.",
            ("protocol", "upstream", "code"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "dl_inference_request_seconds",
            "Seconds from a request's arrival to its answer.",
            ("protocol", "upstream"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._attempts = Counter(
            "dl_inference_attempts",
            "Attempts at nodes, by route, node and outcome (success, failure, overload, neutral).",
            ("route", "node", "outcome"),
            registry=self._registry,
        )
        self._tasks = Gauge(
            "dl_inference_asyncio_tasks",
            "Tasks of the event loop, as they were when the metrics were asked for.",
            registry=self._registry,
        )
        # labels() costs more than all the rest of a request's accounting.
        self._of_requests: dict[tuple[str, str, str], tuple[Counter, Histogram]] = {}
        self._of_attempts: dict[tuple[str, str, str], Counter] = {}

    def request(self, protocol: str, upstream: str, code: str, seconds: float) -> None:
        """A request was answered; `upstream` is "" where the routing key named none."""
        key = (protocol, upstream, code)
        children = self._of_requests.get(key)
        if children is None:
            children = self._of_requests[key] = (
                self._requests.labels(*key),
                self._seconds.labels(protocol, upstream),
            )
        counter, histogram = children
        counter.inc()
        histogram.observe(seconds)

    def attempt(self, route: str, node: str, outcome: str) -> None:
        """An attempt at a node ended."""
        key = (route, node, outcome)
        counter = self._of_attempts.get(key)
        if counter is None:
            counter = self._of_attempts[key] = self._attempts.labels(*key)
        counter.inc()

    def tasks(self, count: int) -> None:
        """The event loop has `count` tasks now."""
        self._tasks.set(count)

    def render(self, accept: str) -> tuple[bytes, str]:
        """All of them in the format of Prometheus or OpenMetrics that an HTTP Accept header prefers; and its media
        type."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type
