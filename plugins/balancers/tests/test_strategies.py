from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar

import pytest
from dl_inference_balancers.strategies import (
    DynamicWeightedRoundRobin,
    SmoothWeightedRoundRobin,
    WeightedRoundRobin,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from dl_inference_core.gateway.balancing import Node, Outcome
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.testing import CALL, BalancerConformance, FakeNode
from dl_inference_core.transport import Call

WEIGHTS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)


def nodes_of(weights: Sequence[int]) -> list[FakeNode]:
    return [FakeNode(f"10.0.0.{i}:8500", weight) for i, weight in enumerate(weights, 1)]


def weighted() -> WeightedRoundRobin:
    return WeightedRoundRobin(WeightedRoundRobin.Options())


def dynamic(scale: int = 100) -> DynamicWeightedRoundRobin:
    return DynamicWeightedRoundRobin(DynamicWeightedRoundRobin.Options(scale=scale))


def sequence(balancer: SmoothWeightedRoundRobin, nodes: list[FakeNode], length: int) -> list[int]:
    """Which of the nodes are chosen, by their places in the list."""
    places: dict[Node, int] = {node: place for place, node in enumerate(nodes)}
    return [places[balancer.choose(nodes, CALL)] for _ in range(length)]


def owed(balancer: SmoothWeightedRoundRobin) -> int:
    return sum(share.current for share in balancer.shares.values())


class TestWeightedRoundRobin(BalancerConformance):
    balancer_class = WeightedRoundRobin
    weighs = True


class TestDynamicWeightedRoundRobin(BalancerConformance):
    balancer_class = DynamicWeightedRoundRobin
    options: ClassVar = {"scale": 10}
    weighs = True
    learns = True


@pytest.mark.parametrize("strategy", [WeightedRoundRobin, DynamicWeightedRoundRobin])
def test_both_are_found_by_name(strategy: type[SmoothWeightedRoundRobin]) -> None:
    assert Plugins().get(Kind.BALANCERS, strategy.name, "test") is strategy


def test_the_sequence_that_nginx_documents() -> None:
    nodes = nodes_of([5, 1, 1])
    assert sequence(weighted(), nodes, 7) == [0, 0, 1, 0, 2, 0, 0]


