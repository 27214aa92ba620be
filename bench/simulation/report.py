"""What simulations came to: for programs, on the terminal, as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.simulation.course import ATTEMPT_MS, BACK_S, SETTLED_S, Figures
from bench.simulation.scenarios import BY_NAME, CAPACITY, CLIENT_S, NORMAL, OPTIONS, Scenario

Results = Mapping[str, Mapping[str, Figures]]
"""By scenario and strategy."""

_FIGURES = ("requests", "failed %", "attempts/request", "share", "share after", "p50 ms", "p99 ms", "left out")
_HEAD = """\
# Simulation

What each strategy does, under a virtual clock: the same figures each time, on any machine. Written by
`python -m bench.simulation --docs`, which takes half a minute. `tests/test_simulation.py` compares a part of it; a
change of these figures is a change of what the gateway does.

- Real are the strategies, the route that asks them (`dl_inference_core/gateway/forwarding.py`), its retries, admission
  and health with its probes, and the reports of load that nodes send. Not real are the network, which takes no time,
  the nodes and the clock.
- A node has room for {at_once} requests at once, others wait; one takes {mean:g} ms on average, {capacity:g} a second.
  Where a scenario says otherwise, it says so. Clients send at random times with a fixed seed, whether answers come or
  not, and wait for {client:g} s; an attempt may take {attempt} ms. All else is the default{options}.
- A scenario has three parts: as it should be, the fault of the first node, as it should be again.
- `share` is the part that the first node had of all attempts, over a fair part by weights, from {settled:g} s after the
  fault began until it ended; `share after` the same from {back:g} s after it ended. Where nothing befalls a node, it is
  that of the node which had most.
- `p50` and `p99` are of those that began during the fault and were answered. `left out` is how often a node was left
  out as unwell; after it, if there are any, how often one was to which nothing had happened.

"""


def values(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """What expected.json holds."""
    return {
        scenario: {strategy: figures.values() for strategy, figures in by_strategy.items()}
        for scenario, by_strategy in results.items()
    }


def show(results: Results, console: Console) -> None:
    """As tables."""
    for scenario, by_strategy in results.items():
        table = Table(
            "strategy", *_FIGURES, title=scenario, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for strategy, figures in by_strategy.items():
            table.add_row(strategy, *_cells(figures))
        console.print(table)


def page(results: Results) -> str:
    """docs/simulation.md."""
    options = ", and ".join(
        f"`{name} = {value:g}` of `{strategy}`" for strategy, each in OPTIONS.items() for name, value in each.items()
    )
    lines = [
        _HEAD.format(
            at_once=NORMAL.at_once,
            mean=NORMAL.mean_s * 1000,
            capacity=CAPACITY,
            client=CLIENT_S,
            attempt=ATTEMPT_MS,
            options=f", but for\n  {options}",
            settled=SETTLED_S,
            back=BACK_S,
        ).rstrip("\n")
    ]
    for name, by_strategy in results.items():
        lines += [
            "",
            f"## {name[0].upper()}{name[1:]}",
            "",
            f"{'; '.join(_about(BY_NAME[name]))}.",
            "",
            f"| strategy | {' | '.join(_FIGURES)} |",
            f"| --- |{' ---: |' * len(_FIGURES)}",
            *(f"| {strategy} | {' | '.join(_cells(figures))} |" for strategy, figures in by_strategy.items()),
        ]
    return "\n".join(lines) + "\n"


def _about(scenario: Scenario) -> Iterator[str]:
    yield f"{scenario.rate:g} requests a second to {len(scenario.weights)} nodes"
    if scenario.by_weight:
        yield "they have room in proportion to their weights"
    if scenario.behaviour != NORMAL:
        yield f"room for {scenario.behaviour.at_once} at once, {scenario.behaviour.mean_s * 1000:g} ms each"
    if scenario.deadline_s != CLIENT_S:
        yield f"clients wait for {scenario.deadline_s:g} s"
    if scenario.route:
        yield ", ".join(f"`{key} = {value}`" for key, value in scenario.route.items())
    yield f"the parts take {scenario.warm_s:g}, {scenario.fault_s:g} and {scenario.after_s:g} s"


def _cells(figures: Figures) -> tuple[str, ...]:
    """As `_FIGURES` has them."""
    return (
        str(figures.requests),
        f"{100 * figures.failed / figures.requests:.3g}",
        f"{figures.attempts:.3f}",
        f"{figures.share:.2f}",
        "" if figures.share_after is None else f"{figures.share_after:.2f}",
        f"{figures.p50_ms:.1f}",
        f"{figures.p99_ms:.1f}",
        str(figures.left_out) + (f" ({figures.others_left_out})" if figures.others_left_out else ""),
    )
