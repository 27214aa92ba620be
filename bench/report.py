"""The figures of one run: for programs, on the terminal, as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import choices, goals, machine, stages
from bench.choices import Choices
from bench.figures import COLUMNS
from bench.goals import CHOICES, Outcome, Rows
from bench.stages import Stages

CHART = "performance.svg"
_SIZES = tuple(choices.size(nodes) for nodes in choices.NODES)
_HEAD = """\
# Performance

What a request costs a gateway and a node of ours, beside plain peers, in one run on one machine. Written by
`{command}` on {date}: {cores} cores of {cpu}, Python {python}, {versions}. {conditions}

![CPU per request]({chart})

- Only ratios within one run mean anything. Each figure is the median of {rounds} rounds of {seconds:g} s, in which the
  systems take turns; "least to most" is the range over the rounds, of which none is left out. The ratio of a goal is
  that of the medians, its range that of the ratios of each round.
- The load is `bench/load_generator`'s, on the same cores: 64 different requests, ids and values, of one row each, in
  turn; each answer is followed by the next request. It runs on one thread, over one connection for each request in
  flight, up to 16. Every status is read. Every answer of a gateway is compared byte by byte with the request that
  it echoes. A node with a model must answer all requests together as it answers each alone, before it is measured.
- CPU is the user and system time of all processes of a server, over the requests. Memory is their resident memory at
  the end; pages that two of the processes share count twice.
- 600B, 4KB and 600KB are the bytes of a request, and of its answer; @ stands before the requests in flight.
- Every gateway is one worker, of one thread where nothing else is said, with the same two nodes behind it: `echo`, a
  small server in Rust that answers with what it was sent, so that nodes take as little of the cores as can be. Its own
  row is what one leg costs. What a gateway costs depends on its nodes too: slow ones wake it for each answer, fast ones
  let it take many at once.
- `proxy-grpcio` passes bytes over grpc.aio to the nodes in turn and does nothing else. `plain-envoy`, `nginx` and
  `haproxy` are those programs by themselves, set up as in `bench/peers.py`. Ours are `dl-inference-core serve` with the
  transport in their name, with metrics, deadlines, health, retries and limits on.
- `ours-tf-…` is a node with the SavedModels of `bench/saved_models.py`: two layers on 128 features, and the means of a
  picture of 602 KB. `bare-call` calls their signatures one after another, on arrays that are there already, in a
  process without a server.
- `…-care` is our gateway with round robin, all that looks after requests (health and its probes, retries), and a limit
  on requests in flight that is never reached; `…-bare` is the same with one attempt, no probes and no limit.
  `…-tasks` have so many routes, to the same two nodes; one is asked. `…-nodes` have one route, with a strategy, to so
  many nodes, each with a connection of its own; as all of these run at one time, they probe idle nodes once an hour.
"""
_CHOOSING, _STAGES = "Choosing a node", "Where the time of one request to a node goes"
_NOTES = {
    _CHOOSING: """\
CPU µs of a choice and of taking note of its outcome, by the strategies with their defaults, in a loop without a server.
1.5 requests are in flight at each node.
""",
    _STAGES: stages.NOTE,
    "Goals": """\
The *required* ratios are those without which a transport is not done; the others are aims. Where the best of several is
meant, it stands after the stroke.
""",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that one run came to.

    Attributes:
        machine: where, when, how and with what it was measured.
        rows: the figures, by table, load and system.
        titles: of the tables.
        choices: what strategies take to choose, if that was measured.
        stages: where the time of a request to a node goes, if that was measured.
        absent: how to get each system that is not installed.
    """

    machine: Mapping[str, Any]
    rows: Rows
    titles: Mapping[str, str]
    choices: Choices
    stages: Stages | None
    outcomes: list[Outcome]
    absent: Mapping[str, str]

    def values(self) -> dict[str, Any]:
        """What bench.json holds."""
        tables = {
            table: {
                load: {system: row.values() for system, row in by_system.items()} for load, by_system in by_load.items()
            }
            for table, by_load in self.rows.items()
        }
        choosing = {
            strategy: {size: asdict(choice) for size, choice in by_size.items()}
            for strategy, by_size in self.choices.items()
        }
        rest = {
            stages.NAME: self.stages.values() if self.stages else {},
            "goals": [each.values() for each in self.outcomes],
            "absent": dict(self.absent),
        }
        return {"machine": dict(self.machine), **tables, CHOICES: choosing, **rest}

    def show(self, console: Console) -> None:
        for heading, headings, lines in self._tables():
            table = Table(*headings, title=heading, title_justify="left", box=SIMPLE_HEAD, padding=0)
            for line in lines:
                table.add_row(*line)
            console.print(table)
        for line in self._absent():
            console.print(line, highlight=False)

    def page(self) -> str:
        """docs/performance.md; its chart is in the file `CHART` beside it."""
        versions = ", ".join(f"{name} {version}" for name, version in self.machine["versions"].items())
        said = {"versions": versions, "chart": CHART, "conditions": machine.conditions(self.machine)}
        lines = [_HEAD.format_map({**self.machine, **said}) + "".join(f"- {line}\n" for line in self._absent())]
        for heading, headings, cells in self._tables():
            lines += [
                f"## {heading}\n",
                *([_NOTES[heading]] if heading in _NOTES else []),
                f"| {' | '.join(headings)} |",
                f"| --- |{' ---: |' * (len(headings) - 1)}",
                *(f"| {' | '.join(line)} |" for line in cells),
                "",
            ]
        return "\n".join(lines).rstrip("\n") + "\n"

    def _tables(self) -> Iterator[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
        """Each with its heading, the headings of its columns, and its lines."""
        if self.outcomes:
            yield "Goals", goals.COLUMNS, [outcome.cells() for outcome in self.outcomes]
        if self.stages:
            yield _STAGES, stages.COLUMNS, self.stages.lines()
        for table, by_load in self.rows.items():
            for load, by_system in by_load.items():
                lines = [(name, *row.cells()) for name, row in by_system.items()]
                yield f"{self.titles[table]}: {load}", ("system", *COLUMNS), lines
        if self.choices:
            yield _CHOOSING, ("strategy", *_SIZES), [*self._choices()]

    def _choices(self) -> Iterator[Sequence[str]]:
        for strategy, by_size in self.choices.items():
            yield strategy, *(f"{by_size[size].cpu_us_per_request:.2f}" for size in _SIZES)

    def _absent(self) -> Iterator[str]:
        """A line for each thing that is not installed."""
        lacking: dict[str, list[str]] = {}
        for name, how in self.absent.items():
            lacking.setdefault(how, []).append(name)
        for how, names in lacking.items():
            yield f"Left out, as it is not installed ({how}): {', '.join(names)}"