@given(WEIGHTS)
def test_each_period_takes_each_node_its_weight_times_and_every_prefix_is_near_the_quota(weights: list[int]) -> None:
    nodes = nodes_of(weights)
    balancer = weighted()
    total = sum(weights)
    latest = sum(Fraction(1, k) for k in range(2, len([w for w in weights if w]) + 1))
    taken: Counter[Any] = Counter()
    for n in range(1, 2 * total + 1):
        taken[balancer.choose(nodes, CALL)] += 1
        assert owed(balancer) == 0
        for node in nodes:
            behind = Fraction(n * node.weight, total) - taken[node]
            assert -1 < behind <= latest
        if n % total == 0:
            assert [taken[node] for node in nodes] == [w * n // total for w in weights]


def test_among_four_a_node_can_be_more_than_a_turn_late() -> None:
    """Why the bound above is not 1. Found by trying all weights up to 50; there is no such case with three nodes."""
    nodes = nodes_of([1, 5, 37, 37])
    balancer = weighted()
    behind = []
    taken = 0
    for n in range(1, 81):
        taken += balancer.choose(nodes, CALL) is nodes[3]
        behind.append(Fraction(37 * n, 80) - taken)
    assert max(behind) == Fraction(82, 80)


def test_equal_weights_are_round_robin() -> None:
    nodes = nodes_of([3, 3, 3])
    assert sequence(weighted(), nodes, 7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("balancer", [weighted(), dynamic()])
def test_weight_zero_gets_nothing_while_another_has_weight_and_its_turn_otherwise(
    balancer: SmoothWeightedRoundRobin,
) -> None:
    nodes = nodes_of([0, 2, 0])
    assert {balancer.choose(nodes, CALL) for _ in range(20)} == {nodes[1]}
    alone = [nodes[0], nodes[2]]
    for node in alone:
        balancer.record(node, Outcome.FAILURE, 1.0)
    taken = [balancer.choose(alone, CALL) for _ in range(20)]
    assert taken[::2] == [taken[0]] * 10
    assert taken[1::2] == [taken[1]] * 10
    assert taken[0] is not taken[1]
    assert {balancer.choose(nodes, CALL) for _ in range(20)} == {nodes[1]}
    assert owed(balancer) == 0


def test_a_node_that_was_away_for_a_call_keeps_its_place() -> None:
    nodes = nodes_of([1, 1])
    balancer = weighted()
    assert balancer.choose(nodes, CALL) is nodes[0]
    assert balancer.choose(nodes[:1], CALL) is nodes[0]
    assert balancer.choose(nodes, CALL) is nodes[1]


def test_a_forgotten_node_leaves_the_others_at_the_start_of_a_period() -> None:
    nodes = nodes_of([5, 3, 2])
    balancer = weighted()
    for _ in range(4):
        balancer.choose(nodes, CALL)
    balancer.forget(nodes[0])
    assert set(balancer.shares) == set(nodes[1:])
    assert {share.current for share in balancer.shares.values()} == {0}
    assert Counter(balancer.choose(nodes[1:], CALL) for _ in range(5)) == {nodes[1]: 3, nodes[2]: 2}


def test_forgetting_one_node_keeps_what_was_learned_of_the_others() -> None:
    nodes = nodes_of([1, 1, 1])
    balancer = dynamic()
    balancer.choose(nodes, CALL)
    balancer.record(nodes[1], Outcome.FAILURE, 0.1)
    balancer.forget(nodes[0])
    assert [balancer.shares[node].weight for node in nodes[1:]] == [50, 100]


def test_what_ends_after_its_node_was_forgotten_does_not_bring_the_node_back() -> None:
    nodes = nodes_of([1, 1])
    balancer = dynamic()
    balancer.choose(nodes, CALL)
    balancer.forget(nodes[1])
    balancer.record(nodes[1], Outcome.FAILURE, 0.1)
    assert set(balancer.shares) == {nodes[0]}


def test_six_failures_reach_the_floor_and_seven_successes_come_back() -> None:
    nodes = nodes_of([1, 1])
    balancer = dynamic()
    balancer.choose(nodes, CALL)
    share = balancer.shares[nodes[0]]
    weights = []
    for outcome in [Outcome.FAILURE] * 7 + [Outcome.SUCCESS] * 8:
        balancer.record(nodes[0], outcome, 0.1)
        weights.append(share.weight)
    assert weights == [50, 25, 12, 6, 3, 1, 1, 51, 76, 88, 94, 97, 99, 100, 100]


@pytest.mark.parametrize(("outcome", "weight"), [(Outcome.OVERLOAD, 50), (Outcome.NEUTRAL, 100)])
def test_overload_counts_as_failure_and_neutral_as_nothing(outcome: Outcome, weight: int) -> None:
    nodes = nodes_of([1, 1])
    balancer = dynamic()
    balancer.choose(nodes, CALL)
    balancer.record(nodes[0], outcome, 0.1)
    assert balancer.shares[nodes[0]].weight == weight


@pytest.mark.parametrize(("count", "scale"), [(2, 100), (4, 100), (4, 1), (7, 10)])
def test_a_dead_node_keeps_one_request_in_one_plus_the_others_weights(count: int, scale: int) -> None:
    nodes = nodes_of([1] * count)
    dead = nodes[1]
    balancer = dynamic(scale)

    def requests(number: int) -> int:
        failed = 0
        for _ in range(number):
            node = balancer.choose(nodes, CALL)
            failed += node is dead
            balancer.record(node, Outcome.FAILURE if node is dead else Outcome.SUCCESS, 0.01)
        return failed

    requests(20 * count * scale)
    assert balancer.shares[dead].weight == 1
    period = 1 + (count - 1) * scale
    assert requests(5 * period) == 5


@pytest.mark.parametrize(
    ("before", "after", "weight"), [(1, 4, 200), (4, 1, 50), (1, 0, 0), (0, 2, 200), (10_000, 1, 50)]
)
def test_a_weight_that_the_operator_changes_takes_along_what_was_learned(before: int, after: int, weight: int) -> None:
    nodes = nodes_of([before, 1])
    balancer = dynamic()
    balancer.choose(nodes, CALL)
    balancer.record(nodes[0], Outcome.FAILURE, 0.1)
    nodes[0].weight = after
    balancer.choose(nodes, CALL)
    assert balancer.shares[nodes[0]].weight == weight
    assert owed(balancer) == 0


class Reference:
    """The formulas of balancing.md, as slowly and plainly as they can be written."""

    def __init__(self, scale: int, dynamic: bool) -> None:
        self.scale, self.dynamic = scale, dynamic
        self.current: dict[Any, int] = {}
        self.effective: dict[Any, int] = {}

    def choose(self, nodes: Sequence[Node], call: Call) -> Node | None:
        """None where every weight is 0: round robin, and where that starts is left open."""
        for node in nodes:
            self.current.setdefault(node, 0)
            self.effective.setdefault(node, self.scale * node.weight)
        nodes = [node for node in nodes if self.effective[node]]
        if not nodes:
            return None
        for node in nodes:
            self.current[node] += self.effective[node]
        largest = max(self.current[node] for node in nodes)
        chosen = next(node for node in nodes if self.current[node] == largest)
        self.current[chosen] -= sum(self.effective[node] for node in nodes)
        return chosen

    def record(self, node: Node, outcome: Outcome) -> None:
        if not self.dynamic or node not in self.effective or not node.weight:
            return
        e = self.effective[node]
        if outcome in (Outcome.FAILURE, Outcome.OVERLOAD):
            self.effective[node] = max(1, e // 2)
        elif outcome is Outcome.SUCCESS:
            self.effective[node] = e + (self.scale * node.weight - e + 1) // 2

    def forget(self, node: Node) -> None:
        if node in self.current:
            del self.current[node], self.effective[node]
            self.current = dict.fromkeys(self.current, 0)


class AgainstTheReference(RuleBasedStateMachine):
    nodes = Bundle("nodes")
    scale = 1

    def __init__(self) -> None:
        super().__init__()
        self.balancer = self.make()
        self.reference = Reference(self.scale, isinstance(self.balancer, DynamicWeightedRoundRobin))

    def make(self) -> SmoothWeightedRoundRobin:
        return weighted()

    @rule(target=nodes, weights=st.lists(st.integers(0, 5), min_size=1, max_size=4))
    def join(self, weights: list[int]) -> Any:
        return multiple(*nodes_of(weights))

    @rule(given=st.lists(nodes, min_size=1, max_size=6, unique=True), times=st.integers(1, 10))
    def choose(self, given: list[FakeNode], times: int) -> None:
        for _ in range(times):
            chosen, expected = self.balancer.choose(given, CALL), self.reference.choose(given, CALL)
            assert chosen in given
            assert expected is None or chosen is expected

    @rule(node=nodes, outcome=st.sampled_from(Outcome), times=st.integers(1, 4))
    def record(self, node: FakeNode, outcome: Outcome, times: int) -> None:
        for _ in range(times):
            self.balancer.record(node, outcome, 0.01)
            self.reference.record(node, outcome)

    @rule(node=consumes(nodes))
    def leave(self, node: FakeNode) -> None:
        self.balancer.forget(node)
        self.reference.forget(node)

    @invariant()
    def is_as_the_reference_has_it(self) -> None:
        assert {n: share.current for n, share in self.balancer.shares.items()} == self.reference.current
        assert {n: share.weight for n, share in self.balancer.shares.items()} == self.reference.effective

    @invariant()
    def nobody_is_owed_what_nobody_owes(self) -> None:
        assert owed(self.balancer) == 0


class DynamicAgainstTheReference(AgainstTheReference):
    scale = 100

    def make(self) -> SmoothWeightedRoundRobin:
        return dynamic(self.scale)


TestWeightedAgainstTheReference = AgainstTheReference.TestCase
TestWeightedAgainstTheReference.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestDynamicAgainstTheReference = DynamicAgainstTheReference.TestCase
TestDynamicAgainstTheReference.settings = TestWeightedAgainstTheReference.settings
