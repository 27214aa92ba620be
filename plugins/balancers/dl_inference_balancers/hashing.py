"""The same node for the same key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal

from pydantic import Field

from dl_inference_balancers.candidates import Trusting
from dl_inference_balancers.weighted import DynamicWeightedRoundRobin
from dl_inference_core.config import PluginOptions
from dl_inference_core.gateway.balancing import Node, Outcome
from dl_inference_core.transport import Exchange

_PRIME = (1 << 61) - 1


class RendezvousHash(Trusting[int]):
    """The same node for the same key, while it does well and has room: highest random weight, with bounded loads.

    Each node has a height u in (0, 1) that follows from the key and the node's address alone, the same in every
    process; the highest ln(u)/w is chosen, so that a node's part of the keys is proportional to its weight w, and one
    that leaves or joins moves no keys but its own. A node is passed over while it has ceil(`bound` * (m + 1) * w/Σw)
    requests in flight or more, m being those of all nodes; and as far as it is not trusted, since one that fails at
    once always has room.

    A request without the key goes by `dynamic_weighted_round_robin`.

    Cost of a choice: O(n); O(n log n) while the first node has no room; and hashing the key.

    Sources: Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates" (1998); Schindelhauer and
    Schomaker, "Weighted Distributed Hash Tables" (2005), the logarithmic method; Mirrokni, Thorup and Zadimoghaddam,
    "Consistent Hashing with Bounded Loads" (2018).
    """

    name = "rendezvous_hash"

    class Options(PluginOptions):
        """Attributes:
        key: what is hashed: an entry of the request's metadata, or all bytes of the request, which takes about a
            millisecond for each MB on the event loop.
        key_metadata: which entry; in lower case.
        bound: how many times the mean number in flight a node may have; 1 is as even as possible, a large number
            keeps every key where it is.
        """

        key: Literal["metadata", "request"] = "metadata"
        key_metadata: str = Field(default="x-routing-key", pattern=r"^[0-9a-z_.-]+$")
        bound: float = Field(default=1.25, ge=1, le=1_000_000)

    options: Options

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options, compared=1)
        self._numbers: list[int] = []
        self._keyless = DynamicWeightedRoundRobin(DynamicWeightedRoundRobin.Options())

    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        key = self._key(exchange)
        if key is None:
            return self._keyless.choose(nodes, exchange)
        if nodes is not self._given:
            self._take(nodes)
        eligible, numbers = self._eligible, self._numbers
        if self.doubted:
            eligible = self._trusted(eligible) or self._most_trusted(eligible)
            numbers = [self._known[node] for node in eligible]
        number = _number(key)
        # A product modulo a prime: for each node uniform over the keys.
        heights: Sequence[float] = [number * own % _PRIME for own in numbers]
        if self._bounds is not None:
            heights = [math.log(u / _PRIME) / node.weight for u, node in zip(heights, eligible, strict=True)]
        highest = eligible[heights.index(max(heights))]
        return highest if not highest.in_flight else self._with_room(eligible, heights, highest)

    def record(self, node: Node, outcome: Outcome, seconds: float) -> None:
        super().record(node, outcome, seconds)
        self._keyless.record(node, outcome, seconds)

    def returned(self, node: Node) -> None:
        super().returned(node)
        self._keyless.returned(node)

    def learned(self, node: Node) -> float | None:
        """The trust in it; or, if no request had a key, the part of its weight that is left, which is much the same."""
        trust = super().learned(node)
        return self._keyless.learned(node) if trust is None else trust

    def learn(self, node: Node, value: float) -> None:
        super().learn(node, value)
        self._keyless.learn(node, value)

    def forget(self, node: Node) -> None:
        super().forget(node)
        self._keyless.forget(node)

    def _first(self, node: Node) -> int:
        return _number(_digest(node.address.encode()))

    def _key(self, exchange: Exchange) -> bytes | None:
        """The digest of what is hashed."""
        if self.options.key == "request":
            return exchange.hash_message()
        value = exchange.find_metadata(self.options.key_metadata)
        return None if value is None else _digest(value.encode() if isinstance(value, str) else value)

    def _take(self, nodes: Sequence[Node]) -> None:
        super()._take(nodes)
        self._numbers = [self._known[node] for node in self._eligible]

    def _with_room(self, nodes: Sequence[Node], heights: Sequence[float], highest: Node) -> Node:
        """The highest node that has room; there always is one."""
        weights = [node.weight or 1 for node in nodes]
        each = self.options.bound * (sum([node.in_flight for node in nodes]) + 1) / sum(weights)
        if highest.in_flight < math.ceil(each * (highest.weight or 1)):
            return highest
        by_height = sorted(range(len(nodes)), key=heights.__getitem__, reverse=True)
        return next(nodes[i] for i in by_height if nodes[i].in_flight < math.ceil(each * weights[i]))


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _number(digest: bytes) -> int:
    """From 1 to `_PRIME` - 1."""
    return int.from_bytes(digest) % (_PRIME - 1) + 1
