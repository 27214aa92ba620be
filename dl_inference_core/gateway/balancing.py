"""Which node answers next: the interface of balancing strategies, and the built-in round robin."""

from __future__ import annotations

import enum
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from dl_inference_core.config import PluginOptions
from dl_inference_core.transport import Exchange
from dl_inference_core.wire.orca import Load


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
    OVERLOAD = "overload"  # the node said RESOURCE_EXHAUSTED, or CANCELLED
    NEUTRAL = "neutral"  # says nothing of the node: the client's fault, or the client left


class Balancer(ABC):
    """A balancing strategy; one object per route, which lives as long as the route names the same strategy and options.

    A strategy only chooses. Health is judged elsewhere: `choose` is given usable nodes alone, and at least one.
    All methods run on the request path under the lock of the route, one at a time, on any thread: they must neither
    block nor await, and should take about a microsecond for a handful of nodes. If one raises, round robin takes over
    for that request.

    Attributes:
        clock: seconds that only grow; all that a strategy knows of time. A simulation sets its own.
        random: where chance comes from; likewise.

    A strategy in full::

        class AnyOne(Balancer):
            name = "any_one"

            def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
                return self.random.choice(nodes)
    """

    name: ClassVar[str]
    Options: ClassVar[type[PluginOptions]] = PluginOptions

    def __init__(self, options: PluginOptions) -> None:
        self.options = options
        self.clock: Callable[[], float] = time.monotonic
        self.random = random.Random()  # noqa: S311 - no secret

    @abstractmethod
    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        """One of `nodes`, for the next attempt at the client's `exchange`.

        While nothing has changed, neither who is usable nor a weight, `nodes` is the same tuple, so what is worked out
        of a tuple may be kept as long as that comes again. Another attempt at a request is given a list.
        """

    def record(self, node: Node, outcome: Outcome, seconds: float) -> None:
        """An attempt that `choose` sent to `node` ended, `seconds` after it began."""

    def report(self, node: Node, load: Load) -> None:
        """`node` sent `load` along with an answer. Called before `record`."""

    def returned(self, node: Node) -> None:
        """`node` was left out, or given but a request now and then, as unwell; what made it so is over."""

    def learned(self, node: Node) -> float | None:
        """What is known of `node`, as one number that another process's `learn` understands; None if nothing is.

        With several gateway processes each is asked for it a few times a second; what has changed goes to the others.
        """
        return None

    def learn(self, node: Node, value: float) -> None:
        """Another process, of the same strategy and options, has `learned` this of `node`."""

    def forget(self, node: Node) -> None:
        """`node` has left the route for good: drop what is kept of it."""


class RoundRobin(Balancer):
    """Cyclic over the usable nodes, from a random start; takes no account of weights."""

    name = "round_robin"

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._turn = -1

    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        if self._turn < 0:
            self._turn = self.random.randrange(1 << 16)
        self._turn += 1
        return nodes[self._turn % len(nodes)]
