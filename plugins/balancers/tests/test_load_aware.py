from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from dl_inference_balancers.load_aware import LeastRequest, LoadAware, PeakEwma, Prequal
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_inference_core.gateway.balancing import Outcome
from dl_inference_core.testing import EXCHANGE, BalancerConformance, FakeNode
from dl_inference_core.testing.balancer import Simulation

COUNTS = st.lists(st.integers(0, 20), min_size=1, max_size=8)
CLASSES: list[type[LoadAware[Any]]] = [LeastRequest, PeakEwma, Prequal]


class TestLeastRequest(BalancerConformance):
    balancer_class = LeastRequest
    weighs = True
    learns = True


class TestLeastRequestOfFew(TestLeastRequest):
    """With weights that differ."""

    @pytest.fixture
    def nodes(self) -> list[FakeNode]:
        return [FakeNode(f"10.0.0.{number}:8500", 1 + number % 2) for number in range(4)]


class TestPeakEwma(BalancerConformance):
    balancer_class = PeakEwma
    options: ClassVar = {"choices": 3}
    weighs = True
    learns = True


class TestPrequal(BalancerConformance):
    balancer_class = Prequal
    options: ClassVar = {"pool": 3}
    even = False
    weighs = True
    learns = True


def make(cls: type[LoadAware[Any]], **options: Any) -> LoadAware[Any]:
    balancer = cls(cls.Options(**options))
    balancer.random.seed(1)
    return balancer


def nodes_of(counts: list[int], weights: list[int] | None = None) -> tuple[FakeNode, ...]:
    weights = weights or [1] * len(counts)
    return tuple(
        FakeNode(f"10.0.{i >> 8}.{i & 255}:8500", weight, count)
        for i, (count, weight) in enumerate(zip(counts, weights, strict=True))
    )


# Trust


@pytest.mark.parametrize("cls", CLASSES)
def test_trust_is_halved_by_failures_and_comes_half_the_way_back(cls: type[LoadAware[Any]]) -> None:
    balancer = make(cls)
    nodes = nodes_of([0, 0])
    balancer.choose(nodes, EXCHANGE)
    trusts = []
    for outcome in [Outcome.FAILURE, Outcome.OVERLOAD, Outcome.NEUTRAL] + [Outcome.SUCCESS] * 7:
        balancer.record(nodes[0], outcome, 0.01)
        trusts.append(balancer.doubted.get(nodes[0], 1.0))
    assert trusts == [0.5, 0.25, 0.25, 0.625, 0.8125, 0.90625, 0.953125, 0.9765625, 0.98828125, 1.0]
    assert not balancer.doubted


@pytest.mark.parametrize("cls", CLASSES)
def test_a_node_that_returned_is_fully_trusted_until_it_fails_again(cls: type[LoadAware[Any]]) -> None:
    balancer = make(cls)
    nodes = nodes_of([0, 0])
    balancer.choose(nodes, EXCHANGE)
    for _ in range(20):
        balancer.record(nodes[0], Outcome.FAILURE, 0.01)
    assert 1 / 1000 < balancer.doubted[nodes[0]] < 1 / 50
    balancer.returned(nodes[0])
    assert nodes[0] not in balancer.doubted
    balancer.record(nodes[0], Outcome.FAILURE, 0.01)
    assert balancer.doubted[nodes[0]] == 0.5


