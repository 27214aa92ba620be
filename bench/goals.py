"""What the figures of one run should be, as ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bench import choices
from bench.choices import Choice, Choices
from bench.figures import Figure, Figures

CHOICES = "choice"
"""What stands in place of a table where a goal is about choices."""
COLUMNS = ("goal", "kind", "ratio", "least to most", "wanted", "outcome")

_FIGURES = {
    "cpu_us_per_request": "CPU",
    "requests_per_s": "requests/s",
    "p50_ms": "p50",
    "p99_ms": "p99",
    "memory_mb": "memory",
}
_UNITS = {"cpu_us_per_request": " µs", "memory_mb": " MB"}
_BEST_IS_MOST = frozenset({"requests_per_s"})

Rows = Mapping[str, Mapping[str, Mapping[str, Figures]]]
"""By table, load and system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A figure of one system is at most `most` times that of another, and at least `least` times, in one table at one
    load.

    Attributes:
        kind: without those that are required a transport is not done; the others are aims.
        than: the systems it is compared with: the best of those that were measured. Without any, `most` and `least`
            are about the figure itself.
        less: a system whose figure is taken off first.
    """

    table: str
    load: str
    system: str
    than: tuple[str, ...] = ()
    kind: Literal["required", "aim"] = "aim"
    most: float | None = None
    least: float | None = None
    less: str = ""
    figure: Figure = "cpu_us_per_request"

    @property
    def bound(self) -> str:
        unit = "" if self.than else _UNITS.get(self.figure, "")
        bounds = {"at most": self.most, "at least": self.least}
        return " and ".join(f"{bound} {value:g}{unit}" for bound, value in bounds.items() if value is not None)

    def what(self, than: str) -> str:
        """In words, where `than` is the best of those that it is compared with."""
        system = f"({self.system} - {self.less})" if self.less else self.system
        other = f" / {than}" if than else ""
        best = " (the best)" if len(self.than) > 1 else ""
        return f"{self.table}, {self.load}, {_FIGURES[self.figure]}: {system}{other}{best}"

    def outcome(self, measured: Mapping[str, object]) -> Outcome | None:
        """By what was measured at its load, by system; None if one of its systems was not, or took no time that the
        clock of processes counts, as in a run that is very short."""
        others = [name for name in self.than if name in measured]
        if self.system not in measured or (self.than and not others) or (self.less and self.less not in measured):
            return None
        best = max if self.figure in _BEST_IS_MOST else min
        than = best(others, key=lambda name: getattr(measured[name], self.figure)) if others else ""
        value = getattr(measured[self.system], self.figure)
        if self.less:
            value -= getattr(measured[self.less], self.figure)
        by = getattr(measured[than], self.figure) if than else 1.0
        if not by:
            return None
        return Outcome(goal=self, than=than, ratio=value / by, rounds=self._rounds(measured, than))

    def _rounds(self, measured: Mapping[str, object], than: str) -> Sequence[float]:
        """The ratio of each round; none of what is not measured in rounds."""
        systems = [measured[name] for name in (self.system, self.less, than) if name]
        each = [found.each(self.figure) for found in systems if isinstance(found, Figures)]
        if len(each) < len(systems):
            return ()
        ratios = []
        for values in zip(*each, strict=False):  # one that failed on its way has fewer
            value, *rest = values
            if self.less:
                value -= rest.pop(0)
            ratios += [value / rest[0]] if rest and rest[0] else [] if than else [value]
        return ratios


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a goal.

    Attributes:
        than: the best of those that it is compared with.
        ratio: of the medians; without `than` the figure itself.
        rounds: the ratio of each round.
    """

    goal: Goal
    than: str
    ratio: float
    rounds: Sequence[float] = ()

    @property
    def met(self) -> bool:
        most, least = self.goal.most, self.goal.least
        return (most is None or self.ratio <= most) and (least is None or self.ratio >= least)

    def cells(self) -> tuple[str, ...]:
        """As `COLUMNS` has them."""
        return (
            self.goal.what(self.than),
            self.goal.kind,
            f"{self.ratio:.2f}",
            f"{min(self.rounds):.2f} to {max(self.rounds):.2f}" if self.rounds else "",
            self.goal.bound,
            "reached" if self.met else "**not reached**",
        )

    def values(self) -> dict[str, Any]:
        """For JSON."""
        told = {"than": self.than, "ratio": self.ratio, "rounds": list(self.rounds), "met": self.met}
        return asdict(self.goal) | told


