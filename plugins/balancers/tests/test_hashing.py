from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from typing import Any, ClassVar

import pytest
from dl_inference_balancers.hashing import RendezvousHash
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_inference_core.gateway.balancing import Outcome
from dl_inference_core.testing import EXCHANGE, BalancerConformance, FakeNode
from dl_inference_core.testing.balancer import Simulation
from dl_inference_core.testing.memory import MemoryExchange

KEYS = 2000


def keyed(key: object, name: str = "x-routing-key") -> MemoryExchange:
    return MemoryExchange(EXCHANGE.method, metadata=(("other", "1"), (name, str(key))))


class TestRendezvousHash(BalancerConformance):
    balancer_class = RendezvousHash
    weighs = True
    learns = True

    def exchange(self, number: int) -> MemoryExchange:
        return keyed(number)


class TestRendezvousHashOfRequests(BalancerConformance):
    balancer_class = RendezvousHash
    options: ClassVar = {"key": "request"}
    spreads = False  # the suite's calls are all the same
    weighs = True
    learns = True

    def exchange(self, number: int) -> MemoryExchange:
        return MemoryExchange(EXCHANGE.method, memoryview(b"%d" % number))


class TestRendezvousHashWithoutKeys(BalancerConformance):
    balancer_class = RendezvousHash
    weighs = True
    learns = True


def make(**options: Any) -> RendezvousHash:
    return RendezvousHash(RendezvousHash.Options(**options))


def nodes_of(weights: list[int]) -> tuple[FakeNode, ...]:
    return tuple(FakeNode(f"10.0.0.{i}:8500", weight) for i, weight in enumerate(weights, 1))


def mapping(nodes: tuple[FakeNode, ...]) -> dict[int, FakeNode]:
    balancer = make()
    chosen = {key: balancer.choose(nodes, keyed(key)) for key in range(KEYS)}
    assert all(isinstance(node, FakeNode) for node in chosen.values())
    return chosen  # type: ignore[return-value]


def test_the_same_key_has_the_same_node_in_every_process_and_order() -> None:
    nodes = nodes_of([1, 1, 1, 1])
    here = mapping(nodes)
    assert here == mapping(nodes[::-1])
    script = (
        "from dl_inference_balancers.hashing import RendezvousHash as R\n"
        "from dl_inference_core.testing import EXCHANGE, FakeNode\n"
        "from dl_inference_core.testing.memory import MemoryExchange\n"
        "nodes = [FakeNode(f'10.0.0.{i}:8500') for i in range(1, 5)]\n"
        "for key in range(40):\n"
        "    exchange = MemoryExchange('/m', metadata=(('x-routing-key', str(key)),))\n"
        "    print(R(R.Options()).choose(nodes, exchange).address)\n"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert there.stdout.split() == [here[key].address for key in range(40)]


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=7).filter(any))
def test_keys_are_spread_in_proportion_to_weights(weights: list[int]) -> None:
    nodes = nodes_of(weights)
    taken = Counter(mapping(nodes).values())
    for node in nodes:
        part = node.weight / sum(weights)
        assert taken[node] / KEYS == pytest.approx(part, abs=5 * math.sqrt(part * (1 - part) / KEYS) + 1e-9)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 3), min_size=3, max_size=7), st.integers(0, 6))
def test_a_node_that_leaves_moves_its_own_keys_alone_and_spreads_them(weights: list[int], place: int) -> None:
    nodes = nodes_of(weights)
    leaving = nodes[place % len(nodes)]
    stay = tuple(node for node in nodes if node is not leaving)
    before, after = mapping(nodes), mapping(stay)
    moved: Counter[FakeNode] = Counter()
    for key, node in before.items():
        if node is leaving:
            moved[after[key]] += 1
        else:
            assert after[key] is node
    count, total = moved.total(), sum(node.weight for node in stay)
    for node in stay:
        part = node.weight / total
        assert moved[node] == pytest.approx(count * part, abs=5 * math.sqrt(count * part) + 1)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 3)), min_size=1, max_size=8),
    st.floats(1, 3),
    st.integers(0, 99),
)
def test_the_highest_node_within_the_bound_is_chosen(pairs: list[tuple[int, int]], bound: float, key: int) -> None:
    nodes = nodes_of([weight for _, weight in pairs])
    balancer = make(bound=bound)
    order: list[Any] = []
    while len(order) < len(nodes):  # idle, they come by their height
        order.append(balancer.choose([node for node in nodes if node not in order], keyed(key)))
    for node, (count, _) in zip(nodes, pairs, strict=True):
        node.in_flight = count
    each = bound * (sum(count for count, _ in pairs) + 1) / sum(weight for _, weight in pairs)
    with_room = [node for node in order if node.in_flight < math.ceil(each * node.weight)]
    assert balancer.choose(nodes, keyed(key)) is with_room[0]


def test_one_key_alone_never_loads_a_node_over_the_bound() -> None:
    nodes = nodes_of([1, 1, 1, 1])
    balancer = make()
    for number in range(1, 101):
        chosen = balancer.choose(nodes, keyed("hot"))
        assert isinstance(chosen, FakeNode)
        chosen.in_flight += 1
        assert max(node.in_flight for node in nodes) <= math.ceil(1.25 * number / 4)


def test_a_node_that_fails_at_once_attracts_nothing_where_others_are_at_the_bound() -> None:
    nodes = nodes_of([1] * 4)
    simulation = Simulation(make(), nodes, keyed, rate=2000)
    simulation.failing.add(nodes[1])
    simulation.run(0.5)
    since = simulation.now
    simulation.run(1)
    assert simulation.part(nodes[1], since) < 0.1


def test_keys_of_a_failing_node_go_where_they_would_go_without_it_and_come_back() -> None:
    nodes = nodes_of([1, 2, 1])
    balancer = make(bound=1000)
    before, without = mapping(nodes), mapping(nodes[1:])
    balancer.choose(nodes, keyed(0))
    for _ in range(20):
        balancer.record(nodes[0], Outcome.FAILURE, 0.001)
    during = {key: balancer.choose(nodes, keyed(key)) for key in before}
    changed = sum(node is not without[key] for key, node in during.items())
    assert changed < KEYS / 32
    balancer.returned(nodes[0])
    assert {key: balancer.choose(nodes, keyed(key)) for key in before} == before


def test_the_key_is_the_entry_that_is_named_or_the_request() -> None:
    nodes = nodes_of([1] * 20)
    by_name = make(key_metadata="user-bin")
    call = MemoryExchange(EXCHANGE.method, metadata=(("user-bin", b"\xff\x00"),))
    assert len({by_name.choose(nodes, call) for _ in range(20)}) == 1
    assert len({by_name.choose(nodes, keyed("a")) for _ in range(20)}) == 20
    by_request = make(key="request")
    chosen = {
        by_request.choose(nodes, MemoryExchange(EXCHANGE.method, kind(b"some"), (("x", str(number)),)))
        for number, kind in enumerate((bytes, memoryview, bytes))
    }
    assert len(chosen) == 1