@pytest.mark.parametrize(("cls", "compared"), [(LeastRequest, 8), (PeakEwma, 2), (Prequal, 16)])
def test_a_node_that_fails_everything_gets_a_32nd_of_its_part(cls: type[LoadAware[Any]], compared: int) -> None:
    nodes = nodes_of([0] + [5] * (compared - 1))
    balancer = make(cls)
    taken = 0
    for _ in range(20_000):
        node = balancer.choose(nodes, EXCHANGE)
        taken += node is nodes[0]
        balancer.record(node, Outcome.FAILURE if node is nodes[0] else Outcome.SUCCESS, 0.05)
    assert 0.4 / 32 < taken * compared / 20_000 < 1.6 / 32


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("count", [4, 40])
def test_where_many_nodes_fail_the_others_get_the_requests(cls: type[LoadAware[Any]], count: int) -> None:
    nodes = nodes_of([3] * count)
    balancer = make(cls)
    balancer.choose(nodes, EXCHANGE)
    for node in nodes[: count // 2]:
        node.in_flight = 0
        for _ in range(10):
            balancer.record(node, Outcome.FAILURE, 0.001)
    taken = Counter(balancer.choose(nodes, EXCHANGE) in nodes[: count // 2] for _ in range(2000))
    assert taken[True] < 100


@pytest.mark.parametrize("cls", CLASSES)
def test_where_all_fail_all_are_tried(cls: type[LoadAware[Any]]) -> None:
    balancer = make(cls)
    simulation = Simulation(balancer, nodes := nodes_of([0] * 4), lambda number: EXCHANGE)
    simulation.failing.update(nodes)
    simulation.run(2)
    for node in nodes:
        assert simulation.part(node, 1) > 0.3


@pytest.mark.parametrize("cls", CLASSES)
def test_a_node_that_is_well_again_is_found_without_anybody_saying_so(cls: type[LoadAware[Any]]) -> None:
    simulation = Simulation(make(cls), nodes := nodes_of([0] * 4), lambda number: EXCHANGE)
    simulation.failing.add(nodes[2])
    simulation.run(2)
    simulation.failing.clear()
    simulation.run(5)
    since = simulation.now
    simulation.run(3)
    assert simulation.part(nodes[2], since) > 0.7


# Least request


@given(COUNTS)
def test_up_to_eight_nodes_the_fewest_in_flight_is_chosen(counts: list[int]) -> None:
    nodes = nodes_of(counts)
    assert LeastRequest(LeastRequest.Options()).choose(nodes, EXCHANGE).in_flight == min(counts)


def test_ties_are_broken_by_chance() -> None:
    nodes = nodes_of([1, 0, 0, 1, 0])
    balancer = make(LeastRequest)
    taken = Counter(balancer.choose(nodes, EXCHANGE) for _ in range(3000))
    assert set(taken) == {nodes[1], nodes[2], nodes[4]}
    assert min(taken.values()) > 850


def test_of_many_nodes_the_fewest_of_d_are_chosen() -> None:
    """Of two drawn from ten, the i-th busiest is the less busy one of i of 45 pairs."""
    nodes = nodes_of(list(range(10)))
    for choices in (2, 3):
        balancer = make(LeastRequest, choices=choices)
        taken = Counter(balancer.choose(nodes, EXCHANGE).in_flight for _ in range(9000))
        for place in range(10):
            part = math.comb(9 - place, choices - 1) / math.comb(10, choices)
            assert taken[place] / 9000 == pytest.approx(part, abs=5 * math.sqrt(part / 9000) + 1e-9)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=2, max_size=8),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_where_weights_differ_parts_are_those_of_envoys_formula(pairs: list[tuple[int, int]], bias: float) -> None:
    counts, weights = [count for count, _ in pairs], [*(weight for _, weight in pairs[1:]), pairs[1][1] + 1]
    nodes = nodes_of(counts, weights)
    balancer = LeastRequest(LeastRequest.Options(bias=bias))
    taken = Counter(balancer.choose(nodes, EXCHANGE) for _ in range(500))
    effective = [weight / (count + 1) ** bias for count, weight in zip(counts, weights, strict=True)]
    for node, weight in zip(nodes, effective, strict=True):
        assert abs(taken[node] - 500 * weight / sum(effective)) <= 2


def test_of_many_idle_nodes_parts_are_in_proportion_to_weights() -> None:
    nodes = nodes_of([0] * 20, [1] * 10 + [3] * 10)
    balancer = make(LeastRequest)
    taken = Counter(balancer.choose(nodes, EXCHANGE).weight for _ in range(8000))
    assert taken[3] / 8000 == pytest.approx(0.75, abs=0.025)


# Peak EWMA


class Finagle:
    """The formula as plainly as it can be written."""

    def __init__(self, start_s: float, decay_s: float) -> None:
        self.seconds, self.decay_s, self.at, self.measured = start_s, decay_s, 0.0, False

    def observe(self, seconds: float, now: float) -> None:
        if seconds > self.seconds or not self.measured:
            self.seconds = seconds
        else:
            kept = math.exp(-(now - self.at) / self.decay_s)
            self.seconds = self.seconds * kept + seconds * (1 - kept)
        self.at, self.measured = now, True

    def cost(self, now: float, node: FakeNode) -> float:
        return self.seconds * math.exp(-(now - self.at) / self.decay_s) * (node.in_flight + 1) / node.weight


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.floats(0.0001, 2), st.floats(0, 20), st.integers(0, 9)), min_size=1, max_size=30
    ),
    st.floats(0.1, 60),
)
def test_the_least_cost_is_chosen(samples: list[tuple[int, float, float, int]], decay_s: float) -> None:
    now = 0.0
    balancer = PeakEwma(PeakEwma.Options(decay_s=decay_s, start_s=0.05))
    balancer.clock = lambda: now
    nodes = nodes_of([0, 0], [1, 3])
    balancer.choose(nodes, EXCHANGE)
    reference = {node: Finagle(0.05, decay_s) for node in nodes}
    for place, seconds, pause, in_flight in samples:
        now += pause
        balancer.record(nodes[place], Outcome.SUCCESS, seconds)
        reference[nodes[place]].observe(seconds, now)
        nodes[1 - place].in_flight = in_flight
        assert balancer.learned(nodes[place]) == pytest.approx(reference[nodes[place]].seconds)
        costs = [reference[node].cost(now, node) for node in nodes]
        if not math.isclose(*costs, rel_tol=1e-6):
            assert balancer.choose(nodes, EXCHANGE) is nodes[costs.index(min(costs))]


