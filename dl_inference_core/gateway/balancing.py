"""Which node answers next: the interface of balancing strategies, and the built-in round robin."""

from __future__ import annotations

import enum
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

from dl_inference_core.config import PluginOptions


class Node(Protocol):
    """What a strategy may know of a node. One object per node and route, for as long as the node stays in the route.

    Attributes:
        address: "host:port".
        weight: the operator's static weight, 0 or more; 1 unless configured.
        in_flight: attempts now under way on this node for this route.
    """

    @property
    def address(self) -> str: ...
    @property
    def weight(self) -> int: ...
    @property
    def in_flight(self) -> int: ...


class Outcome(enum.Enum):
    """What one attempt says of its node."""

    SUCCESS = "success"
    FAILURE = "failure"  # the node's fault: unreachable, timed out, internal error, no proper answer
    OVERLOAD = "overload"  # the node said RESOURCE_EXHAUSTED
    NEUTRAL = "neutral"  # says nothing of the node: the client's fault, or the client left


class Balancer(ABC):
    """A balancing strategy; one object per route, which lives as long as the route names the same strategy and options.

    A strategy only chooses. Health is judged elsewhere: `choose` is given usable nodes alone, and at least one.
    All methods run on the event loop, on the request path: they must neither block nor await, and should take about
    a microsecond for a handful of nodes. If one raises, round robin takes over for that request.

    A strategy in full::

        class FewestInFlight(Balancer):
            name = "fewest_in_flight"

            def choose(self, nodes: Sequence[Node]) -> Node:
                return min(nodes, key=lambda node: node.in_flight)
    """

    name: ClassVar[str]
    Options: ClassVar[type[PluginOptions]] = PluginOptions

    def __init__(self, options: PluginOptions) -> None:
        self.options = options

    @abstractmethod
    def choose(self, nodes: Sequence[Node]) -> Node:
        """One of `nodes`, for the next attempt."""

    def record(self, node: Node, outcome: Outcome, seconds: float) -> None:
        """An attempt that `choose` sent to `node` ended, `seconds` after it began."""

    def forget(self, node: Node) -> None:
        """`node` has left the route for good: drop what is kept of it."""


class RoundRobin(Balancer):
    """Cyclic over the usable nodes, from a random start; takes no account of weights."""

    name = "round_robin"

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._turn = random.randrange(1 << 16)  # noqa: S311 - only so that gateways do not start in step

    def choose(self, nodes: Sequence[Node]) -> Node:
        self._turn += 1
        return nodes[self._turn % len(nodes)]
