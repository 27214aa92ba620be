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

from bench import choices, goals, machine, outputs, rounds, systems
from bench.choices import Choices
from bench.core.command import core
from bench.load import LoadError, require_h2load
from bench.report import CHART, Report
from bench.systems import Table

_NAMES = (*systems.NAMES, goals.CHOICES)


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    names = tuple(value.split(",")) if value else _NAMES
    if unknown := set(names) - set(_NAMES):
        raise click.BadParameter(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(_NAMES)}")
    return names


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", "turns", default=5, show_default=True, type=click.IntRange(1), help="Turns of each system.")
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
def main(context: click.Context, turns: int, quick: bool, names: tuple[str, ...], docs: bool, as_json: bool) -> None:
    """Measure what a request costs gateways and nodes, ours and plain peers.

    All run on this machine, in turns, under h2load on the same machine. Only ratios within one run mean anything.
    Systems that are not installed are left out, and it is said how to get them.

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
    absent = systems.absent(tuple(name for name in names if name != goals.CHOICES))
    turns = 1 if quick else turns
    try:
        if tables:
            require_h2load()
        rows, chosen = _measured(tables, goals.CHOICES in names, turns, 0.05 if quick else 1, console)
    except LoadError as error:
        console.print(f"error: {error}", highlight=False)
        sys.exit(2)
    report = Report(
        machine=_machine(tables, turns),
        rows=rows,
        titles={table.name: table.title for table in tables},
        choices=chosen,
        outcomes=goals.outcomes(rows, chosen),
        absent=absent,
    )
    values = json.dumps(report.values(), indent=2)
    if not quick:
        outputs.put_figures(report.values(), of_model_servers=False)
    if docs:
        from bench import chart

        outputs.put_page(report.page(), of_model_servers=False)
        chart.svg(rows, report.titles, outputs.DOCS / CHART)
    if as_json:
        click.echo(values)
    else:
        report.show(Console())


def _refuse_options(context: click.Context) -> None:
    """Raises:
    UsageError: there are options before the command, where they would have no effect.
    """
    for name in context.params:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"options of {context.invoked_subcommand} stand after it")


def _measured(
    tables: Sequence[Table], choosing: bool, turns: int, share: float, console: Console
) -> tuple[goals.Rows, Choices]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bars = {
            table.name: progress.add_task(table.title, total=turns * len(table.sizes) * len(table.systems))
            for table in tables
        }
        chosen: Choices = {}
        if choosing:
            bar = progress.add_task("Choosing a node", total=len(choices.strategies()))
            chosen = choices.measure(share, partial(progress.advance, bar))
        rows: dict[str, dict[str, dict[str, rounds.Row]]] = {}
        for table in tables:
            with table.running() as running:
                rows[table.name] = {
                    size.name if table.node else size.node_name: rounds.measure(
                        running, size, turns, share, partial(progress.advance, bars[table.name])
                    )
                    for size in table.sizes
                }
        return rows, chosen


def _machine(tables: Sequence[Table], turns: int) -> dict[str, Any]:
    measured = {system.software.name: system.software.version() for table in tables for system in table.systems}
    return {
        **machine.facts(),
        "versions": measured | {"uvloop": metadata.version("uvloop"), "h2load": machine.h2load_version()},
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "rounds": turns,
        "loads": "; ".join(
            dict.fromkeys(
                f"{size.name}: {size.load.clients} connections, {size.load.streams} requests under way on each"
                for size in systems.EVERY_SIZE
            )
        ),
    }


main.add_command(core)

if __name__ == "__main__":
    main()
