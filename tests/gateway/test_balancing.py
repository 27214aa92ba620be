from __future__ import annotations

from collections import Counter

from dl_inference_core.gateway.balancing import RoundRobin
from dl_inference_core.testing import EXCHANGE, BalancerConformance, FakeNode


class TestRoundRobin(BalancerConformance):
    balancer_class = RoundRobin


def test_goes_round_whatever_the_weights_and_the_outcomes() -> None:
    nodes = [FakeNode(f"10.0.0.{i}:8500", weight=i) for i in range(4)]
    balancer = RoundRobin(RoundRobin.Options())
    taken = [balancer.choose(nodes, EXCHANGE) for _ in range(12)]
    assert len(set(taken[:4])) == 4
    assert taken == taken[:4] * 3


def test_starts_anywhere_so_that_gateways_do_not_go_in_step() -> None:
    nodes = [FakeNode(f"10.0.0.{i}:8500") for i in range(4)]
    starts = Counter(RoundRobin(RoundRobin.Options()).choose(nodes, EXCHANGE) for _ in range(200))
    assert len(starts) == 4


def test_a_node_that_leaves_makes_no_other_node_starve() -> None:
    nodes = [FakeNode(f"10.0.0.{i}:8500") for i in range(3)]
    balancer = RoundRobin(RoundRobin.Options())
    taken = Counter(balancer.choose(nodes if turn % 2 else nodes[:2], EXCHANGE) for turn in range(120))
    assert min(taken.values()) >= 120 // 2 // 3
