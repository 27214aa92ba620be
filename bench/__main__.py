"""`python -m bench`: what is installed is measured, printed as tables, and written to bench/out/bench.json."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import choices, goals, machine, outputs, replay, rounds, stages, systems
from bench.choices import Choices
from bench.core.command import core
from bench.figures import Figures
from bench.load import LoadError
from bench.report import CHART, Report
from bench.systems import Table

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
_QUICK_S, _QUICK_SHARE = 0.1, 0.05
"""Seconds of a load, and the share of choices and of requests of which stages are measured, to see that it works."""
_NAMES = (*systems.NAMES, goals.CHOICES, stages.NAME)


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    names = tuple(value.split(",")) if value else _NAMES
    if unknown := set(names) - set(_NAMES):
        raise click.BadParameter(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(_NAMES)}")
    return names


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", "turns", default=3, show_default=True, type=click.IntRange(1), help="Turns of each system.")
@click.option(
    "--seconds", default=1.5, show_default=True, type=click.FloatRange(0.1), help="Of load, at each turn of a system."
)
@click.option(
    "--quick", is_flag=True, help="One short round, to see that it works; it means little, and bench.json stays."
)
@click.option(
    "--systems",
    "names",
    callback=_names,
    metavar="A,B,…",
    help=f"Only these, of {', '.join(_NAMES)}.  [default: all]",
)
@click.option("--docs", is_flag=True, help=f"Write docs/performance.md and docs/{CHART} too.")
@click.option("--json", "as_json", is_flag=True, help="Print what goes into bench/out/bench.json, not the tables.")
@click.pass_context
def main(
    context: click.Context,
    turns: int,
    seconds: float,
    quick: bool,
    names: tuple[str, ...],
    docs: bool,
    as_json: bool,
) -> None:
    """Measure what a request costs gateways and nodes, ours and plain peers.

    All run on this machine, in turns, under the load generator on the same machine, which cargo builds. Only ratios
    within one run mean anything. Systems that are not installed are left out, and it is said how to get them.

    \b
    python -m bench --quick
    python -m bench --systems ours-grpcio,proxy-grpcio --rounds 3
    python -m bench core
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no server is left behind
    console = Console(stderr=True)
    tables = systems.installed(names)
    facts = machine.facts()
    turns, seconds = (1, _QUICK_S) if quick else (turns, seconds)
    share = _QUICK_SHARE if quick else 1.0
    try:
        if tables:
            replay.binary()
        chosen = _chosen(share, console) if goals.CHOICES in names else {}
        staged = stages.measure(share) if stages.NAME in names and stages.installed() else None
        rows = _measured(tables, turns, seconds, console)
    except LoadError as error:
        console.print(f"error: {error}", highlight=False)
        sys.exit(2)
    report = Report(
        machine=_machine(facts, tables, turns, seconds),
        rows=rows,
        titles={table.name: table.title for table in tables},
        choices=chosen,
        stages=staged,
        outcomes=goals.outcomes(rows, chosen),
        absent=systems.absent([name for name in names if name in systems.NAMES]),
    )
    if not quick:
        outputs.put_figures(report.values(), of_model_servers=False)
    _show(report, docs=docs, as_json=as_json)


def _show(report: Report, *, docs: bool, as_json: bool) -> None:
    if docs:
        from bench import chart

        outputs.put_page(report.page(), of_model_servers=False)
        chart.svg(report.rows, report.titles, outputs.DOCS / CHART)
    if as_json:
        click.echo(json.dumps(report.values(), indent=2))
    else:
        report.show(Console())


def _refuse_options(context: click.Context) -> None:
    """Raises:
    UsageError: there are options before the command, where they would have no effect.
    """
    for name in context.params:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"options of {context.invoked_subcommand} stand after it")


def _chosen(share: float, console: Console) -> Choices:
    with Progress(*_COLUMNS, console=console) as progress:
        bar = progress.add_task("Choosing a node", total=len(choices.strategies()))
        return choices.measure(share, partial(progress.advance, bar))


def _measured(tables: Sequence[Table], turns: int, seconds: float, console: Console) -> goals.Rows:
    with Progress(*_COLUMNS, console=console) as progress:
        bars = {
            table.name: progress.add_task(table.title, total=turns * len(table.sizes) * len(table.systems))
            for table in tables
        }
        rows: dict[str, dict[str, dict[str, Figures]]] = {}
        for table in tables:
            advance = partial(progress.advance, bars[table.name])
            with table.running() as running:
                rows[table.name] = {
                    size.name: rounds.measure(running.servers, size, turns, seconds, advance, running.ca)
                    for size in table.sizes
                }
        return rows


def _machine(facts: dict[str, Any], tables: Sequence[Table], turns: int, seconds: float) -> dict[str, Any]:
    software = {each.name: each for table in tables for system in table.systems for each in system.software}
    return {
        **facts,
        "versions": {name: each.version() for name, each in software.items()} | {"uvloop": metadata.version("uvloop")},
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "rounds": turns,
        "seconds": seconds,
    }


main.add_command(core)

if __name__ == "__main__":
    main()
