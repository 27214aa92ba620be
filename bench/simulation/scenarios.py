"""What is simulated: so many nodes, a load, and what befalls one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.simulation.node import Behaviour

NORMAL = Behaviour()
CAPACITY = NORMAL.at_once / NORMAL.mean_s
"""Requests a second that a node can answer."""
CLIENT_S = 2.0
_LOW, _HIGH = 0.4 * 4 * CAPACITY, 0.67 * 3 * CAPACITY


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Three parts: as it should be, the first node's fault, as it should be again.

    Attributes:
        name: its key in the tables.
        rate: requests a second.
        weights: of each node.
        by_weight: whether nodes have places in proportion to their weights, on average those of `behaviour`.
        fault: how the first node behaves meanwhile; none, if it does not change.
        every_s: it does so for so many seconds, then does not for as many, in turn; 0 is all the time.
        joins: whether the first node is not there before, and stays.
        route: keys of `RouteConfig`.
        deadline_s: how long a client waits.
        warm_s: before the fault.
    """

    name: str
    rate: float
    weights: tuple[int, ...] = (1, 1, 1, 1)
    by_weight: bool = False
    behaviour: Behaviour = NORMAL
    fault: Mapping[str, Any] = field(default_factory=dict)
    every_s: float = 0.0
    joins: bool = False
    route: Mapping[str, Any] = field(default_factory=dict)
    deadline_s: float = CLIENT_S
    warm_s: float = 2.0
    fault_s: float = 5.0
    after_s: float = 3.0

    @property
    def of_one(self) -> bool:
        """Whether something befalls the first node."""
        return bool(self.fault) or self.joins


SCENARIOS = (
    Scenario(name="all equal", rate=_LOW),
    Scenario(name="weights 1:2:3:4", rate=_LOW, weights=(1, 2, 3, 4), by_weight=True),
    Scenario(name="one ten times slower", rate=_LOW, fault={"mean_s": 0.4}),
    Scenario(name="one fails at once", rate=_LOW, fault={"fails": 1.0}),
    Scenario(name="one hangs", rate=_LOW, fault={"hangs": True}),
    Scenario(name="half of one's answers are errors", rate=_LOW, fault={"fails": 0.5}),
    Scenario(name="one flaps, 1 s down and 1 s up", rate=_LOW, fault={"refuses": True}, every_s=1.0),
    Scenario(name="one is gone, 67 % on the others", rate=_HIGH, fault={"refuses": True}),
    Scenario(name="one hangs, 67 % on the others", rate=_HIGH, fault={"hangs": True}),
    Scenario(
        name="one of eleven takes 2 s, half of the time",
        rate=300.0,
        weights=(1,) * 11,
        behaviour=Behaviour(at_once=1000, mean_s=0.02),
        fault={"later_s": 2.0},
        deadline_s=1.0,
    ),
    Scenario(
        name="overload, 174 %",
        rate=1.74 * 4 * CAPACITY,
        route={"node_in_flight": 6, "queue": 24},
        warm_s=1.0,
        fault_s=3.0,
        after_s=0.0,
    ),
    Scenario(name="one is added", rate=_HIGH, joins=True),
    Scenario(
        name="one fails at once, 10 requests/s",
        rate=10.0,
        fault={"fails": 1.0},
        warm_s=10.0,
        fault_s=60.0,
        after_s=30.0,
    ),
    Scenario(
        name="one of 64 fails at once",
        rate=0.4 * 64 / NORMAL.mean_s,
        weights=(1,) * 64,
        behaviour=Behaviour(at_once=1),
        fault={"fails": 1.0},
    ),
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}

OPTIONS: Mapping[str, Mapping[str, Any]] = {"orca_weighted_round_robin": {"blackout_s": 1.0}}
"""Options of strategies that are not the defaults: no run is longer than the time for which reports do not count."""
