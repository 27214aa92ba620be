"""Weighted round robin, smooth: on the operator's weights, and on weights that follow how the nodes do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from dl_inference_core.config import PluginOptions
from dl_inference_core.gateway.balancing import Balancer, Node, Outcome, RoundRobin
from dl_inference_core.transport import Call


@dataclass(slots=True, eq=False)
class Share:
    """What is kept of one node.

    Attributes:
        static: the operator's weight, when last looked at.
        weight: what the node's part of the requests is proportional to; 0 only if `static` is.
        current: how far the node is behind its part, in requests times the sum of weights; negative when ahead.
    """

    static: int
    weight: int
    current: int = 0


class SmoothWeightedRoundRobin(Balancer):
    """Nginx's smooth weighted round robin; a subclass says what a weight is.

    Each choice adds to the current weight of every node given its weight, takes the largest (the first of equals), and
    subtracts from it the sum of those weights. So the current weights of all known nodes sum to 0 after every choice. A
    node that is not among those given keeps its own for the time it comes back. With constant weights and nodes, a
    period of Σw choices takes node i exactly w_i times, and any number of choices takes it less than 1 too often and at
    most 1/2 + 1/3 + … + 1/N too seldom.

    Nodes of weight 0 are taken only if no other node is given, and then in turn.

    When a node is forgotten, every current weight goes back to 0 and a new period begins: handing on what the lost node
    was owed would only make another node early. Weights stay.

    Source: ngx_http_upstream_get_peer in nginx's src/http/ngx_http_upstream_round_robin.c.

    Attributes:
        shares: what is kept of each node that was ever given and is not forgotten. Read only.
    """

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self.shares: dict[Node, Share] = {}
        self._round_robin = RoundRobin(PluginOptions())

    def choose(self, nodes: Sequence[Node], call: Call) -> Node:
        shares = self.shares
        total = 0
        highest: float = _LOWEST
        best = None
        for node in nodes:
            try:
                share = shares[node]
            except KeyError:
                share = shares[node] = Share(static=node.weight, weight=self._first_weight(node.weight))
            if share.static != node.weight:
                self._reweigh(share, node.weight)
            weight = share.weight
            if weight:
                total += weight
                share.current = current = share.current + weight
                if current > highest:
                    highest = current
                    best = share
                    chosen = node
        if best is None:
            return self._round_robin.choose(nodes, call)
        best.current -= total
        return chosen

    def forget(self, node: Node) -> None:
        if self.shares.pop(node, None) is not None:
            for share in self.shares.values():
                share.current = 0

    def _reweigh(self, share: Share, static: int) -> None:
        """The operator has changed a known node's weight: what was learned of the node goes along, in proportion."""
        before, after = self._first_weight(share.static), self._first_weight(static)
        share.static = static
        share.weight = max(1, share.weight * after // before) if before and after else after

    @abstractmethod
    def _first_weight(self, static: int) -> int:
        """The weight of a node of which nothing is known but the operator's weight; 0 for 0."""


_LOWEST = float("-inf")


class WeightedRoundRobin(SmoothWeightedRoundRobin):
    """Smooth weighted round robin on the operator's weights."""

    name = "weighted_round_robin"

    def _first_weight(self, static: int) -> int:
        return static


class DynamicWeightedRoundRobin(SmoothWeightedRoundRobin):
    """Smooth weighted round robin on effective weights: halved by each failure, half the way back up by each success.

    With W = `scale` * the operator's weight, an effective weight e starts at W, and

    - a failure, or an answer that the node has no room, makes it max(1, e >> 1);
    - a success adds (W - e + 1) >> 1.

    A node of weight 0 stays at 0. Source: wuba/dl_inference, `TensorflowServingBlockingStub.updateWeight`.
    """

    name = "dynamic_weighted_round_robin"

    class Options(PluginOptions):
        """Attributes:
        scale: the effective weight of a node of weight 1 that answers everything. Of N such nodes a dead one still
            gets 1 in 1 + (N-1) * scale requests; at 1 nothing is balanced.
        """

        scale: int = Field(default=100, ge=1, le=10_000)

    options: Options

    def record(self, node: Node, outcome: Outcome, seconds: float) -> None:
        share = self.shares.get(node)
        if share is None or not share.weight:
            return
        if outcome is Outcome.SUCCESS:
            share.weight += (self.options.scale * share.static - share.weight + 1) >> 1
        elif outcome is not Outcome.NEUTRAL:
            share.weight = max(1, share.weight >> 1)

    def _first_weight(self, static: int) -> int:
        return self.options.scale * static
