"""The figures of one run: for programs, and on the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.core.loads import MESSAGE_BYTES
from bench.core.measuring import AT_ONCE, IN_FLIGHT, Samples
from bench.core.setup import BALANCER, MAX_BATCH, NODES
from bench.goals import Goal, Outcome

UNIT = "unit"
TABLE = "core"
GATEWAY_MOST, NODE_MOST = 5.0, 8.0
"""The goals: what Python may cost, in units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """CPU µs per request: the median of the rounds, the least and the most."""

    cpu_us_per_request: float
    cpu_us_least: float
    cpu_us_most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: what a part takes, less what other parts take in the same round.

    Attributes:
        name: its key in the JSON.
        most: the goal, in units; None where there is none.
    """

    name: str
    title: str
    part: str
    less: tuple[str, ...] = ()
    most: float | None = None

    def cost(self, samples: Samples) -> Cost:
        rounds = zip(samples[self.part], *(samples[part] for part in self.less), strict=True)
        costs = [whole - sum(others) for whole, *others in rounds]
        return Cost(cpu_us_per_request=statistics.median(costs), cpu_us_least=min(costs), cpu_us_most=max(costs))


def _gateway(at_once: int) -> tuple[Row, ...]:
    passing = f"passing_{at_once}"
    title = f"gateway, {at_once} per call"
    return (
        Row(name=f"gateway_{at_once}", title=title, part=f"gateway_{at_once}", less=(passing,), most=GATEWAY_MOST),
        Row(name=f"hedging_{at_once}", title="… and hedging", part=f"hedging_{at_once}", less=(passing,)),
        Row(name=passing, title="… transport alone, taken off", part=passing),
    )


def _node(in_flight: int) -> tuple[Row, ...]:
    node, echoing, hopping, spread = (f"{name}_{in_flight}" for name in ("node", "echoing", "hopping", "spread"))
    title = f"node, {in_flight} in flight"
    return (
        Row(name=node, title=title, part=node, less=("codec", echoing), most=NODE_MOST),
        Row(name=f"{node}_in_all", title="… with codec and transport", part=node),
        Row(name=echoing, title="… transport alone, taken off", part=echoing),
        Row(name=hopping, title="… transport with a second thread", part=hopping),
        Row(name=spread, title="… on all cores", part=spread, less=("codec", echoing)),
    )


ROWS = (
    Row(name=UNIT, title="choice and outcome (the unit)", part=UNIT),
    *_gateway(1),
    *_gateway(AT_ONCE),
    Row(name="key", title="… reading the routing key", part="key"),
    Row(name="route_choice", title="… the route's choice and outcome", part="route_choice"),
    Row(name="metrics", title="… counting in the metrics", part="metrics"),
    *_node(1),
    *_node(IN_FLIGHT),
    Row(name="codec", title="… codec alone, taken off", part="codec"),
)

_NOTES = f"""\
CPU µs per request of {MESSAGE_BYTES} B (Open Inference): the median of the rounds, in which the parts take turns.
Unit: one choice of {BALANCER} among {NODES} nodes, and its outcome.
Gateway: begin_all with 1 or {AT_ONCE} requests, then the end of their attempts, on one thread; {NODES} nodes. Metrics,
deadlines, health, retries, and the limits on requests in flight (process and nodes) are on. Choice and metrics are
parts of it, called alone. The transport reads the routing key, as a native one does. With a transport that leaves that
to the core, reading the key comes on top.
Node: begin_all, queue, model thread, answers; CPU of the whole process. The model returns its inputs. The codec, called
alone on the same requests, is taken off. A batch takes {MAX_BATCH} rows at most;
with {IN_FLIGHT} requests in flight it had {{batch_rows:.1f}} on average.
The node's threads share one core, so that what is measured is what Python does. On all cores the interpreter's lock
wakes one core from the other, and requests move from cache to cache; how much that costs differs from run to run.
The transport of the benchmark is in memory. A service that does nothing measures it, and it is taken off; with a second
thread that does nothing but answer, it shows the least that a model thread costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one run came to.

    Attributes:
        machine: where, when and how it was measured.
        samples: of all parts.
        batch_rows: the mean rows of a batch of the node.
    """

    machine: Mapping[str, Any]
    samples: Samples
    batch_rows: float

    def costs(self) -> dict[str, Cost]:
        """By row."""
        return {row.name: row.cost(self.samples) for row in ROWS}

    def outcomes(self) -> list[Outcome]:
        """Of every row that has a goal."""
        costs = self.costs()
        goals = [
            Goal(table=TABLE, load=row.title, system=row.name, than=(UNIT,), most=row.most) for row in ROWS if row.most
        ]
        return [outcome for goal in goals if (outcome := goal.outcome(costs)) is not None]

    def values(self) -> dict[str, Any]:
        """For JSON."""
        costs = self.costs()
        unit = costs[UNIT].cpu_us_per_request
        return {
            "machine": dict(self.machine),
            TABLE: {name: asdict(cost) | {"units": cost.cpu_us_per_request / unit} for name, cost in costs.items()},
            "batch_rows": self.batch_rows,
            "goals": [each.values() for each in self.outcomes()],
        }

    def show(self, console: Console) -> None:
        costs = self.costs()
        met = {outcome.goal.system: outcome.met for outcome in self.outcomes()}
        unit = costs[UNIT].cpu_us_per_request
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("part", no_wrap=True)
        for heading in ("CPU µs", "least to most", "units"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("goal", no_wrap=True)
        for row in ROWS:
            cost = costs[row.name]
            goal = f"≤ {row.most:g}: {'met' if met[row.name] else 'NOT met'}" if row.most else ""
            table.add_row(
                row.title,
                _format(cost.cpu_us_per_request),
                f"{_format(cost.cpu_us_least)} to {_format(cost.cpu_us_most)}",
                f"{cost.cpu_us_per_request / unit:.1f}",
                goal,
                style="bold red" if goal and not met[row.name] else "",
            )
        console.print(table)
        console.print(_NOTES.format(batch_rows=self.batch_rows), highlight=False, soft_wrap=True)


def _format(us: float) -> str:
    return f"{us:.1f}" if us >= 10 else f"{us:.2f}"  # three digits: rounds differ by a few per cent
