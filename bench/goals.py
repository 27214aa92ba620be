"""What the figures of one run should be, as ratios."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bench import choices
from bench.choices import Choice, Choices
from bench.rounds import Row

CHOICES = "choice"
"""What stands in place of a table where a goal is about choices."""

Rows = Mapping[str, Mapping[str, Mapping[str, Row]]]
"""By table, load and system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A figure of one system, less that of a third if there is one, is at most `most` times that of another, in one
    table at one load."""

    table: str
    load: str
    system: str
    than: str
    most: float
    less: str = ""
    figure: Literal["cpu_us_per_request", "alone_p50_ms"] = "cpu_us_per_request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a goal."""

    goal: Goal
    ratio: float

    @property
    def met(self) -> bool:
        return self.ratio <= self.goal.most

    def __str__(self) -> str:
        goal = self.goal
        figure = {"cpu_us_per_request": "CPU", "alone_p50_ms": "p50 alone"}[goal.figure]
        system = f"({goal.system} - {goal.less})" if goal.less else goal.system
        return (
            f"{goal.table}, {goal.load}, {figure}: {system} / {goal.than} = {self.ratio:.2f}, "
            f"at most {goal.most:.2f}: {'met' if self.met else 'NOT met'}"
        )


GOALS = (
    Goal(table="gateway", load="600B", system="ours-grpcio", than="echo-grpcio", most=3.0),
    Goal(table="gateway", load="600B", system="ours-grpcio", than="proxy-grpcio", most=1.15),
    Goal(table="gateway", load="600KB", system="ours-grpcio", than="proxy-grpcio", most=1.15),
    Goal(table="gateway", load="600B", system="ours-envoy", than="plain-envoy", most=1.25),
    Goal(table="gateway", load="600B", system="ours-envoy", than="ours-grpcio", most=0.35),
    Goal(table="gateway", load="600KB", system="ours-envoy", than="plain-envoy", most=1.6),
    Goal(table="gateway", load="600B", system="ours-envoy", than="ours-grpcio", most=1.0, figure="alone_p50_ms"),
    Goal(table="node", load="echo@128", system="echo-envoy", than="echo-grpcio", most=0.35),
    *(
        Goal(
            table="node-tensorflow",
            load=load,
            system=f"ours-tf-{transport}",
            less="bare-call",
            than=f"echo-{transport}",
            most=1.5,
        )
        for load in ("small@128", "image@16")
        for transport in ("grpcio", "envoy")
    ),
    *(
        goal
        for transport in ("grpcio", "envoy")
        for goal in (
            Goal(
                table="gateway-care",
                load="600B",
                system=f"ours-{transport}-care",
                than=f"ours-{transport}-bare",
                most=1.1,
            ),
            Goal(
                table="gateway-tasks",
                load="600B",
                system=f"ours-{transport}-10000-tasks",
                than=f"ours-{transport}-1-tasks",
                most=1.05,
            ),
        )
    ),
)


def outcomes(rows: Rows, chosen: Choices) -> list[Outcome]:
    """Of those goals whose two systems were measured."""
    found = []
    every: Mapping[str, Mapping[str, Mapping[str, Row | Choice]]] = {**rows, CHOICES: chosen}
    flat = [
        Goal(table=CHOICES, load=strategy, system=choices.size(1024), than=choices.size(64), most=2.0)
        for strategy in chosen
    ]
    for goal in (*GOALS, *flat):
        measured = every.get(goal.table, {}).get(goal.load, {})
        if {goal.system, goal.than, goal.less or goal.than} <= measured.keys():
            one, other = (getattr(measured[name], goal.figure) for name in (goal.system, goal.than))
            less = getattr(measured[goal.less], goal.figure) if goal.less else 0.0
            found.append(Outcome(goal=goal, ratio=(one - less) / other))
    return found
