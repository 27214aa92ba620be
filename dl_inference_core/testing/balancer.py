"""The suite for balancing strategies."""

from __future__ import annotations

import gc
import itertools
import random
import time
import weakref
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any, ClassVar

import pytest

from dl_inference_core.gateway.balancing import Balancer, Outcome
from dl_inference_core.testing.fakes import EXCHANGE, FakeNode
from dl_inference_core.testing.plugin import PluginConformance
from dl_inference_core.transport import Exchange
from dl_inference_core.wire.orca import Load

_LOAD = Load(utilization=0.5, qps=100.0, eps=1.0)
_NO_LOAD = Load(utilization=0.0, qps=0.0, eps=0.0)


class BalancerConformance(PluginConformance):
    """What every balancing strategy must keep::

    class TestAnyOne(BalancerConformance):
        balancer_class = AnyOne
    """

    balancer_class: ClassVar[type[Balancer]]
    spreads: ClassVar[bool] = True
    """Whether nodes that are alike in all things each get requests."""
    even: ClassVar[bool] = True
    """Whether nodes that differ by chance alone get about as many requests at any time."""
    weighs: ClassVar[bool] = False
    """Whether it heeds weights: then a node of weight 0 gets nothing while another has weight."""
    learns: ClassVar[bool] = False
    """Whether it sends less to a node that fails: then at most a tenth of its part, within a second. Where it does not,
    such a node must still not attract requests."""

    def exchange(self, number: int) -> Exchange:
        """The request of that number; for strategies that read requests."""
        return EXCHANGE

    def make(self) -> Balancer:
        return self.balancer_class(self.balancer_class.Options(**self.options))

    @pytest.fixture
    def balancer(self) -> Balancer:
        return self.make()

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
                assert _is_among(balancer.choose(given, EXCHANGE), before)
                assert list(given) == before

    def test_chooses_the_only_node(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        for node in nodes * 3:
            assert balancer.choose([node], EXCHANGE) is node

    def test_never_chooses_a_node_that_is_not_given_this_time(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        outcomes = list(Outcome)
        for turn in range(1, 300):
            given = [node for bit, node in enumerate(nodes) if turn >> bit & 1] or nodes
            if turn % 2:
                given.reverse()
            chosen = balancer.choose(tuple(given) if turn % 3 else given, self.exchange(turn))
            assert _is_among(chosen, given)
            balancer.record(chosen, outcomes[turn % 7 % len(outcomes)], 0.001 * turn)

    def test_tells_nodes_apart_by_identity(self, balancer: Balancer) -> None:
        twins = [FakeNode("10.0.0.1:8500"), FakeNode("10.0.0.1:8500")]
        balancer.choose(twins, EXCHANGE)
        balancer.forget(twins[0])
        for _ in range(10):
            assert balancer.choose(twins[1:], EXCHANGE) is twins[1]

    def test_takes_new_nodes_and_new_weights_while_running(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        for turn in range(60):
            nodes[turn % 4].weight = turn % 3
            nodes[turn % 4].in_flight = turn % 5
            given = [*nodes, FakeNode(f"10.0.1.{turn}:8500")]
            assert _is_among(balancer.choose(given, EXCHANGE), given)

    def test_copes_with_weights_that_are_all_zero(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        for node in nodes:
            node.weight = 0
        for _ in range(20):
            chosen = balancer.choose(nodes, EXCHANGE)
            assert _is_among(chosen, nodes)
            balancer.record(chosen, Outcome.FAILURE, 0.1)

    @pytest.mark.parametrize("outcome", Outcome)
    def test_takes_no_harm_from_a_node_it_does_not_know(
        self, balancer: Balancer, nodes: list[FakeNode], outcome: Outcome
    ) -> None:
        stranger = FakeNode("10.9.9.9:8500")
        for _ in range(2):
            balancer.report(stranger, _LOAD)
            balancer.record(stranger, outcome, 0.1)
            balancer.returned(stranger)
            balancer.learn(stranger, 0.5)
            assert balancer.learned(stranger) is None
            balancer.forget(stranger)
            assert _is_among(balancer.choose(nodes, EXCHANGE), nodes)

    def test_keeps_nothing_of_a_forgotten_node_even_if_an_attempt_ends_later(
        self, balancer: Balancer, nodes: list[FakeNode]
    ) -> None:
        leaving = nodes.pop()
        given = (*nodes, leaving)
        for turn in range(40):
            chosen = balancer.choose(given, self.exchange(turn))
            balancer.report(chosen, _LOAD)
            balancer.record(chosen, Outcome.SUCCESS if turn % 2 else Outcome.FAILURE, 0.1)
        balancer.forget(leaving)
        balancer.report(leaving, _LOAD)
        balancer.record(leaving, Outcome.FAILURE, 0.1)
        balancer.returned(leaving)
        balancer.learn(leaving, 0.5)
        trace = weakref.ref(leaving)
        del leaving, chosen, given
        gc.collect()
        assert trace() is None, "the balancer still holds on to the node"
        assert _is_among(balancer.choose(nodes, EXCHANGE), nodes)

    def test_does_not_block(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        rounds = []
        for _ in range(20):
            started = time.perf_counter()
            for _ in range(50):
                balancer.record(balancer.choose(nodes, EXCHANGE), Outcome.SUCCESS, 0.01)
            rounds.append((time.perf_counter() - started) / 50)
        each = min(rounds)  # other programs may have the cores in some of them
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

    def test_a_node_that_fails_at_once_attracts_nothing(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        simulation = Simulation(balancer, nodes, self.exchange)
        simulation.run(1)
        simulation.failing.add(nodes[1])
        simulation.run(1)
        since = simulation.now
        simulation.run(4)
        part = simulation.part(nodes[1], since)
        assert part <= (0.1 if self.learns else 1.15), f"{part:.2f} of a fair part of the attempts"

    def test_a_node_that_is_back_soon_gets_its_part_again(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        simulation = Simulation(balancer, nodes, self.exchange)
        simulation.run(1)
        simulation.failing.add(nodes[1])
        simulation.run(1)
        simulation.left_out.add(nodes[1])
        simulation.run(1)
        simulation.failing.clear()
        simulation.left_out.clear()
        balancer.returned(nodes[1])
        simulation.run(1.5)
        since = simulation.now
        simulation.run(3)
        part = simulation.part(nodes[1], since)
        assert part >= (0.8 if self.even else 0.1), f"{part:.2f} of a fair part of the attempts"

    def test_is_the_same_under_the_same_clock_and_chance(self, nodes: list[FakeNode]) -> None:
        runs = []
        for _ in range(2):
            simulation = Simulation(self.make(), nodes, self.exchange)
            simulation.run(0.5)
            simulation.failing.add(nodes[1])
            simulation.run(0.5)
            runs.append(simulation.attempts)
        assert runs[0] == runs[1]

    def test_what_says_nothing_of_a_node_changes_nothing(self, nodes: list[FakeNode]) -> None:
        runs = []
        for storm in (False, True):
            balancer = self.make()
            simulation = Simulation(balancer, nodes, self.exchange)
            for turn in range(20):
                simulation.run(0.05)
                for seconds in (0.0, 5.0) * 10 if storm else ():
                    balancer.record(nodes[turn % len(nodes)], Outcome.NEUTRAL, seconds)
            runs.append((simulation.attempts, [balancer.learned(node) for node in nodes]))
        assert runs[0] == runs[1]

    def test_takes_load_reports(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        given = tuple(nodes)
        for turn in range(100):
            chosen = balancer.choose(given, self.exchange(turn))
            balancer.report(chosen, _NO_LOAD if turn % 3 else _LOAD)
            balancer.record(chosen, Outcome.SUCCESS, 0.01)

    def test_understands_what_another_process_has_learned(self, nodes: list[FakeNode]) -> None:
        one, other = self.make(), self.make()
        simulation = Simulation(one, nodes, self.exchange)
        simulation.failing.add(nodes[1])
        simulation.run(1)
        for node in nodes:
            one.report(node, _LOAD)
        if type(one).learned is not Balancer.learned:
            assert any(one.learned(node) is not None for node in nodes), "it has learned nothing in a second"
        other.choose(nodes, self.exchange(0))
        for node in nodes:
            if (value := one.learned(node)) is not None:
                other.learn(node, value)
                assert other.learned(node) == pytest.approx(value, rel=0.01)
                other.learn(node, value)
                assert other.learned(node) == pytest.approx(value, rel=0.01)
            assert _is_among(other.choose(nodes, EXCHANGE), nodes)


class Simulation:
    """A balancer, fake nodes and an open-loop client under a clock of its own; the same each time.

    A node answers after 10 to 20 ms; one that fails does so after 1 ms, and another is then tried, once.

    Attributes:
        now: seconds since the start.
        failing: the nodes that fail.
        left_out: the nodes that are not given to the balancer.
        attempts: when, and on which node of those that it was made with.
    """

    def __init__(
        self,
        balancer: Balancer,
        nodes: Sequence[FakeNode],
        exchange: Callable[[int], Exchange],
        rate: float = 300,
        seconds: Callable[[FakeNode, float], float] = lambda node, chance: 0.01 + 0.01 * chance,
    ) -> None:
        """Args:
        rate: requests in a second, on average.
        seconds: what a node takes to answer, given a number by chance from 0 to 1.
        """
        self.now = 0.0
        self.failing: set[FakeNode] = set()
        self.left_out: set[FakeNode] = set()
        self.attempts: list[tuple[float, int]] = []
        self._balancer = balancer
        self._nodes = nodes
        self._exchange = exchange
        self._rate = rate
        self._seconds = seconds
        self._chance = random.Random(1)  # noqa: S311 - no secret
        self._number = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._places = {node: place for place, node in enumerate(nodes)}
        balancer.clock = lambda: self.now
        balancer.random = random.Random(2)  # noqa: S311
        for node in nodes:
            node.in_flight = 0
        self._at(0, self._arrive)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        self._given = tuple(node for node in self._nodes if node not in self.left_out)
        while self._events[0][0] < end:
            self.now, _, happens = heappop(self._events)
            happens()
        self.now = end

    def part(self, node: FakeNode, since: float) -> float:
        """How much of the attempts since then were on `node`; 1 is what it would have if all had as many."""
        places = [place for at, place in self.attempts if at >= since]
        return places.count(self._places[node]) * len(self._nodes) / len(places)

    def _at(self, seconds: float, happens: Callable[[], None]) -> None:
        heappush(self._events, (self.now + seconds, next(self._number), happens))

    def _arrive(self) -> None:
        self._attempt(self._given, self._exchange(next(self._number)), attempts=2)
        self._at(self._chance.expovariate(self._rate), self._arrive)

    def _attempt(self, given: Sequence[FakeNode], exchange: Exchange, attempts: int) -> None:
        node = self._balancer.choose(given, exchange)
        assert isinstance(node, FakeNode)
        began = self.now
        fails = node in self.failing
        self.attempts.append((began, self._places[node]))
        node.in_flight += 1

        def end() -> None:
            node.in_flight -= 1
            self._balancer.record(node, Outcome.FAILURE if fails else Outcome.SUCCESS, self.now - began)
            others = [other for other in self._given if other is not node]
            if fails and others and attempts > 1:
                self._attempt(others, exchange, attempts - 1)

        self._at(0.001 if fails else self._seconds(node, self._chance.random()), end)


def _is_among(node: Any, nodes: Sequence[Any]) -> bool:
    return any(node is other for other in nodes)


def _drive(balancer: Balancer, nodes: Sequence[FakeNode], times: int) -> dict[FakeNode, int]:
    """How often each node is chosen, one request after the other."""
    taken = dict.fromkeys(nodes, 0)
    given = tuple(nodes)
    for _ in range(times):
        chosen = balancer.choose(given, EXCHANGE)
        assert isinstance(chosen, FakeNode)
        taken[chosen] += 1
        balancer.record(chosen, Outcome.SUCCESS, 0.01)
    return taken
