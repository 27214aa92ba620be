"""Whether something is left behind: the slope of memory, levels at rest before and after, and how requests ended."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MOST_MB_PER_HOUR = 5.0
ALLOWED = {"descriptors": 0, "threads": 4, "tasks": 0}
_MORE = ", ".join(f"{count} {name}" for name, count in ALLOWED.items())
RULES = f"""\
- answered: every request has ended, and as its kind may; none hung.
- memory: the resident memory of all processes of the gateway, sampled every second once it is warm, has a
  least-squares slope whose 95 % confidence interval includes zero, or that comes to less than
  {MOST_MB_PER_HOUR:g} MB an hour. The interval takes samples as independent of one another, which neighbouring ones are
  not: it is narrower than it should be, so that the rule errs by false alarms.
- descriptors, threads, tasks: with all nodes up, all routes to all of them and nothing in flight, the gateway holds at
  the end what it held at the rest within the warm-up; at most this much more: {_MORE}.
  Pools of threads grow, within bounds, when several have work at one moment, and shrink later.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """How fast something grows, per hour, and the ends of its 95 % confidence interval."""

    per_hour: float
    low: float
    high: float


def slope(seconds: Sequence[float], values: Sequence[float]) -> Slope:
    """The least-squares slope of `values`, of five samples at the least; its interval is Student's."""
    hours = np.asarray(seconds, float) / 3600
    hours -= hours.mean()
    centred = np.asarray(values, float) - np.mean(values)
    per_hour = float(hours @ centred / (hours @ hours))
    residuals = centred - per_hour * hours
    freedoms = len(values) - 2
    margin = _student(freedoms) * math.sqrt(residuals @ residuals / freedoms / (hours @ hours))
    return Slope(per_hour=per_hour, low=per_hour - margin, high=per_hour + margin)


def _student(freedoms: int) -> float:
    """The 97.5 % quantile of Student's t, to 1 % from 3 degrees of freedom (Abramowitz and Stegun, 26.7.5)."""
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * freedoms)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedoms**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedoms**3)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One of the rules, and what came of it."""

    rule: str
    met: bool
    said: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.said}: {'met' if self.met else 'NOT met'}"


def answered(
    sent: Mapping[str, int], ended: Mapping[str, Mapping[str, int]], expected: Mapping[str, Collection[str]]
) -> Finding:
    """Of requests by kind, those that ended by outcome, and how they may."""
    wrong = [
        f"{count} of {kind} ended {outcome}"
        for kind, outcomes in ended.items()
        for outcome, count in outcomes.items()
        if outcome not in expected[kind]
    ]
    wrong += [
        f"{count} of {kind} sent, {ends} ended"
        for kind, count in sent.items()
        if count != (ends := sum(ended.get(kind, {}).values()))
    ]
    total = sum(sent.values())
    return Finding(
        rule="answered",
        met=total > 0 and not wrong,
        said="; ".join(wrong) or f"all of {total} requests as they should be",
    )


def memory(growth: Slope) -> Finding:
    """In MB."""
    return Finding(
        rule="memory",
        met=growth.low <= 0 or growth.per_hour < MOST_MB_PER_HOUR,
        said=f"{growth.per_hour:+.1f} MB/h, 95 % within {growth.low:+.1f} and {growth.high:+.1f}",
    )


def level(name: str, before: int, after: int) -> Finding:
    """Of a key of `ALLOWED`, at rest."""
    return Finding(rule=name, met=after - before <= ALLOWED[name], said=f"{before} before, {after} at the end")
