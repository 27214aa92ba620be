"""The figures of one run: for programs, on the terminal, as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import choices
from bench.choices import Choices
from bench.goals import CHOICES, Outcome, Rows
from bench.rounds import Row

CHART = "performance.svg"
_FIGURES = ("CPU µs/request", "least to most", "requests/s", "p50 ms", "p99 ms", "alone p50 ms", "memory MB")
_SIZES = tuple(choices.size(nodes) for nodes in choices.NODES)
_HEAD = """\
# Performance

What a request costs a gateway and a node of ours, beside plain peers, in one run on one machine. Written by
`{command}` on {date}: {cores} cores of {cpu}, Python {python}, {versions}.

![CPU per request]({chart})

- Only ratios within one run mean anything. Each figure is the median of {rounds} rounds, in which the systems take
  turns under h2load on the same machine; "least to most" is the range of CPU over the rounds.
- CPU is the user and system time, by `/proc`, of all processes of a server, over the requests. Memory is their resident
  memory at the end.
- {loads}. "Alone" is one request at a time.
- Every gateway is one worker with the same two nodes behind it. What it costs depends on them too: slow nodes wake it
  for each answer, fast ones let it take many at once.
- `proxy-grpcio` passes bytes over grpc.aio to the nodes in turn and does nothing else. `plain-envoy`, `nginx` and
  `haproxy` are those programs by themselves, set up as in `bench/peers.py`. `echo-grpcio` answers with what it was
  sent: the node without a gateway, and what one leg costs.
- `ours-tf-grpcio` is `dl-inference-core serve` with the SavedModels of `bench/saved_models.py`: two layers on 128
  features, and the means of a picture of 602 KB. `bare-call` calls their signatures one after
  another, on arrays that are there already, in a process without a server.
- `ours-…-care` is our gateway with round robin, all that looks after requests (health and its probes, retries), and a
  limit on requests in flight that is never reached; `ours-…-bare` is the same with one attempt, no probes and no limit.
  `ours-…-1-tasks` and `ours-…-10000-tasks` have so many routes, to the same two nodes; one is asked.
"""
_CHOICES_HEAD = """\
## Choosing a node

CPU µs of a choice and of taking note of its outcome, by the strategies with their defaults, in a loop without a server.
1.5 requests are in flight at each node.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that one run came to.

    Attributes:
        machine: where, when, how and with what it was measured.
        rows: the figures, by table, load and system.
        titles: of the tables.
        choices: what strategies take to choose, if that was measured.
        absent: how to get each system that is not installed.
    """

    machine: Mapping[str, Any]
    rows: Rows
    titles: Mapping[str, str]
    choices: Choices
    outcomes: list[Outcome]
    absent: Mapping[str, str]

    def values(self) -> dict[str, Any]:
        """What bench.json holds."""
        tables = {
            table: {
                load: {system: asdict(row) for system, row in by_system.items()} for load, by_system in by_load.items()
            }
            for table, by_load in self.rows.items()
        }
        choosing = {
            strategy: {size: asdict(choice) for size, choice in by_size.items()}
            for strategy, by_size in self.choices.items()
        }
        goals = [asdict(each.goal) | {"ratio": each.ratio, "met": each.met} for each in self.outcomes]
        return {"machine": dict(self.machine), **tables, CHOICES: choosing, "goals": goals, "absent": dict(self.absent)}

    def show(self, console: Console) -> None:
        for heading, by_system in self._tables():
            headings = ("\n".join(figure.rsplit(" ", 1)) for figure in _FIGURES)
            table = Table("system", *headings, title=heading, title_justify="left", box=SIMPLE_HEAD, padding=0)
            for name, row in by_system.items():
                table.add_row(name, *_cells(row))
            console.print(table)
        if self.choices:
            table = Table("strategy", *_SIZES, title="Choosing a node, CPU µs", title_justify="left", box=SIMPLE_HEAD)
            for strategy, cells in self._choices():
                table.add_row(strategy, *cells)
            console.print(table)
        for outcome in self.outcomes:
            console.print(str(outcome), style="" if outcome.met else "bold red", highlight=False)
        for line in self._absent():
            console.print(line, highlight=False)

    def page(self) -> str:
        """docs/performance.md; its chart is in the file `CHART` beside it."""
        versions = ", ".join(f"{name} {version}" for name, version in self.machine["versions"].items())
        lines = [_HEAD.format_map({**self.machine, "versions": versions, "chart": CHART})]
        for heading, by_system in self._tables():
            lines += [
                f"## {heading}\n",
                f"| system | {' | '.join(_FIGURES)} |",
                f"| --- |{' ---: |' * len(_FIGURES)}",
                *(f"| {name} | {' | '.join(_cells(row))} |" for name, row in by_system.items()),
                "",
            ]
        if self.choices:
            lines += [
                _CHOICES_HEAD,
                f"| strategy | {' | '.join(_SIZES)} |",
                f"| --- |{' ---: |' * len(_SIZES)}",
                *(f"| {strategy} | {' | '.join(cells)} |" for strategy, cells in self._choices()),
                "",
            ]
        lines += ["## Goals\n", *(f"- {outcome}" for outcome in self.outcomes)]
        lines += [f"- {line}" for line in self._absent()]
        return "\n".join(lines) + "\n"

    def _tables(self) -> Iterator[tuple[str, Mapping[str, Row]]]:
        for table, by_load in self.rows.items():
            for load, by_system in by_load.items():
                yield f"{self.titles[table]}: {load}", by_system

    def _choices(self) -> Iterator[tuple[str, list[str]]]:
        for strategy, by_size in self.choices.items():
            yield strategy, [f"{by_size[size].cpu_us_per_request:.2f}" for size in _SIZES]

    def _absent(self) -> list[str]:
        return [f"{name} is left out, as it is not installed: {how}" for name, how in self.absent.items()]


def _cells(row: Row) -> tuple[str, ...]:
    """As `_FIGURES` has them."""
    return (
        f"{row.cpu_us_per_request:.0f}",
        f"{row.cpu_us_least:.0f} to {row.cpu_us_most:.0f}",
        f"{row.requests_per_s:.0f}",
        f"{row.p50_ms:.1f}",
        f"{row.p99_ms:.1f}",
        f"{row.alone_p50_ms:.2f}",
        f"{row.memory_mb:.0f}",
    )
