"""What the figures of one run should be, as ratios."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from bench.figures import Figures
from bench.goals import Goal, Outcome
from bench.model_servers.models import MODELS
from bench.model_servers.systems import BARE, PEERS, TRITON_EMPTY
from bench.outputs import NODE

Rows = Mapping[str, Mapping[str, Figures]]
"""By load, as "mmoe@128", and system. Loads of more than one row in a request have no goal."""

BUSY = "mmoe@128"
_OURS, _TRITON = "ours-native", "triton"
_ANY_PEER = tuple(system.name for system in PEERS)
_RESNET_50 = MODELS["resnet50"]


def _rate(load: str, than: tuple[str, ...], least: float, kind: Literal["required", "aim"] = "aim") -> Goal:
    return Goal(table=NODE, load=load, system=_OURS, than=than, least=least, figure="requests_per_s", kind=kind)


GOALS = (
    _rate(BUSY, (_TRITON,), 3.0, "required"),
    _rate(BUSY, (_TRITON,), 6.0),
    Goal(table=NODE, load=BUSY, system=_OURS, than=(_TRITON,), most=0.17),
    Goal(table=NODE, load=BUSY, system=_OURS, than=(TRITON_EMPTY.name,), most=1.0),
    *(_rate(f"{model}@32", (_TRITON,), 3.5) for model in ("mmoe", "digits")),
    *(_rate(f"{model}@8", (_TRITON,), 2.5) for model in ("mmoe", "digits")),
    *(
        Goal(table=NODE, load=f"{model}@1", system=_OURS, than=(_TRITON,), most=0.6, figure="p50_ms")
        for model in ("mmoe", "digits")
    ),
    _rate(f"resnet50@{max(_RESNET_50.in_flight)}", (BARE,), 0.97),
    *(_rate(f"resnet50@{in_flight}", _ANY_PEER, 1.0) for in_flight in _RESNET_50.in_flight),
    Goal(table=NODE, load=BUSY, system=_OURS, than=(BARE,), most=1.2, figure="memory_mb"),
)


def outcomes(rows: Rows) -> list[Outcome]:
    """Of those goals whose systems were measured."""
    every = (goal.outcome(rows.get(goal.load, {})) for goal in GOALS)
    return [outcome for outcome in every if outcome]