GATEWAY, NATIVE = "gateway", "ours-native"
PROXIES = ("plain-envoy", "nginx", "haproxy")
SMALL, LARGE = "600B", "600KB"
FLAT_STRATEGIES = (
    *("round_robin", "weighted_round_robin", "dynamic_weighted_round_robin", "orca_weighted_round_robin"),
    *("least_request", "random"),
)
"""With which a gateway may cost no more in front of 1,024 nodes than in front of 4. What the others cost is in the
table of choices."""
FEW_NODES, MANY_NODES = 4, 1024


def _than_envoy(load: str, most: float, kind: Literal["required", "aim"] = "aim") -> Goal:
    return Goal(table=GATEWAY, load=load, system=NATIVE, than=("plain-envoy",), most=most, kind=kind)


def _than_best(load: str, most: float, figure: Figure = "cpu_us_per_request") -> Goal:
    return Goal(table=GATEWAY, load=load, system=NATIVE, than=PROXIES, most=most, figure=figure)


def _no_loss(table: str, load: str, system: str, more: str) -> Goal:
    return Goal(table=table, load=load, system=f"{system}-{more}", than=(system,), least=1.0, figure="requests_per_s")


GOALS = (
    *(_than_envoy(f"{SMALL}@{in_flight}", 0.6, "required") for in_flight in (1, 8, 32, 128)),
    _than_envoy(f"{LARGE}@8", 1.2, "required"),
    *(_than_best(f"{SMALL}@{in_flight}", 1.0) for in_flight in (1, 8, 32)),
    _than_best(f"{SMALL}@128", 1.3),
    _than_envoy(f"{SMALL}@128", 0.35),
    *(_than_best(f"4KB@{in_flight}", 1.0) for in_flight in (8, 128)),
    *(_than_envoy(f"4KB@{in_flight}", 0.4) for in_flight in (8, 128)),
    _than_envoy(f"{LARGE}@8", 1.0),
    Goal(table=GATEWAY, load=f"{LARGE}@8", system=NATIVE, than=("nginx",), most=1.0),
    _than_best(f"{SMALL}@1", 1.0, "p50_ms"),
    Goal(table="gateway-tls", load=f"{SMALL}@128", system="ours-native-tls", than=("envoy-tls",), most=0.4),
    Goal(
        table="gateway-tasks",
        load=f"{SMALL}@128",
        system="ours-native-10000-tasks",
        than=("ours-native-1-tasks",),
        most=1.1,
    ),
    *(
        Goal(
            table="gateway-nodes",
            load=f"{SMALL}@128",
            system=f"ours-{strategy}-{MANY_NODES}-nodes",
            than=(f"ours-{strategy}-{FEW_NODES}-nodes",),
            most=1.1,
        )
        for strategy in FLAT_STRATEGIES
    ),
    *(
        _no_loss("gateway-threads", f"{SMALL}@{in_flight}", NATIVE, more)
        for in_flight in (32, 128)
        for more in ("2-threads", "2-processes")
    ),
    *(_no_loss("node-tensorflow", "small@128", "ours-tf-native", more) for more in ("2-threads", "2-processes")),
    Goal(
        table="gateway-tasks",
        load=f"{SMALL}@128",
        system="ours-native-10-tasks",
        most=60,
        figure="memory_mb",
    ),
    Goal(
        table="gateway-tasks",
        load=f"{SMALL}@128",
        system="ours-native-10000-tasks",
        most=150,
        figure="memory_mb",
    ),
    Goal(table="node-tensorflow", load="small@128", system="ours-tf-native", less="bare-call", most=20),
)


def outcomes(rows: Rows, chosen: Choices) -> list[Outcome]:
    """Of those goals whose systems were measured."""
    every: Mapping[str, Mapping[str, Mapping[str, Figures | Choice]]] = {**rows, CHOICES: chosen}
    flat = [
        Goal(table=CHOICES, load=strategy, system=choices.size(1024), than=(choices.size(64),), most=2.0)
        for strategy in chosen
    ]
    found = (goal.outcome(every.get(goal.table, {}).get(goal.load, {})) for goal in (*GOALS, *flat))
    return [outcome for outcome in found if outcome]
