"""`python -m bench.simulation`: every strategy in every scenario, as tables, compared with what it was."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.simulation import report
from bench.simulation.course import Figures, simulate
from bench.simulation.scenarios import BY_NAME
from dl_inference_core.plugins import Kind, Plugins

EXPECTED = Path(__file__).parent / "expected.json"
_WIDTH = 100
_PAGE = Path(__file__).parents[2] / "docs" / "simulation.md"


def strategies() -> tuple[str, ...]:
    """Every strategy that is installed."""
    return tuple(Plugins().classes(Kind.BALANCERS))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--scenario", "scenarios", multiple=True, type=click.Choice(tuple(BY_NAME)), help="Only this one.")
@click.option("--strategy", "names", multiple=True, type=click.Choice(strategies()), help="Only this one.")
@click.option("--docs", is_flag=True, help="Write docs/simulation.md and bench/simulation/expected.json.")
@click.option("--json", "as_json", is_flag=True, help="Print what goes into expected.json, not the tables.")
def main(scenarios: tuple[str, ...], names: tuple[str, ...], docs: bool, as_json: bool) -> None:
    """Simulate each strategy in each scenario, by default all.

    Without --docs, ends with status 1 if a figure differs from bench/simulation/expected.json.
    """
    if docs and (scenarios or names):
        raise click.BadParameter("it takes all scenarios and strategies", param_hint="--docs")
    with _silence():
        results = _simulated(scenarios or tuple(BY_NAME), names or strategies())
    values = report.values(results)
    if docs:
        EXPECTED.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        _PAGE.write_text(report.page(results), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(values, indent=1))
    else:
        report.show(results, Console(width=None if sys.stdout.isatty() else _WIDTH))
    if different := _different(values):
        Console(stderr=True).print(f"not as in {EXPECTED.name}: {'; '.join(different)}", style="bold red")
        sys.exit(1)


@contextmanager
def _silence() -> Iterator[None]:
    """What befalls nodes is meant to: nobody need be told."""
    logger = logging.getLogger("dl_inference_core")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _simulated(scenarios: tuple[str, ...], names: tuple[str, ...]) -> report.Results:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(scenarios) * len(names))
        results: dict[str, dict[str, Figures]] = {scenario: {} for scenario in scenarios}
        for scenario in scenarios:
            progress.update(bar, description=scenario)
            for strategy in names:
                results[scenario][strategy] = simulate(BY_NAME[scenario], strategy)
                progress.advance(bar)
        return results


def _different(values: dict[str, dict[str, Any]]) -> list[str]:
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return [
        f"{scenario}, {strategy}"
        for scenario, by_strategy in values.items()
        for strategy, figures in by_strategy.items()
        if expected.get(scenario, {}).get(strategy) != figures
    ]


if __name__ == "__main__":
    main()