def test_a_failure_counts_with_its_time_if_that_is_more_and_never_makes_a_node_look_fast() -> None:
    balancer = make(PeakEwma)
    nodes = nodes_of([0, 0])
    balancer.choose(nodes, EXCHANGE)
    for outcome, seconds, average in [
        (Outcome.FAILURE, 0.001, None),
        (Outcome.SUCCESS, 0.05, 0.05),
        (Outcome.FAILURE, 0.001, 0.05),
        (Outcome.OVERLOAD, 0.001, 0.05),
        (Outcome.NEUTRAL, 3.0, 0.05),
        (Outcome.FAILURE, 1.0, 1.0),
    ]:
        balancer.record(nodes[0], outcome, seconds)
        assert balancer.learned(nodes[0]) == average


def test_another_process_takes_over_the_latency() -> None:
    balancer = make(PeakEwma)
    nodes = nodes_of([0, 0])
    balancer.choose(nodes, EXCHANGE)
    balancer.learn(nodes[0], 0.5)
    assert {balancer.choose(nodes, EXCHANGE) for _ in range(20)} == {nodes[1]}


def slow_one(node: FakeNode, chance: float) -> float:
    return (0.01 + 0.01 * chance) * (10 if node.address.endswith(".2:8500") else 1)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_node_that_is_ten_times_slower_gets_less(cls: type[LoadAware[Any]]) -> None:
    simulation = Simulation(make(cls), nodes := nodes_of([0] * 4), lambda number: EXCHANGE, seconds=slow_one)
    simulation.run(1)
    since = simulation.now
    simulation.run(10)
    assert simulation.part(nodes[2], since) < (0.45 if cls is LeastRequest else 0.1)


# Prequal


