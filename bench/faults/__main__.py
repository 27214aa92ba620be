"""`python -m bench.faults`: faults are done to nodes, clients and gateways, and what came of it is a scorecard."""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.faults import gateways, namespaces, plan
from bench.faults.experiments import Experiment
from bench.faults.goals import ROWS, Finding
from bench.faults.report import CHART, Report, minute

_OUT = Path(__file__).parents[1] / "out" / "faults.json"
_PART = _OUT.with_stem("faults-part")
_DOCS = Path(__file__).parents[2] / "docs"
_VERSIONS = ("dl-inference-core", "dl-inference-balancers", "grpcio", "uvloop")


def _rows(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    names = tuple(value.split(",")) if value else ()
    known = [row.id for row in ROWS]
    if unknown := set(names) - set(known):
        raise click.BadParameter(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return names


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--short", is_flag=True, help="Two minutes of it, for CI: what no run may miss. faults.json stays.")
@click.option("--only", callback=_rows, metavar="ID,ID,…", help="Only runs that these rows need; `--list` has them.")
@click.option(
    "--transport",
    "transports",
    type=click.Choice(gateways.transports()),
    multiple=True,
    help="What our gateway serves on; may be repeated. Every strategy runs on the first.  [default: all]",
)
@click.option("--system", "systems", multiple=True, metavar="TEXT", help="Only systems whose names have TEXT in them.")
@click.option("--list", "listing", is_flag=True, help="Print the rows and the runs, with the seconds that they take.")
@click.option(
    "--docs",
    is_flag=True,
    help=f"Write docs/reliability.md and docs/{CHART} too; of a part, as by --only, put what it came to into what the "
    "file of figures has.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what goes into bench/out/faults.json, not the table.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Where to write the figures.  [default: bench/out/faults.json; without --docs, of a part: faults-part.json]",
)
def main(
    short: bool,
    only: tuple[str, ...],
    transports: tuple[str, ...],
    systems: tuple[str, ...],
    listing: bool,
    docs: bool,
    as_json: bool,
    out: Path | None,
) -> None:
    """Do faults to a gateway's nodes, clients and files while clients send by the clock, and say what came of it.

    A row of the scorecard is a fault, and goals for what clients and nodes saw of it. Nodes count attempts, clients
    count failures; the gateway is not asked, but for attempts at nodes that cannot count. Rows that take network
    namespaces are left out where there is no root. What was not measured is never met.

    Exit status 1 says that our gateway does not meet a goal; with --short, one of those that no run may miss.

    \b
    python -m bench.faults --list
    python -m bench.faults --only F1,F2 --transport grpcio
    python -m bench.faults --only F5 --system least_request
    python -m bench.faults --docs                 the whole of it, most of an hour
    python -m bench.faults --docs --only P4,R1    these rows anew; the others stay, with their dates
    """
    if short and docs:
        raise click.BadParameter("a short run is not what the page is about", param_hint="--docs")
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background has the first of them ignored
        signal.signal(number, signal.default_int_handler)
    chosen = transports or gateways.transports()
    findings: list[Finding] = []
    runs = [
        each
        for each in (plan.short if short else plan.full)(chosen, findings)
        if (not only or set(only) & set(each.rows))
        and (not systems or any(text in each.system.title for text in systems))
    ]
    if listing:
        _list(runs)
        return
    if not runs:
        raise click.UsageError("there is no such run; `--list` has those that there are")
    part = bool(only or transports or systems)
    out = out or (_PART if part and not docs else _OUT)
    earlier = _earlier(out) if part and docs else None
    begun = datetime.now(UTC)
    console = Console(stderr=True)
    series: list[dict[str, Any]] = []
    try:
        _measure(runs, findings, series, console)
    except KeyboardInterrupt:
        console.print("interrupted: what was not measured is not met", style="bold red")
    report = Report(machine=_machine(begun, chosen), findings=findings, series=series)
    whole = report.over(earlier) if earlier else report
    if not short:
        whole.write(out)
    if docs:
        from bench.faults import chart

        (_DOCS / "reliability.md").write_text(whole.page(), encoding="utf-8")
        chart.svg(whole.series, _DOCS / CHART)
    if as_json:
        click.echo(whole.text())
    else:
        report.show(Console())
    sys.exit(0 if all(each.hard_met if short else each.met for each in findings if each.ours) else 1)


def _earlier(file: Path) -> Report | None:
    """What is there to be put together with a part; None if there is nothing.

    Raises:
        click.UsageError: there is something else.
    """
    if not file.exists():
        return None
    try:
        return Report.read(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.UsageError(f"{file} cannot be added to: {type(error).__name__}: {error}") from None


def _measure(
    runs: Sequence[Experiment], findings: list[Finding], series: list[dict[str, Any]], console: Console
) -> None:
    """All runs, one after the other; a run that fails is said to be not measured, and so is what is interrupted."""
    without_root = namespaces.missing() if any(run.isolated for run in runs) else ""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    )
    left = list(runs)
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=sum(run.seconds for run in runs))
            while left:
                run = left[0]
                progress.update(bar, description=f"{run.name}: {run.system.title}, {run.load}")
                found = _measured(run, without_root if run.isolated else "", series)
                left.pop(0)
                findings += found
                for each in found:
                    if each.why:
                        console.print(f"{each.row}, {each.system}: not measured: {each.why}", style="bold red")
                progress.advance(bar, run.seconds)
    finally:
        for run in left:
            findings += run.absent("interrupted")


def _measured(run: Experiment, missing: str, series: list[dict[str, Any]]) -> list[Finding]:
    begun = time.monotonic()
    try:
        if missing:
            raise RuntimeError(missing)
        found = run.run()
    except Exception as error:  # whatever went wrong, the other rows are worth having
        return run.absent(f"after {time.monotonic() - begun:.0f} s: {type(error).__name__}: {error}")
    series += found.series
    now = minute(datetime.now(UTC))
    return [each if each.why else replace(each, measured=now) for each in found.of]


def _list(runs: Sequence[Experiment]) -> None:
    for row in ROWS:
        what = "; ".join(filter(None, (row.goal, *row.tests, row.page)))
        click.echo(f"{row.id:<11}{row.fault}: {what}")
    click.echo()
    for run in runs:
        click.echo(f"{run.seconds:4.0f} s  {run.name:<30} {run.load:<12} {run.system.title}")
    click.echo(f"{sum(run.seconds for run in runs) / 60:.0f} minutes")


def _machine(begun: datetime, transports: Sequence[str]) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": begun.isoformat(timespec="seconds"),
        "minutes": round((datetime.now(UTC) - begun).total_seconds() / 60),
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _VERSIONS},
        "command": " ".join(["python -m bench.faults", *sys.argv[1:]]),
    }


if __name__ == "__main__":
    main()
