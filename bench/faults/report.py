"""What the runs came to: for programs, on the terminal, as a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.faults import course
from bench.faults.gateways import TIMEOUT_MS
from bench.faults.goals import BY_ID, ROWS, Finding
from bench.faults.node import Behaviour

CHART = "reliability.svg"
_COUNTS = ("requests", "failed")
_HEAD = """\
# Reliability

What clients see of a gateway when its nodes, its clients, its files or its own processes misbehave. Written by
`{command}` on {date}, in {minutes} minutes: {cores} cores of {cpu}, Python {python}, {versions}.

![Failures and share of the nodes over time]({chart})

Faults one after the other, each of another node (shaded), at 67 %. Areas: attempts that reached each node; red:
requests that failed.

## How it is measured

- Four nodes, each with room for {at_once} requests that take {latency:g} ms: {capacity:g} requests a second. The loads
  are {low:.0f} requests a second, 40 % of what four can do, and {high:.0f}, 67 % of what three can. An attempt may
  take {timeout} ms, and a client waits for 2 s.
- Clients send by the clock (at random, with a fixed seed), whether answers come or not, and never again what failed. A
  latency counts from when a request was due. `client_late_p99_ms` is how late they were themselves.
- Nodes count what reaches them. Only of nodes that are dead or stand still the gateway's own counter of attempts is
  taken: `routed_after_1s`, `share_after_2s`; baselines have none, and what is not known is not held against them.
- The control is the time before the fault in the same run: `p99_ratio` is over that. `share_of_fair` is a node's part
  of all attempts, over what it would be if all nodes had as many. `recovered_s` is from when what was wrong is over to
  the first half second in which the node gives 80 % of its fair part of all answers. `starved_seconds` are those in
  which a node that was well had nothing, `healthy_ejected` how often the gateway says that it left one out.
- With "F1 F2 …" done in one run, `requests` are the run's, and a failure belongs to the fault in whose time it came.
- `ours-…` is our gateway on that network stack with that strategy, with its defaults otherwise. `envoy` is Envoy with
  round robin, `envoy-tuned` with its retries, outlier detection and health checks as in `bench/faults/gateways.py`.
  `original` chooses nodes as wuba/dl_inference does as published, `original-W100` as it is meant.
- A goal that is not reached stands in the last column. What was not measured is not met.

"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that one session came to.

    Attributes:
        machine: where, when, how and with what.
        series: counts over time, of the runs that have them.
    """

    machine: Mapping[str, Any]
    findings: Sequence[Finding]
    series: Sequence[Mapping[str, Any]]

    def values(self) -> dict[str, Any]:
        """What faults.json holds."""
        tests = [{"id": row.id, "fault": row.fault, "tests": list(row.tests)} for row in ROWS if row.tests]
        return {"machine": dict(self.machine), "faults": [each.values() for each in self.findings], "tests": tests}

    def show(self, console: Console) -> None:
        """As a table, with the figures that the goals are about."""
        headings = ("row", "system", "load", "requests", "failed", "figures", "result")
        table = Table(*headings, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for each in self._ordered():
            of_goals = {name: each.figures[name] for name in _about(each) if name in each.figures}
            counts = [_number(each.figures.get(name, math.nan)) for name in _COUNTS]
            result = Text(_result(each), "" if each.met else "bold red")
            table.add_row(each.row, each.system, each.load, *counts, _figures(of_goals), result)
        console.print(table)
        met = sum(each.met for each in self.findings)
        console.print(f"{met} of {len(self.findings)} met", highlight=False)

    def page(self) -> str:
        """docs/reliability.md; its chart is in the file `CHART` beside it."""
        behaviour = Behaviour()
        head = _HEAD.format_map(
            {
                **self.machine,
                "versions": ", ".join(f"{name} {version}" for name, version in self.machine["versions"].items()),
                "chart": CHART,
                "at_once": behaviour.at_once,
                "latency": behaviour.latency_ms,
                "capacity": course.CAPACITY,
                "low": course.LOADS["40 %"],
                "high": course.LOADS["67 %"],
                "timeout": TIMEOUT_MS,
            }
        )
        lines = [head + "## Scorecard", ""]
        for row in ROWS:
            found = [each for each in self.findings if each.row == row.id]
            lines += [f"### {row.id}: {row.fault}", ""]
            if row.tests:
                lines += [f"Proven by {', '.join(f'`{test}`' for test in row.tests)}.", ""]
            if not row.goal:
                continue
            lines += [f"Goal: {row.goal}.", ""]
            if not found:
                lines += ["Not measured in this session.", ""]
                continue
            lines += ["| system | load | figures | result |", "| --- | --- | --- | --- |"]
            lines += [f"| {each.system} | {each.load} | {_figures(each.figures)} | {_result(each)} |" for each in found]
            lines.append("")
        return "\n".join(lines).rstrip() + "\n"

    def _ordered(self) -> Iterator[Finding]:
        order = {row: number for number, row in enumerate(BY_ID)}
        yield from sorted(self.findings, key=lambda each: order[each.row])


def _about(finding: Finding) -> list[str]:
    """The figures that its goals are about, beside the counts."""
    return [name for name in dict.fromkeys(goal.figure for goal in finding.goals) if name not in _COUNTS]


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in figures.items() if not math.isnan(value))


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "never"
    return f"{value:.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def _result(finding: Finding) -> str:
    if finding.why:
        return f"not measured: {finding.why}"
    if finding.met:
        return "met"
    return "NOT met: " + ", ".join(
        f"{goal} (is {_number(value) if not math.isnan(value) else 'not known'})"
        for goal in finding.missed
        for value in (finding.figures.get(goal.figure, math.nan),)
    )
