"""What a soak came to: for programs, on the terminal, as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.soak import verdict
from bench.soak.course import Soak
from bench.soak.traffic import KINDS
from bench.soak.verdict import Finding

CHART = "soak.svg"
_HEAD = """\
# Soak

A gateway on {transport} in front of {nodes}, for {minutes:g} minutes of {rate:g} requests/s of all kinds, while its
routes were written anew {reloads} times, and {restarts} times a node was ended (told to and killed, in turn) and
started again. Written by `{command}` on {date}: {cores} cores of {cpu}, Python {python}, {versions}.

![Memory, descriptors, threads, tasks and requests over time]({chart})

Shaded: the gateway at rest, within the warm-up of {warm_up_s:.0f} s and at the end.

## Rules

{rules}
## Verdict

{findings}

## Requests

| kind | sent | how they ended | may end |
| --- | ---: | --- | --- |
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that one soak came to.

    Attributes:
        machine: where, when and with what.
        settings: what was asked for, and what was done.
    """

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    soak: Soak
    findings: list[Finding]

    @property
    def met(self) -> bool:
        return all(finding.met for finding in self.findings)

    def values(self) -> dict[str, Any]:
        """What soak.json holds."""
        return {
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "rules": verdict.RULES,
            "findings": [asdict(finding) for finding in self.findings],
            "requests": {
                kind.name: {
                    "sent": self.soak.traffic.sent[kind.name],
                    "ended": dict(self.soak.traffic.ended[kind.name]),
                    "expected": sorted(kind.expected),
                }
                for kind in KINDS
            },
            "failures": [asdict(failure) for failure in self.soak.traffic.failures],
            "rests": [asdict(rest) for rest in self.soak.rests],
            "samples": [asdict(sample) for sample in self.soak.samples],
        }

    def page(self) -> str:
        """docs/soak.md; its chart is in the file `CHART` beside it."""
        versions = ", ".join(f"{name} {version}" for name, version in self.machine["versions"].items())
        head = _HEAD.format_map(
            {
                **self.machine,
                **self.settings,
                "versions": versions,
                "chart": CHART,
                "rules": verdict.RULES,
                "findings": "\n".join(f"- {finding}" for finding in self.findings),
            }
        )
        lines = [f"| {' | '.join(row)} |" for row in _rows(self.soak)]
        return head + "\n".join(lines) + "\n"


def view(soak: Soak) -> Group:
    """How it stands, on the terminal."""
    table = Table("kind", "sent", "how they ended", "may end", box=SIMPLE_HEAD, padding=0)
    for row in _rows(soak):
        table.add_row(*row)
    latest = soak.samples[-1]
    now = (
        f"{latest.phase}: {latest.memory_mb:.0f} MB, {latest.descriptors} descriptors, {latest.threads} threads, "
        f"{latest.tasks} tasks; {latest.in_flight} in flight, {soak.reloads} reloads, {soak.restarts} restarts"
    )
    wrong = [
        Text(f"{failure.at_s:.1f} s: {failure.kind} ended {failure.outcome}: {failure.detail}", style="bold red")
        for failure in soak.traffic.failures[:3]
    ]
    return Group(table, Text(now), *wrong)


def _rows(soak: Soak) -> Iterator[tuple[str, str, str, str]]:
    for kind in KINDS:
        ended = sorted(soak.traffic.ended[kind.name].items(), key=lambda item: -item[1])
        yield (
            kind.name,
            str(soak.traffic.sent[kind.name]),
            ", ".join(f"{outcome} {count}" for outcome, count in ended),
            ", ".join(sorted(kind.expected)),
        )
