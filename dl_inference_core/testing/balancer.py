"""The suite for balancing strategies."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from dl_inference_core.gateway.balancing import Balancer, Outcome
from dl_inference_core.testing.fakes import CALL, FakeNode
from dl_inference_core.testing.plugin import PluginConformance


class BalancerConformance(PluginConformance):
    """What every balancing strategy must keep::

    class TestFewestInFlight(BalancerConformance):
        balancer_class = FewestInFlight
    """

    balancer_class: ClassVar[type[Balancer]]
    spreads: ClassVar[bool] = True
    """Whether nodes that are alike in all things each get requests."""
    weighs: ClassVar[bool] = False
    """Whether it heeds weights: then a node of weight 0 gets nothing while another has weight."""
    learns: ClassVar[bool] = False
    """Whether it sends less to a node that fails."""

    @pytest.fixture
    def balancer(self) -> Balancer:
        return self.balancer_class(self.balancer_class.Options(**self.options))

    @pytest.fixture
    def nodes(self) -> list[FakeNode]:
        return [FakeNode(f"10.0.0.{number}:8500") for number in range(1, 5)]

    def test_is_a_balancer_with_a_name_and_plain_methods(self) -> None:
        plain = ["choose", "record", "report", "returned", "learned", "learn", "forget"]
        self._check_class(self.balancer_class, Balancer, plain)

    def test_options_are_strict(self) -> None:
        self._check_options(self.balancer_class.Options, self.options)

    def test_chooses_one_of_those_given_and_leaves_the_sequence_alone(
        self, balancer: Balancer, nodes: list[FakeNode]
    ) -> None:
        for given in (nodes, tuple(nodes)):
            before = list(given)
            for _ in range(50):
                assert _is_among(balancer.choose(given, CALL), before)
                assert list(given) == before

    def test_chooses_the_only_node(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        for node in nodes * 3:
            assert balancer.choose([node], CALL) is node

    def test_never_chooses_a_node_that_is_not_given_this_time(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        outcomes = list(Outcome)
        for turn in range(1, 300):
            given = [node for bit, node in enumerate(nodes) if turn >> bit & 1] or nodes
            if turn % 2:
                given.reverse()
            chosen = balancer.choose(given, CALL)
            assert _is_among(chosen, given)
            balancer.record(chosen, outcomes[turn % 7 % len(outcomes)], 0.001 * turn)

    def test_tells_nodes_apart_by_identity(self, balancer: Balancer) -> None:
        twins = [FakeNode("10.0.0.1:8500"), FakeNode("10.0.0.1:8500")]
        balancer.choose(twins, CALL)
        balancer.forget(twins[0])
        for _ in range(10):
            assert balancer.choose(twins[1:], CALL) is twins[1]

    def test_takes_new_nodes_and_new_weights_while_running(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        for turn in range(60):
            nodes[turn % 4].weight = turn % 3
            nodes[turn % 4].in_flight = turn % 5
            given = [*nodes, FakeNode(f"10.0.1.{turn}:8500")]
            assert _is_among(balancer.choose(given, CALL), given)

    def test_copes_with_weights_that_are_all_zero(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        for node in nodes:
            node.weight = 0
        for _ in range(20):
            chosen = balancer.choose(nodes, CALL)
            assert _is_among(chosen, nodes)
            balancer.record(chosen, Outcome.FAILURE, 0.1)

    @pytest.mark.parametrize("outcome", Outcome)
    def test_takes_no_harm_from_a_node_it_does_not_know(
        self, balancer: Balancer, nodes: list[FakeNode], outcome: Outcome
    ) -> None:
        stranger = FakeNode("10.9.9.9:8500")
        balancer.record(stranger, outcome, 0.1)
        balancer.forget(stranger)
        balancer.choose(nodes, CALL)
        balancer.record(stranger, outcome, 0.1)
        balancer.forget(stranger)
        assert _is_among(balancer.choose(nodes, CALL), nodes)

    def test_keeps_nothing_of_a_forgotten_node_even_if_an_attempt_ends_later(
        self, balancer: Balancer, nodes: list[FakeNode]
    ) -> None:
        leaving = nodes.pop()
        for _ in range(20):
            chosen = balancer.choose([*nodes, leaving], CALL)
            balancer.record(chosen, Outcome.SUCCESS, 0.1)
        balancer.forget(leaving)
        balancer.record(leaving, Outcome.FAILURE, 0.1)
        trace = weakref.ref(leaving)
        del leaving, chosen
        gc.collect()
        assert trace() is None, "the balancer still holds on to the node"
        assert _is_among(balancer.choose(nodes, CALL), nodes)

    def test_does_not_block(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        started = time.perf_counter()
        for _ in range(1000):
            balancer.record(balancer.choose(nodes, CALL), Outcome.SUCCESS, 0.01)
        each = (time.perf_counter() - started) / 1000
        assert each < 200e-6, f"{each * 1e6:.0f} µs for one choice and its outcome; a few are expected"

    def test_gives_each_of_equal_nodes_something(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        if not self.spreads:
            pytest.skip("spreads is False")
        taken = _drive(balancer, nodes, 400)
        assert all(taken.values())

    def test_gives_nothing_to_weight_zero_while_another_has_weight(
        self, balancer: Balancer, nodes: list[FakeNode]
    ) -> None:
        if not self.weighs:
            pytest.skip("weighs is False")
        nodes[1].weight = 0
        taken = _drive(balancer, nodes, 400)
        assert taken[nodes[1]] == 0

    def test_sends_less_to_a_node_that_fails(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        if not self.learns:
            pytest.skip("learns is False")
        taken = _drive(balancer, nodes, 2000, failing=nodes[1])
        assert taken[nodes[1]] < 2000 / len(nodes) / 2


def _is_among(node: Any, nodes: Sequence[Any]) -> bool:
    return any(node is other for other in nodes)


def _drive(
    balancer: Balancer, nodes: Sequence[FakeNode], times: int, failing: FakeNode | None = None
) -> dict[FakeNode, int]:
    """How often each node is chosen, one request after the other."""
    taken = dict.fromkeys(nodes, 0)
    for _ in range(times):
        chosen = balancer.choose(nodes, CALL)
        assert isinstance(chosen, FakeNode)
        taken[chosen] += 1
        if chosen is failing:
            balancer.record(chosen, Outcome.FAILURE, 0.0001)
        else:
            balancer.record(chosen, Outcome.SUCCESS, 0.01)
    return taken
