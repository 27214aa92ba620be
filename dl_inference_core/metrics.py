"""Every counter and histogram, one object, handed in."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from dl_inference_core.errors import Code

_Family: TypeAlias = "CounterMetricFamily | GaugeMetricFamily"
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_AT_ONCE = 256
"""Requests that are counted at one time. To sort their seconds takes 10 µs."""
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


Values: TypeAlias = Callable[[], Mapping[tuple[str, ...], float]]
"""Gives the values of a gauge or counter, by those of its labels. On the thread that asks for the metrics."""


class _Sampled(Collector):
    """A gauge or counter that costs nothing until it is asked for."""

    def __init__(self, kind: type[_Family], name: str, meaning: str, labels: Sequence[str], values: Values) -> None:
        self._kind = kind
        self._about = name, meaning
        self._labels = labels
        self._values = values

    def describe(self) -> list[Metric]:
        return [self._family()]

    def collect(self) -> list[Metric]:
        family = self._family()
        for values, number in self._values().items():
            family.add_metric(values, number)
        return [family]

    def _family(self) -> _Family:
        return self._kind(*self._about, labels=self._labels)


class RequestCounts:
    """The requests of one protocol for one upstream. Any thread.

    To count one that was answered takes 0.15 µs, because they are counted many at a time: a lock alone takes 0.2 µs.
    prometheus_client's own Counter and Histogram take 1.8 µs, half of what Python may cost for a forwarded request.
    """

    __slots__ = ("_buckets", "_codes", "_lock", "_ok", "_sum")

    def __init__(self) -> None:
        self._ok: deque[float] = deque()
        """The seconds of requests that were answered, until they are counted."""
        self._lock = threading.Lock()
        """Of all else."""
        self._codes: dict[str, int] = {}
        self._sum = 0.0
        self._buckets = [0] * len(_SECONDS)
        """How many requests took at most so long, by bucket."""

    def count(self, code: Code, seconds: float) -> None:
        """A request ended with the status `code`, `seconds` after it came."""
        if code == 0:
            self._ok.append(seconds)
            if len(self._ok) >= _AT_ONCE:
                with self._lock:
                    self._count_answered()
        else:
            with self._lock:
                self._add(code.name, [seconds])

    def read(self) -> tuple[dict[str, int], float, list[int]]:
        """Counts by status, the sum of the seconds, and how many requests took at most so long, by bucket; the last
        bucket has no bound."""
        with self._lock:
            self._count_answered()
            return dict(self._codes), self._sum, [*self._buckets, sum(self._codes.values())]

    def _count_answered(self) -> None:
        waiting = self._ok  # other threads may add to it meanwhile
        if waiting:
            self._add("OK", sorted([waiting.popleft() for _ in range(len(waiting))]))

    def _add(self, code: str, seconds: list[float]) -> None:
        """Count requests, whose `seconds` are in order. Under the lock."""
        self._codes[code] = self._codes.get(code, 0) + len(seconds)
        self._sum += sum(seconds)
        for index, bound in enumerate(_SECONDS):
            self._buckets[index] += bisect_right(seconds, bound)


class _Counts(dict[tuple[str, str], RequestCounts]):
    """By protocol and upstream; what is not there yet is made. Any thread."""

    def __missing__(self, key: tuple[str, str]) -> RequestCounts:
        return self.setdefault(key, RequestCounts())


class _Requests(Collector):
    """Counts and latencies of requests, by protocol and upstream."""

    _COUNTER = (
        "dl_inference_requests",
        "Requests answered, by protocol, upstream (the model's or route's name) and gRPC status.",
    )
    _HISTOGRAM = "dl_inference_request_seconds", "Seconds from a request's arrival to its answer."

    def __init__(self) -> None:
        self.counts = _Counts()

    def remove(self, upstream: str) -> None:
        for key in [key for key in tuple(self.counts) if key[1] == upstream]:
            self.counts.pop(key, None)

    def describe(self) -> list[Metric]:
        return list(self._families())

    def _families(self) -> tuple[CounterMetricFamily, HistogramMetricFamily]:
        return (
            CounterMetricFamily(*self._COUNTER, labels=("protocol", "upstream", "code")),
            HistogramMetricFamily(*self._HISTOGRAM, labels=("protocol", "upstream")),
        )

    def collect(self) -> list[Metric]:
        counter, histogram = self._families()
        bounds = (*map(floatToGoString, _SECONDS), "+Inf")
        for key, counts in tuple(self.counts.items()):
            codes, total, buckets = counts.read()
            for code, count in codes.items():
                counter.add_metric((*key, code), count)
            if codes:
                histogram.add_metric(key, list(zip(bounds, buckets, strict=True)), total)
        return [counter, histogram]


class AttemptCounts:
    """The attempts of one route at one node. The route writes it under its lock.

    Attributes:
        address: of the node.
        successes: the attempts whose answers went to clients.
        others: the other attempts, by outcome.
    """

    __slots__ = ("address", "others", "successes")

    def __init__(self, address: str) -> None:
        self.address = address
        self.successes = 0
        self.others: dict[str, int] = {}

    def count(self, outcome: str) -> None:
        """An attempt ended otherwise than with success."""
        self.others[outcome] = self.others.get(outcome, 0) + 1


class _Attempts(Collector):
    """Counts of attempts, by route and node."""

    _ABOUT = (
        "dl_inference_attempts",
        "Attempts at nodes, by route, node and outcome (success, failure, overload, neutral).",
    )

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], AttemptCounts] = {}
        """By route, and by the target of the node: nodes with one address may have several."""

    def of(self, route: str, target: str, address: str) -> AttemptCounts:
        return self.counts.setdefault((route, target), AttemptCounts(address))

    def remove(self, *, route: str | None = None, target: str | None = None) -> None:
        for key in [key for key in tuple(self.counts) if key[0] == route or key[1] == target]:
            self.counts.pop(key, None)

    def describe(self) -> list[Metric]:
        return [self._family()]

    def _family(self) -> CounterMetricFamily:
        return CounterMetricFamily(*self._ABOUT, labels=("route", "node", "outcome"))

    def collect(self) -> list[Metric]:
        sums: dict[tuple[str, str, str], int] = {}
        for (route, _), counts in tuple(self.counts.items()):
            for outcome, count in (("success", counts.successes), *tuple(counts.others.items())):
                key = route, counts.address, outcome
                sums[key] = sums.get(key, 0) + count
        counter = self._family()
        for key, count in sums.items():
            if count:
                counter.add_metric(key, count)
        return [counter]


class Metrics:
    """The metrics of one process. Safe from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = _Requests()
        self._registry.register(self._requests)
        self._attempts = _Attempts()
        self._registry.register(self._attempts)
        self._batch_rows = Histogram(
            "dl_inference_batch_rows",
            "Rows of each call of a model whose requests may share calls.",
            ("model",),
            buckets=_ROWS,
            registry=self._registry,
        )
        self._stuck_batches = Counter(
            "dl_inference_stuck_batches",
            "Batches that ran for longer than the watchdog's limit.",
            ("model",),
            registry=self._registry,
        )
        self._usable = Gauge(
            "dl_inference_node_usable",
            "Whether a node may be chosen (1), or is left out as unwell (0).",
            ("node",),
            registry=self._registry,
        )
        self._ejections = Counter(
            "dl_inference_ejections",
            "Times that a node was left out, by reason (unreachable, not_serving, outlier, probe).",
            ("node", "reason"),
            registry=self._registry,
        )
        self._retries_denied = Counter(
            "dl_inference_retries_denied",
            "Attempts that failed and were not tried again because the route's retry budget was spent.",
            ("route",),
            registry=self._registry,
        )
        self._hedges = Counter(
            "dl_inference_hedges",
            "Attempts that were begun beside one that took long.",
            ("route",),
            registry=self._registry,
        )
        self._rejections = Counter(
            "dl_inference_rejections",
            "Requests and retries refused for want of room: the process answers as many as it may (in_flight), the "
            "route's queue is full (queue_full), or they would have waited too long (no_time).",
            ("route", "reason"),
            registry=self._registry,
        )
        self._balancer_failures = Counter(
            "dl_inference_balancer_failures",
            "Times that a balancing strategy raised, chose what it was not given, or took over 50 ms to choose.",
            ("balancer", "route"),
            registry=self._registry,
        )
        self._tasks = Gauge(
            "dl_inference_asyncio_tasks",
            "Tasks of the event loop, as they were when the metrics were asked for.",
            registry=self._registry,
        )
        self._of_batches: dict[str, Histogram] = {}
        self._stuck_models: set[str] = set()
        self._of_ejections: dict[tuple[str, str], Counter] = {}
        self.requests: Mapping[tuple[str, str], RequestCounts] = self._requests.counts
        """What counts requests, for each protocol and upstream, which is "" where the routing key named none: one that
        is not there is made."""
        self._of_routes: dict[str, set[tuple[Counter, tuple[str, ...]]]] = {}
        """By route what has been counted of it that is rare, each with its labels."""

    def batch(self, model: str, rows: int) -> None:
        """A model was called with so many rows of requests."""
        histogram = self._of_batches.get(model)
        if histogram is None:
            histogram = self._of_batches[model] = self._batch_rows.labels(model)
        histogram.observe(rows)

    def stuck_batch(self, model: str) -> None:
        """A batch of a model ran for longer than the watchdog's limit."""
        self._stuck_models.add(model)
        self._stuck_batches.labels(model).inc()

    def model_gone(self, model: str) -> None:
        """There is no model of that name any more. What was counted of it goes with it: models may come and go for
        ever."""
        self._requests.remove(model)
        if self._of_batches.pop(model, None) is not None:
            self._batch_rows.remove(model)
        if model in self._stuck_models:
            self._stuck_models.remove(model)
            self._stuck_batches.remove(model)

    def attempts(self, route: str, target: str, address: str) -> AttemptCounts:
        """What counts the attempts of `route` at the node of that `NodeConfig.target` and address."""
        return self._attempts.of(route, target, address)

    def node_usable(self, node: str, usable: bool) -> None:
        """A node may be chosen, or no longer."""
        self._usable.labels(node).set(usable)

    def node_gone(self, node: str) -> None:
        """No route has the node any more. What was counted of it goes with it: addresses may come and go for ever."""
        self._usable.remove(node)
        for ejected in [key for key in self._of_ejections if key[0] == node]:
            del self._of_ejections[ejected]
            self._ejections.remove(*ejected)
        self._attempts.remove(target=node)

    def route_gone(self, route: str) -> None:
        """There is no route of that name any more. What was counted of it goes with it: models may come and go for
        ever."""
        self._requests.remove(route)
        self._attempts.remove(route=route)
        for counter, labels in self._of_routes.pop(route, ()):
            counter.remove(*labels)

    def ejection(self, node: str, reason: str) -> None:
        """A node was left out."""
        self._of_ejections.setdefault((node, reason), self._ejections.labels(node, reason)).inc()

    def retry_denied(self, route: str) -> None:
        """An attempt failed and could have been tried again, but the budget was spent."""
        self._count(route, self._retries_denied, route)

    def hedge(self, route: str) -> None:
        """An attempt was begun beside one that took long."""
        self._count(route, self._hedges, route)

    def rejection(self, route: str, reason: str) -> None:
        """A request was refused for want of room; `route` is "" where it had not been looked up."""
        self._count(route, self._rejections, route, reason)

    def balancer_failure(self, balancer: str, route: str) -> None:
        """A strategy did what it must not."""
        self._count(route, self._balancer_failures, balancer, route)

    def _count(self, route: str, counter: Counter, *labels: str) -> None:
        self._of_routes.setdefault(route, set()).add((counter, labels))
        counter.labels(*labels).inc()

    def sample(self, name: str, meaning: str, labels: Sequence[str], values: Values) -> None:
        """Have a gauge whose values are taken when the metrics are asked for."""
        self._registry.register(_Sampled(GaugeMetricFamily, name, meaning, labels, values))

    def sample_counts(self, name: str, meaning: str, labels: Sequence[str], values: Values) -> None:
        """Have a counter whose values are taken when the metrics are asked for."""
        self._registry.register(_Sampled(CounterMetricFamily, name, meaning, labels, values))

    def tasks(self, count: int) -> None:
        """The event loop has `count` tasks now."""
        self._tasks.set(count)

    def render(self, accept: str) -> tuple[bytes, str]:
        """All of them in the format of Prometheus or OpenMetrics that an HTTP Accept header prefers; and its media
        type."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type
