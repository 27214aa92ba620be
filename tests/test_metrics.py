"""What the metrics say, read by prometheus_client's own parser."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from dl_inference_core.errors import Code
from dl_inference_core.metrics import Metrics


def samples(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Values of the samples of that name, by their labels' values in the order of the labels' names."""
    found: dict[tuple[str, ...], float] = {}
    for family in parse(metrics.render("")[0].decode()):
        for sample in family.samples:
            if sample.name == name:
                found[tuple(value for _, value in sorted(sample.labels.items()))] = sample.value
    return found


def attempt(metrics: Metrics, route: str, node: str, outcome: str) -> None:
    """Count an attempt, as a route does."""
    counts = metrics.attempts(route, node, node)
    if outcome == "success":
        counts.successes += 1
    else:
        counts.count(outcome)


def test_requests_are_counted_by_status_and_their_seconds_by_bucket() -> None:
    metrics = Metrics()
    for seconds in (0.0004, 0.0005, 0.003, 11.0):
        metrics.requests["openinference", "m"].count(Code.OK, seconds)
    metrics.requests["openinference", "m"].count(Code.INTERNAL, 0.003)
    metrics.requests["seldon", "m"].count(Code.OK, 0.3)
    assert samples(metrics, "dl_inference_requests_total") == {
        ("OK", "openinference", "m"): 4,
        ("INTERNAL", "openinference", "m"): 1,
        ("OK", "seldon", "m"): 1,
    }
    buckets = samples(metrics, "dl_inference_request_seconds_bucket")
    of_openinference = {le: count for (le, protocol, _), count in buckets.items() if protocol == "openinference"}
    assert of_openinference == {
        "0.0005": 2,
        "0.001": 2,
        "0.002": 2,
        **dict.fromkeys(("0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1.0", "2.0", "5.0", "10.0"), 4),
        "+Inf": 5,
    }
    assert samples(metrics, "dl_inference_request_seconds_count")["openinference", "m"] == 5
    assert samples(metrics, "dl_inference_request_seconds_sum")["openinference", "m"] == pytest.approx(11.0069)


def test_attempts_are_counted_by_node_and_outcome() -> None:
    metrics = Metrics()
    for outcome in ("success", "success", "failure"):
        attempt(metrics, "r", "n:1", outcome)
    assert samples(metrics, "dl_inference_attempts_total") == {
        ("n:1", "success", "r"): 2,
        ("n:1", "failure", "r"): 1,
    }


def test_nodes_with_one_address_are_counted_together_until_both_are_gone() -> None:
    metrics = Metrics()
    for target in ("n:1", "n:1 as other.name"):
        metrics.attempts("r", target, "n:1").successes += 2
    assert samples(metrics, "dl_inference_attempts_total") == {("n:1", "success", "r"): 4}
    metrics.node_usable("n:1", True)
    metrics.node_gone("n:1")
    assert samples(metrics, "dl_inference_attempts_total") == {("n:1", "success", "r"): 2}


def test_what_goes_takes_its_series_along() -> None:
    metrics = Metrics()
    for name in ("gone", "stays"):
        metrics.requests["openinference", name].count(Code.OK, 0.1)
        metrics.batch(name, 3)
        metrics.stuck_batch(name)
        attempt(metrics, name, "n:1", "success")
    metrics.node_usable("n:2", True)
    attempt(metrics, "stays", "n:2", "success")
    metrics.model_gone("gone")
    metrics.route_gone("gone")
    metrics.node_gone("n:2")
    said = metrics.render("")[0].decode()
    assert '"gone"' not in said
    assert '"n:2"' not in said
    assert samples(metrics, "dl_inference_requests_total") == {("OK", "openinference", "stays"): 1}
    assert samples(metrics, "dl_inference_attempts_total") == {("n:1", "success", "stays"): 1}
    assert samples(metrics, "dl_inference_stuck_batches_total") == {("stays",): 1}


def test_openmetrics_is_well_formed() -> None:
    metrics = Metrics()
    metrics.requests["openinference", 'a "name"\\with\nsigns'].count(Code.OK, 0.1)
    attempt(metrics, "r", "n:1", "success")
    text = metrics.render("application/openmetrics-text")[0].decode()
    families: Any = {family.name: family for family in openmetrics.text_string_to_metric_families(text)}
    (sample,) = families["dl_inference_requests"].samples
    assert sample.labels["upstream"] == 'a "name"\\with\nsigns'


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(5000):
            metrics.requests["openinference", "m"].count(Code.OK, 0.001)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert samples(metrics, "dl_inference_requests_total") == {("OK", "openinference", "m"): 20_000}
