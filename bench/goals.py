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

_FIGURES = {
    "cpu_us_per_request": "CPU",
    "alone_p50_ms": "p50 alone",
    "requests_per_s": "requests/s",
    "p50_ms": "p50",
    "p99_ms": "p99",
    "memory_mb": "memory",
}

Rows = Mapping[str, Mapping[str, Mapping[str, Row]]]
"""By table, load and system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A figure of one system, less that of a third if there is one, is at most `most` times that of another, and at
    least `least` times, in one table at one load."""

    table: str
    load: str
    system: str
    than: str
    most: float | None = None
    least: float | None = None
    less: str = ""
    figure: Literal["cpu_us_per_request", "alone_p50_ms", "requests_per_s", "p50_ms", "p99_ms", "memory_mb"] = (
        "cpu_us_per_request"
    )

    @property
    def what(self) -> str:
        """The ratio, in words."""
        system = f"({self.system} - {self.less})" if self.less else self.system
        return f"{self.table}, {self.load}, {_FIGURES[self.figure]}: {system} / {self.than}"

    @property
    def bound(self) -> str:
        bounds = {"at most": self.most, "at least": self.least}
        return " and ".join(f"{bound} {value:.2f}" for bound, value in bounds.items() if value is not None)

    def outcome(self, measured: Mapping[str, object]) -> Outcome | None:
        """By what was measured at its load, by system; None if one of its systems was not, or took no time that the
        clock of processes counts, as in a run that is very short."""
        if not {self.system, self.than, self.less or self.than} <= measured.keys():
            return None
        one, other = (getattr(measured[name], self.figure) for name in (self.system, self.than))
        less = getattr(measured[self.less], self.figure) if self.less else 0.0
        return Outcome(goal=self, ratio=(one - less) / other) if other else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a goal."""

    goal: Goal
    ratio: float

    @property
    def met(self) -> bool:
        most, least = self.goal.most, self.goal.least
        return (most is None or self.ratio <= most) and (least is None or self.ratio >= least)

    def __str__(self) -> str:
        return f"{self.goal.what} = {self.ratio:.2f}, {self.goal.bound}: {'met' if self.met else 'NOT met'}"


GOALS = (
    Goal(table="gateway", load="600B", system="ours-grpcio", than="echo-grpcio", most=3.0),
    Goal(table="gateway", load="600B", system="ours-grpcio", than="proxy-grpcio", most=1.15),
    Goal(table="gateway", load="600KB", system="ours-grpcio", than="proxy-grpcio", most=1.15),
    *(
        Goal(
            table="node-tensorflow", load=load, system="ours-tf-grpcio", less="bare-call", than="echo-grpcio", most=1.5
        )
        for load in ("small@128", "image@16")
    ),
    Goal(table="gateway-care", load="600B", system="ours-grpcio-care", than="ours-grpcio-bare", most=1.1),
    Goal(table="gateway-tasks", load="600B", system="ours-grpcio-10000-tasks", than="ours-grpcio-1-tasks", most=1.05),
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
        outcome = goal.outcome(every.get(goal.table, {}).get(goal.load, {}))
        if outcome:
            found.append(outcome)
    return found
