"""By weight, in turn or by chance: the operator's, or one that follows how a node does or what it reports."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

from pydantic import Field

from dl_inference_balancers.candidates import NEUTRAL, SUCCESS, OverEligible
from dl_inference_core.config import PluginOptions
from dl_inference_core.gateway.balancing import Balancer, Node, Outcome
from dl_inference_core.transport import Exchange
from dl_inference_core.wire.orca import Load


@dataclass(slots=True, eq=False)
class _Group:
    """The nodes of one weight. What each choice adds to their current weights is added here, once for all.

    Attributes:
        added: the sum of what was added.
        members: how many nodes are in it.
        heap: for each member (how far it is ahead, its place among the nodes given, itself), and entries out of date,
            but never at the top.
        stale: whether there may be such entries.
    """

    weight: int
    added: int = 0
    members: int = 0
    heap: list[tuple[int, int, Node]] = field(default_factory=list)
    stale: bool = False


@dataclass(slots=True, eq=False)
class Share:
    """What is kept of one node.

    Attributes:
        static: the operator's weight, when last looked at.
        most: the weight if nothing is held against the node.
        weight: what the node's part of the requests is proportional to; 0 only if `static` is.
        place: where it stands among the nodes given.
        ahead: what its current weight is less than what its group was added; less than 0 without a group.
        group: the nodes of its weight, while it is among those given and has a weight.
    """

    static: int
    most: int
    weight: int
    place: int = 0
    ahead: int = 0
    group: _Group | None = None

    @property
    def current(self) -> int:
        """How far the node is behind its part, in requests times the sum of weights; negative when ahead."""
        return (self.group.added if self.group is not None else 0) - self.ahead


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

    Cost of a choice: O(k + log n), k being the number of different weights, since nodes of equal weight never overtake
    each other; O(n) for a list, and for a tuple that was not the last.

    Source: ngx_http_upstream_get_peer in nginx's src/http/ngx_http_upstream_round_robin.c.

    Attributes:
        shares: what is kept of each node that was ever given and is not forgotten. Read only.
    """

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self.shares: dict[Node, Share] = {}
        self._given: Sequence[Node] | None = None
        self._groups: dict[int, _Group] = {}
        self._total = 0
        self._turn = 0

    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        if nodes is not self._given:
            self._arrange(nodes)
        best = first = None
        highest = 0
        for group in self._groups.values():
            group.added = added = group.added + group.weight
            entry = group.heap[0]
            current = added - entry[0]
            if first is None or current > highest or (current == highest and entry[1] < first[1]):
                best, highest, first = group, current, entry
        if best is None or first is None:
            self._turn += 1
            return nodes[self._turn % len(nodes)]
        ahead, place, chosen = first
        self.shares[chosen].ahead = ahead = ahead + self._total
        heapreplace(best.heap, (ahead, place, chosen))
        if best.stale:
            self._prune(best)
        return chosen

    def forget(self, node: Node) -> None:
        if self.shares.pop(node, None) is not None:
            for share in self.shares.values():
                share.group, share.ahead = None, 0
            self._groups = {}
            self._given = None

    def _arrange(self, nodes: Sequence[Node]) -> None:
        """Group the nodes given; those given before and not now keep their current weights."""
        for known in self.shares.values():
            if known.group is not None:
                known.ahead -= known.group.added
                known.group = None
        groups: dict[int, _Group] = {}
        self._groups = groups
        self._total = 0
        for place, node in enumerate(nodes):
            share = self.shares.get(node)
            if share is None:
                weight = self._first_weight(node.weight)
                share = self.shares[node] = Share(static=node.weight, most=weight, weight=weight)
            elif share.static != node.weight:
                self._operator_changed(share, node.weight)
            share.place = place
            if weight := share.weight:
                group = groups.get(weight)
                if group is None:
                    group = groups[weight] = _Group(weight)
                group.heap.append((share.ahead, place, node))
                group.members += 1
                share.group = group
                self._total += weight
        for group in groups.values():
            heapify(group.heap)
        self._given = nodes if isinstance(nodes, tuple) else None

    def _operator_changed(self, share: Share, static: int) -> None:
        """What was learned of the node goes along, in proportion."""
        before, after = self._first_weight(share.static), self._first_weight(static)
        share.static = static
        if before and after:
            share.most = max(1, share.most * after // before)
            share.weight = max(1, share.weight * after // before)
        else:
            share.most = share.weight = after

    def _weigh(self, node: Node, share: Share, weight: int) -> None:
        """Give a node of weight another one, neither of them 0; its current weight stays. O(log n)."""
        before = share.group
        if before is not None and weight != share.weight:
            group = self._groups.get(weight)
            if group is None:
                group = self._groups[weight] = _Group(weight)
            share.ahead += group.added - before.added
            share.group = group
            heappush(group.heap, (share.ahead, share.place, node))
            group.members += 1
            before.members -= 1
            if before.members:
                before.stale = True
                self._prune(before)
            else:
                del self._groups[before.weight]
            self._total += weight - share.weight
        share.weight = weight

    def _prune(self, group: _Group) -> None:
        """Take what is out of date from the top of a heap, and everywhere where it is half of the heap."""
        heap = group.heap
        if len(heap) > 2 * group.members + 8:
            heap[:] = {entry[1]: entry for entry in heap if self._up_to_date(entry, group)}.values()
            heapify(heap)
        while not self._up_to_date(heap[0], group):
            heappop(heap)
        group.stale = len(heap) > group.members

    def _up_to_date(self, entry: tuple[int, int, Node], group: _Group) -> bool:
        share = self.shares[entry[2]]
        return share.group is group and share.ahead == entry[0]

    @abstractmethod
    def _first_weight(self, static: int) -> int:
        """The weight of a node of which nothing is known but the operator's weight; 0 for 0."""


class WeightedRandom(OverEligible):
    """By chance, in proportion to the operator's weights.

    Cost of a choice: O(log n); O(1) where all weights are equal.
    """

    name = "random"

    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        if nodes is not self._given:
            self._take(nodes)
        return self._draw()


class WeightedRoundRobin(SmoothWeightedRoundRobin):
    """Smooth weighted round robin on the operator's weights.

    Cost of a choice: O(k + log n), with k different weights.
    """

    name = "weighted_round_robin"

    def _first_weight(self, static: int) -> int:
        return static


class EffectiveWeightedRoundRobin(SmoothWeightedRoundRobin):
    """Smooth weighted round robin on effective weights; a subclass says what the most is that a weight can be.

    An effective weight e starts at its maximum W, and

    - a failure, or an answer that the node has no room, makes it max(1, e >> 1);
    - a success adds (W - e + 1) >> 1;
    - a return from being left out as unwell makes it W.

    A node of weight 0 stays at 0. Cost of an outcome: O(1), O(log n) where it changes the weight.

    Source: wuba/dl_inference, `TensorflowServingBlockingStub.updateWeight`.
    """

    def record(self, node: Node, outcome: Outcome, seconds: float) -> None:
        share = self.shares.get(node)
        if share is None or not (weight := share.weight):
            return
        if outcome is SUCCESS:
            if lost := share.most - weight:
                self._weigh(node, share, weight + ((lost + 1) >> 1))
        elif outcome is not NEUTRAL and weight > 1:
            self._weigh(node, share, weight >> 1)

    def returned(self, node: Node) -> None:
        share = self.shares.get(node)
        if share is not None and share.weight:
            self._weigh(node, share, share.most)


class DynamicWeightedRoundRobin(EffectiveWeightedRoundRobin):
    """Smooth weighted round robin on effective weights: halved by each failure, half the way back up by each success.

    The most is `scale` * the operator's weight.

    Cost of a choice: O(k + log n), with k different effective weights.
    """

    name = "dynamic_weighted_round_robin"

    class Options(PluginOptions):
        """Attributes:
        scale: the effective weight of a node of weight 1 that answers everything. Of N such nodes a dead one still
            gets 1 in 1 + (N-1) * scale requests; at 1 nothing is balanced.
        """

        scale: int = Field(default=100, ge=1, le=10_000)

    options: Options

    def learned(self, node: Node) -> float | None:
        """Its effective weight, as a part of the most it can be."""
        share = self.shares.get(node)
        return share.weight / share.most if share is not None and share.weight else None

    def learn(self, node: Node, value: float) -> None:
        share = self.shares.get(node)
        if share is not None and share.weight:
            self._weigh(node, share, min(share.most, max(1, round(value * share.most))))

    def _first_weight(self, static: int) -> int:
        return self.options.scale * static


@dataclass(slots=True, eq=False)
class _Reported:
    """What a node says of itself.

    Attributes:
        weight: queries per second that it would answer if it were in use to the full.
        since: when the first report came after there was none of use.
        last: when the last one came.
    """

    weight: float
    since: float
    last: float


_MEAN = 32
_MOST = 10 * _MEAN


class OrcaWeightedRoundRobin(EffectiveWeightedRoundRobin):
    """Smooth weighted round robin on what the nodes report of their load (ORCA), as gRPC's `weighted_round_robin`.

    A node's weight is qps / (utilization + eps / qps * `error_penalty`), from its last report with a utilization and
    queries. It is of use once reports have come for `blackout_s`, and until none has come for `expiry_s`. A node
    without a weight of use counts as the mean of the others; where all are without, this is round robin. Weights are
    worked out anew every `update_s`, in steps of 1/32 of their mean, and from 1/32 of it to 10 times.

    Of the operator's weights only 0 has a meaning: no requests while another node has a weight.

    Where gRPC's leaves a node that fails without reports its part, here that weight is the most that the node's
    effective weight can be: each failure halves it, each success brings back half of what it lost.

    Cost of a choice: O(k + log n), with k different weights after rounding; O(n) once every `update_s`.

    Source: gRPC's proposal A58, "`weighted_round_robin` LB policy".
    """

    name = "orca_weighted_round_robin"

    class Options(PluginOptions):
        """Attributes:
        blackout_s: how long a node must have reported before its weight is used; also after it was left out.
        expiry_s: how long a weight is used after the last report.
        update_s: how often reports become weights.
        error_penalty: how much a node's errors weigh: at 1 one that fails all it gets counts as if it were in use to
            the full and more; at 0 its reports make it look idle.
        """

        blackout_s: float = Field(default=10.0, ge=0, le=3600)
        expiry_s: float = Field(default=180.0, gt=0, le=86_400)
        update_s: float = Field(default=1.0, ge=0.1, le=60)
        error_penalty: float = Field(default=1.0, ge=0, le=1000)

    options: Options

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._reported: dict[Node, _Reported] = {}
        self._due = -math.inf

    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        now = self.clock()
        if now >= self._due:
            self._due = now + self.options.update_s
            self._update(nodes, now)
        return super().choose(nodes, exchange)

    def report(self, node: Node, load: Load) -> None:
        if node not in self.shares or load.utilization <= 0 or load.qps <= 0:
            return
        weight = load.qps / (load.utilization + load.eps / load.qps * self.options.error_penalty)
        now = self.clock()
        self._take(node, weight, now, now)

    def returned(self, node: Node) -> None:
        """Its reports are waited for anew, for `blackout_s`."""
        super().returned(node)
        if self._reported.pop(node, None) is not None:
            self._due = -math.inf

    def learned(self, node: Node) -> float | None:
        """The weight that it reports, if of use."""
        return self._weight_of_use(node, self.clock()) or None

    def learn(self, node: Node, value: float) -> None:
        if node in self.shares and value > 0:
            now = self.clock()
            self._take(node, value, now - self.options.blackout_s, now)

    def forget(self, node: Node) -> None:
        super().forget(node)
        self._reported.pop(node, None)

    def _take(self, node: Node, weight: float, since: float, now: float) -> None:
        reported = self._reported.get(node)
        if reported is None or now - reported.last >= self.options.expiry_s:
            self._reported[node] = _Reported(weight, since, now)
        else:
            reported.weight, reported.since, reported.last = weight, min(reported.since, since), now

    def _weight_of_use(self, node: Node, now: float) -> float:
        reported = self._reported.get(node)
        if reported is None or now - reported.last >= self.options.expiry_s:
            return 0
        return reported.weight if now - reported.since >= self.options.blackout_s else 0

    def _update(self, nodes: Sequence[Node], now: float) -> None:
        weights = {node: self._weight_of_use(node, now) for node in nodes if node in self.shares}
        of_use = [weight for weight in weights.values() if weight]
        scale = _MEAN * len(of_use) / sum(of_use) if of_use else 0
        for node, weight in weights.items():
            share = self.shares[node]
            if share.static:
                before = share.most
                share.most = min(_MOST, max(1, round(weight * scale))) if weight else _MEAN
                share.weight = max(1, share.weight * share.most // before)
        self._given = None

    def _first_weight(self, static: int) -> int:
        return _MEAN if static else 0