def hot_cold(counts: list[int], seen: list[int], latency: Callable[[int], float], quantile: float) -> set[int]:
    """The places that the rule allows, as plainly as it can be written."""
    ranked = sorted(seen)
    limit = ranked[max(0, math.ceil(quantile * len(ranked)) - 1)]
    cold = [place for place, count in enumerate(counts) if count <= limit]
    if not cold:
        return {place for place, count in enumerate(counts) if count == min(counts)}
    least = min(latency(place) for place in cold)
    return {place for place in cold if latency(place) == least}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(0.001, 1)), min_size=2, max_size=16),
    st.lists(st.integers(0, 9), min_size=16, max_size=16),
    st.floats(0, 1),
)
def test_the_hot_cold_lexicographic_rule(pairs: list[tuple[int, float]], later: list[int], quantile: float) -> None:
    counts = [count for count, _ in pairs]
    nodes = nodes_of(counts)
    balancer = Prequal(Prequal.Options(hot_quantile=quantile))
    balancer.clock = lambda: 0.0
    balancer.choose(nodes[::-1], EXCHANGE)  # what they have is seen here, and that decides for 16 choices
    for node, (_, seconds) in zip(nodes, pairs, strict=True):
        balancer.record(node, Outcome.SUCCESS, seconds)
    for node, count in zip(nodes, later, strict=False):
        node.in_flight = count
    places = hot_cold(later[: len(nodes)], counts, lambda place: pairs[place][1], quantile)
    assert balancer.choose(nodes, EXCHANGE) in {nodes[place] for place in places}


def test_the_busiest_are_passed_over_however_fast() -> None:
    balancer = make(Prequal, hot_quantile=0.5)
    balancer.clock = lambda: 0.0
    nodes = nodes_of([9, 0, 1, 0])
    balancer.choose(nodes, EXCHANGE)
    for node, seconds in zip(nodes, (0.001, 0.2, 0.002, 0.1), strict=True):
        balancer.record(node, Outcome.SUCCESS, seconds)
    assert balancer.choose(nodes, EXCHANGE) is nodes[3]
    for node, count in zip(nodes, (9, 4, 1, 5), strict=True):
        node.in_flight = count
    assert balancer.choose(nodes, EXCHANGE) is nodes[2]  # all are hot


def test_latency_is_that_at_the_number_in_flight_and_ages() -> None:
    now = 0.0
    balancer = make(Prequal, hot_quantile=1.0, age_s=1.0)
    balancer.clock = lambda: now
    nodes = nodes_of([0, 0])
    nodes[0].in_flight = 9
    nodes[1].in_flight = 9
    balancer.choose(nodes, EXCHANGE)
    steady, varying = nodes
    for seconds in (0.05, 0.9, 0.05, 0.04, 0.05):  # the median is 0.05
        balancer.record(steady, Outcome.SUCCESS, seconds)
    balancer.record(varying, Outcome.SUCCESS, 0.5)
    varying.in_flight = 0
    balancer.record(varying, Outcome.SUCCESS, 0.01)
    assert balancer.choose(nodes, EXCHANGE) is varying
    varying.in_flight = 8
    assert balancer.choose(nodes, EXCHANGE) is steady
    now = 1.5
    varying.in_flight = 0
    balancer.record(varying, Outcome.SUCCESS, 0.02)
    varying.in_flight = 8
    assert balancer.choose(nodes, EXCHANGE) is varying  # what it took with eight is too long ago
    now = 2.4  # the other one's 0.05 count as 0.05 * 2^-1.4 now
    assert balancer.choose(nodes, EXCHANGE) is steady


def test_failures_say_nothing_of_latency() -> None:
    balancer = make(Prequal, hot_quantile=1.0)
    nodes = nodes_of([0, 0])
    balancer.choose(nodes, EXCHANGE)
    for node, seconds in zip(nodes, (0.05, 0.01), strict=True):
        balancer.record(node, Outcome.SUCCESS, seconds)
    for _ in range(3):
        balancer.record(nodes[0], Outcome.FAILURE, 0.0001)
        balancer.record(nodes[0], Outcome.NEUTRAL, 0.0001)
    balancer.learn(nodes[0], 1.0)
    assert {balancer.choose(nodes, EXCHANGE) for _ in range(20)} == {nodes[1]}
