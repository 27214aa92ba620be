"""What the runs came to: for programs, on the terminal, as a page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.faults import course
from bench.faults.gateways import TIMEOUT_MS
from bench.faults.goals import BY_ID, ROWS, Finding, restored
from bench.faults.node import Behaviour

CHART = "reliability.svg"
_COUNTS = ("requests", "failed")
_ROOT = Path(__file__).parents[2]
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
_EARLIER = """\
- What has a date in the last column was measured then: by `{command}`, begun on {date}, or by a run of a part since.
  All else is of the command above.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that one session came to, or that sessions came to one after the other.

    Attributes:
        machine: where, when, how and with what: of the last session.
        series: counts over time, of the runs that have them.
        first: `machine` of the session whose findings the later ones took the place of, if there were several.
    """

    machine: Mapping[str, Any]
    findings: Sequence[Finding]
    series: Sequence[Mapping[str, Any]]
    first: Mapping[str, Any] | None = None

    @staticmethod
    def read(file: Path) -> Report:
        """What `write` wrote.

        Raises:
            OSError, ValueError, KeyError, TypeError: it cannot be read, or is something else.
        """
        values = json.loads(file.read_text(encoding="utf-8"))
        written = minute(datetime.fromtimestamp(file.stat().st_mtime, UTC))
        return Report(
            machine=values["machine"],
            findings=[restored(each, written) for each in values["faults"] if each["id"] in BY_ID],
            series=json.loads(_of_series(file).read_text(encoding="utf-8")),
            first=values.get("first"),
        )

    def write(self, file: Path) -> None:
        """As faults.json, with the series in a file beside it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.text() + "\n", encoding="utf-8")
        _of_series(file).write_text(json.dumps(self.series) + "\n", encoding="utf-8")

    def text(self) -> str:
        """The text of faults.json."""
        return json.dumps(self.values(), indent=2, ensure_ascii=False)

    def over(self, earlier: Report) -> Report:
        """Both: what was measured here takes the place of findings of the same row, system and load."""
        known = {each.key for each in earlier.findings if not each.why}
        new: dict[tuple[str, str, str], list[Finding]] = {}
        for each in self.findings:
            if not each.why or each.key not in known:
                new.setdefault(each.key, []).append(each)
        mine = set(new)
        findings: list[Finding] = []
        for each in earlier.findings:
            findings += new.pop(each.key, []) if each.key in mine else [each]
        findings += [each for added in new.values() for each in added]
        runs = {_run(each) for each in self.series}
        series = [*(each for each in earlier.series if _run(each) not in runs), *self.series]
        return replace(self, findings=findings, series=series, first=earlier.first or earlier.machine)

    def values(self) -> dict[str, Any]:
        """What faults.json holds."""
        tests = [{"id": row.id, "fault": row.fault, "tests": list(row.tests)} for row in ROWS if row.tests]
        pages = [
            {"id": row.id, "fault": row.fault, "page": row.page, "date": _date_of(row.page)} for row in ROWS if row.page
        ]
        return {
            "machine": dict(self.machine),
            "first": self.first,
            "faults": [each.values() for each in self.findings],
            "tests": tests,
            "pages": pages,
        }

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
        for whose, of in (("ours", True), ("baselines", False)):
            found = [each for each in self.findings if each.ours is of]
            if found:
                met = sum(each.met for each in found)
                console.print(f"{whose}: {met} of {len(found)} met", highlight=False)

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
        if self.first:
            head += _EARLIER.format_map(self.first)
        lines = [head, "## Scorecard", ""]
        for row in ROWS:
            found = [each for each in self.findings if each.row == row.id]
            lines += [f"### {row.id}: {row.fault}", ""]
            if row.tests:
                lines += [f"Proven by {', '.join(f'`{test}`' for test in row.tests)}.", ""]
            if row.page:
                page = f"[{row.page}]({Path(row.page).name})"
                lines += [f"Measured by {row.command}: {page}, of {_date_of(row.page) or 'an unknown time'}.", ""]
            if not row.goal:
                continue
            lines += [f"Goal: {row.goal}.", ""]
            if not found:
                lines += ["Not measured.", ""]
                continue
            lines += ["| system | load | figures | result |", "| --- | --- | --- | --- |"]
            lines += [
                f"| {each.system} | {each.load} | {_figures(each.figures)} | {_result(each)}{self._since(each)} |"
                for each in found
            ]
            lines.append("")
        return "\n".join(lines).rstrip() + "\n"

    def _since(self, finding: Finding) -> str:
        """When it was measured, if that was before the last session."""
        # To the minute, both in UTC.
        earlier = finding.measured and finding.measured[:16] < self.machine["date"][:16]
        return f" ({finding.measured})" if earlier else ""

    def _ordered(self) -> Iterator[Finding]:
        order = {row: number for number, row in enumerate(BY_ID)}
        yield from sorted(self.findings, key=lambda each: order[each.row])


def minute(time: datetime) -> str:
    """As findings have it."""
    return time.astimezone(UTC).isoformat(timespec="minutes")


def _of_series(file: Path) -> Path:
    return file.with_stem(f"{file.stem}-series")


def _run(series: Mapping[str, Any]) -> tuple[str, str, str]:
    return series["run"], series["system"], series["load"]


def _date_of(page: str) -> str | None:
    """When it was written, as it says itself; None if it does not, or is not there."""
    with suppress(OSError):
        if found := re.search(r"Written by `[^`]*` on (\S+):", (_ROOT / page).read_text(encoding="utf-8")):
            return found[1]
    return None


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
