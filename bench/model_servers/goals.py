"""What the figures of one run should be, as ratios."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from bench.goals import Goal, Outcome
from bench.model_servers.models import MODELS
from bench.model_servers.systems import BARE, PEERS
from bench.outputs import NODE
from bench.rounds import Figures

_Figure = Literal["requests_per_s", "p99_ms"]

_TO_BE_AHEAD: Mapping[str, tuple[_Figure, ...]] = {
    "digits": ("requests_per_s", "p99_ms"),
    "resnet50": ("requests_per_s",),
}

Rows = Mapping[str, Mapping[str, Figures]]
"""By load, as "mmoe@128", and system."""

BUSY, _ALONE = "mmoe@128", "mmoe@1"


def _rate(load: str, system: str, than: str, least: float) -> Goal:
    return Goal(table=NODE, load=load, system=system, than=than, least=least, figure="requests_per_s")


GOALS = (
    _rate(BUSY, "ours-grpcio", "seldon-core", 8.0),
    _rate(BUSY, "ours-grpcio", "triton", 1.0),
    _rate(f"resnet50@{max(MODELS['resnet50'].in_flight)}", "ours-grpcio", BARE, 0.95),
    Goal(table=NODE, load=BUSY, system="ours-grpcio", than=BARE, most=1.2, figure="memory_mb"),
)


def outcomes(rows: Rows) -> list[Outcome]:
    """Of those goals whose two systems were measured; being ahead of all peers is being ahead of the best."""
    every = (goal.outcome(rows.get(goal.load, {})) for goal in (*GOALS, *_ahead(rows)))
    return [outcome for outcome in every if outcome]


def _ahead(rows: Rows) -> list[Goal]:
    goals = []
    for model, figures in _TO_BE_AHEAD.items():
        for in_flight in MODELS[model].in_flight:
            load = f"{model}@{in_flight}"
            goals += [goal for figure in figures if (goal := _ahead_of_best(load, figure, rows.get(load, {})))]
    return goals


def _ahead_of_best(load: str, figure: _Figure, measured: Mapping[str, Figures]) -> Goal | None:
    """What our node should be beside the best of the peers by one figure; None if there is no peer."""
    peers = {system.name: getattr(measured[system.name], figure) for system in PEERS if system.name in measured}
    if not peers:
        return None
    if figure == "requests_per_s":
        return _rate(load, "ours-grpcio", max(peers, key=lambda name: peers[name]), 1.0)
    best = min(peers, key=lambda name: peers[name])
    return Goal(table=NODE, load=load, system="ours-grpcio", than=best, most=1.0, figure=figure)
