"""Who comes into question: of the nodes that may be chosen those with a weight, and of those the ones that are trusted.

A node that fails at once has nothing to do and answers fast: a strategy that looks only at that sends it everything. So
each node has a trust, which a failure, or an answer that it has no room, halves, and a success takes half the way up to
1: the rule of `dynamic_weighted_round_robin`. Where a node would come into question, it does so only with the
probability of its trust. The least trust leaves a node that fails everything, and is preferred whenever it comes into
question, 1/32 of an equal part of the requests, at any rate of requests. That finds it well again, and a few answers
then give it its trust back.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from dl_inference_core.config import PluginOptions
from dl_inference_core.gateway.balancing import Balancer, Node, Outcome

SUCCESS, NEUTRAL = Outcome.SUCCESS, Outcome.NEUTRAL  # CPython 3.11 takes 0.1 µs to look up a member of an enumeration


class OverEligible(Balancer):
    """A strategy over the nodes that have a weight; where none has, over all, as if each had the weight 1.

    A subclass begins `choose` with `if nodes is not self._given: self._take(nodes)`, which costs O(n) for a list and
    for a tuple that was not the last, and nothing for the tuple that was.
    """

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._given: Sequence[Node] | None = None
        self._eligible: Sequence[Node] = ()
        self._bounds: list[int] | None = None
        """Sums of the weights up to and with each eligible node; None if all weights are equal."""

    def _take(self, nodes: Sequence[Node]) -> None:
        self._eligible = eligible = [node for node in nodes if node.weight] or nodes
        weights = [node.weight for node in eligible]
        self._bounds = list(accumulate(weights)) if weights.count(weights[0]) < len(weights) else None
        self._given = nodes if isinstance(nodes, tuple) else None

    def _draw(self) -> Node:
        """One eligible node by chance, in proportion to the weights. O(log n), O(1) if they are equal."""
        eligible, bounds = self._eligible, self._bounds
        chance = self.random.random()
        if bounds is None:
            return eligible[int(chance * len(eligible))]
        return eligible[bisect(bounds, chance * bounds[-1])]

    def forget(self, node: Node) -> None:
        self._given = None
        self._eligible = ()


_LEAST_PART = 1 / 32
_FULL_TRUST = 0.99

State = TypeVar("State")


class Trusting(OverEligible, Generic[State]):
    """A strategy that keeps something of each node, among it a trust.

    Attributes:
        doubted: the trust in each node that is not fully trusted. Read only.
    """

    def __init__(self, options: PluginOptions, *, compared: int) -> None:
        """Args:
        compared: among how many nodes at most one is chosen because it is the best of them.
        """
        super().__init__(options)
        self._least_trust = _LEAST_PART / compared
        self._known: dict[Node, State] = {}
        self.doubted: dict[Node, float] = {}

    @abstractmethod
    def _first(self, node: Node) -> State:
        """What is kept of a node of which nothing is known yet."""

    def record(self, node: Node, outcome: Outcome, seconds: float) -> None:
        if outcome is SUCCESS:
            if self.doubted and (trust := self.doubted.get(node)) is not None:
                self._trust(node, (trust + 1) / 2)
        elif outcome is not NEUTRAL and node in self._known:
            self._trust(node, self.doubted.get(node, 1.0) / 2)

    def returned(self, node: Node) -> None:
        self.doubted.pop(node, None)
        if node in self._known:
            self._known[node] = self._first(node)

    def learned(self, node: Node) -> float | None:
        """The trust in it."""
        return self.doubted.get(node, 1.0) if node in self._known else None

    def learn(self, node: Node, value: float) -> None:
        if node in self._known:
            self._trust(node, value)

    def forget(self, node: Node) -> None:
        super().forget(node)
        self._known.pop(node, None)
        self.doubted.pop(node, None)

    def _take(self, nodes: Sequence[Node]) -> None:
        known = self._known
        for node in nodes:
            if node not in known:
                known[node] = self._first(node)
        super()._take(nodes)

    def _trust(self, node: Node, trust: float) -> None:
        if trust < _FULL_TRUST:
            self.doubted[node] = max(self._least_trust, trust)
        else:
            self.doubted.pop(node, None)

    def _trusted(self, nodes: Sequence[Node]) -> Sequence[Node]:
        """Those that come into question this time, each with the probability of the trust in it; may be none."""
        doubted, chance = self.doubted, self.random.random
        return [node for node in nodes if (trust := doubted.get(node)) is None or chance() < trust]

    def _most_trusted(self, nodes: Sequence[Node]) -> Sequence[Node]:
        trusts = [self.doubted.get(node, 1.0) for node in nodes]
        most = max(trusts)
        return [node for node, trust in zip(nodes, trusts, strict=True) if trust == most]
