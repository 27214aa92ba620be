"""What it takes a strategy to choose: CPU of a hot loop in this process."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from dl_inference_core.config import PluginOptions
from dl_inference_core.gateway.balancing import Balancer, Node, Outcome
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.testing.fakes import FakeNode
from dl_inference_core.testing.memory import MemoryExchange
from dl_inference_core.transport import Exchange

NODES = (4, 64, 1024)
_RUNS, _TURNS = 3, 2000
_EACH = 1.5
_SECONDS = (0.009, 0.010, 0.012)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a strategy takes to choose, and to take note of how it went."""

    cpu_us_per_request: float


Choices = Mapping[str, Mapping[str, Choice]]
"""By strategy and number of nodes, as `size` has it."""


class _Given(Balancer):
    """Any, at once: what the loop takes by itself."""

    name = "given"

    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        return nodes[0]


def size(nodes: int) -> str:
    """As tables and goals have it."""
    return f"{nodes} nodes"


def measure(share: float, measured: Callable[[], None]) -> Choices:
    """Every strategy that is installed, with its defaults, at each number of `NODES`.

    Args:
        share: of the choices that a full measurement has.
        measured: called after each strategy.
    """
    turns, runs = max(round(_TURNS * share), 20), max(round(_RUNS * share), 1)
    plugins = Plugins()
    found: dict[str, dict[str, Choice]] = {}
    for name in strategies():
        make = partial(plugins.make, Kind.BALANCERS, name, {}, "bench")
        found[name] = {size(nodes): Choice(cpu_us_per_request=_us(make, nodes, turns, runs)) for nodes in NODES}
        measured()
    return found


def strategies() -> tuple[str, ...]:
    """Every strategy that is installed."""
    return tuple(Plugins().classes(Kind.BALANCERS))


def _us(make: Callable[[], Balancer], count: int, turns: int, runs: int) -> float:
    """The least of several runs, less what the loop takes."""
    loop = min(_run(_Given(PluginOptions()), count, turns) for _ in range(runs))
    return max(min(_run(make(), count, turns) for _ in range(runs)) - loop, 0.0) / turns * 1e6


def _run(balancer: Balancer, count: int, turns: int) -> float:
    """Seconds of CPU of this thread for `turns` choices among nodes that have 1.5 requests in flight each."""
    nodes: tuple[FakeNode, ...] = tuple(FakeNode(f"10.0.{number >> 8}.{number & 255}:8500") for number in range(count))
    balancer.random = random.Random(1)  # noqa: S311 - the same run again
    exchanges = [MemoryExchange("/m", metadata=(("x-routing-key", str(key)),)) for key in range(256)]
    under_way: deque[FakeNode] = deque()

    def go(turns: int, most: int) -> None:
        for turn in range(turns):
            node = balancer.choose(nodes, exchanges[turn & 255])
            assert isinstance(node, FakeNode)
            node.in_flight += 1
            under_way.append(node)
            if len(under_way) > most:
                ended = under_way.popleft()
                ended.in_flight -= 1
                balancer.record(ended, Outcome.SUCCESS, _SECONDS[turn % 3])

    most = round(_EACH * count)
    go(most + most // 4, most)
    begun = time.thread_time()
    go(turns, most)
    return time.thread_time() - begun
