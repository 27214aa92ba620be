"""`python -m bench.model_servers`: the same models in ours and in other model servers, side by side."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Collection
from importlib import metadata

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import machine, outputs, replay
from bench.load import LoadError, require_h2load
from bench.model_servers import measuring
from bench.model_servers.environments import FOLDER, NotInstalled
from bench.model_servers.measuring import Effort, Measured
from bench.model_servers.models import MODELS
from bench.model_servers.report import CHART, Report
from bench.model_servers.systems import EVERY, System

_SYSTEMS = {system.name: system for system in EVERY}


def _names(known: Collection[str]) -> Callable[[click.Context, click.Parameter, str | None], tuple[str, ...]]:
    def read(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
        names = tuple(value.split(",")) if value else tuple(known)
        if unknown := set(names) - set(known):
            raise click.BadParameter(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return names

    return read


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--only",
    callback=_names(_SYSTEMS),
    metavar="A,B,…",
    help=f"Only these systems, of {', '.join(_SYSTEMS)}.  [default: all]",
)
@click.option(
    "--models",
    callback=_names(MODELS),
    metavar="A,B,…",
    help=f"Only these models, of {', '.join(MODELS)}.  [default: all]",
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Turns of each system.")
@click.option(
    "--seconds", default=1.2, show_default=True, type=click.FloatRange(0.1), help="Of load, at each turn of a system."
)
@click.option(
    "--trial",
    "trial_s",
    default=0.6,
    show_default=True,
    type=click.FloatRange(0.1),
    help="Seconds of load by which each setting is tried, at each number in flight.",
)
@click.option("--docs", is_flag=True, help=f"Write the section in docs/performance.md, and docs/{CHART}, too.")
@click.option("--json", "as_json", is_flag=True, help="Print what goes into bench/out/bench.json, not the tables.")
def main(
    only: tuple[str, ...],
    models: tuple[str, ...],
    rounds: int,
    seconds: float,
    trial_s: float,
    docs: bool,
    as_json: bool,
) -> None:
    """Serve the same models with ours and with other model servers, and measure what requests cost.

    Peers are installed first, each in an environment of its own below bench/out/peers; one that cannot be had here is
    left out. All run on this machine, in turns, under the load generator on the same machine, which cargo builds;
    those that speak HTTP/1.1 under h2load. Only ratios within one run mean anything.

    \b
    python -m bench.model_servers --docs
    python -m bench.model_servers --only ours-grpcio,triton --models mmoe --rounds 1 --seconds 1
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no server is left behind
    console = Console(stderr=True)
    facts = machine.facts()
    try:
        replay.binary()
        made_of, absent = installed([_SYSTEMS[name] for name in only], console)
        chosen = [_SYSTEMS[name] for name in only if name not in absent]
        measured = _measured(models, chosen, Effort(rounds=rounds, seconds=seconds, trial_s=trial_s), console)
    except LoadError as error:
        console.print(f"error: {error}", highlight=False)
        sys.exit(2)
    if not measured:
        sys.exit(128 + signal.SIGINT)
    report = Report(
        machine={
            **facts,
            "h2load": machine.h2load_version(),
            "command": " ".join(["python -m bench.model_servers", *sys.argv[1:]]),
            "rounds": rounds,
            "seconds": seconds,
        },
        made_of=made_of,
        measured=measured,
        absent=absent,
    )
    outputs.put_figures(report.values(), of_model_servers=True)
    _show(report, docs=docs, as_json=as_json)


def _show(report: Report, *, docs: bool, as_json: bool) -> None:
    if docs:
        from bench.model_servers import chart

        outputs.put_page(report.section(), of_model_servers=True)
        chart.svg(report.measured, outputs.DOCS / CHART)
    if as_json:
        click.echo(json.dumps(report.values(), indent=2))
    else:
        report.show(Console())


def installed(chosen: Collection[System], console: Console) -> tuple[dict[str, str], dict[str, str]]:
    """By system, what it is made of, or why it cannot be had."""
    made_of, absent = {}, {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for system in chosen:
        environment = system.environment
        try:
            if system.speaks_http1:
                require_h2load()
            if environment is None:
                made_of[system.name] = _made_of(system)
                continue
        except LoadError as error:
            absent[system.name] = str(error)
            continue
        except metadata.PackageNotFoundError as error:
            absent[system.name] = f"{error.name} is not installed: make setup"
            continue
        with console.status(f"installing {system.name}"):
            try:
                environment.install()
                made_of[system.name] = f"{environment.package} {environment.release}, {environment.made_of()}"
            except NotInstalled as error:
                absent[system.name] = str(error)
    return made_of, absent


def _made_of(system: System) -> str:
    """Raises:
    PackageNotFoundError: it needs a distribution that is not installed.
    """
    packages = dict.fromkeys(("dl-inference-core", system.needs, "torch"))
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def _measured(
    models: Collection[str], chosen: Collection[System], effort: Effort, console: Console
) -> dict[str, Measured]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        total = sum(measuring.steps(MODELS[name], list(chosen), effort) for name in models)
        bar = progress.add_task("starting", total=total)

        def got_on(what: str) -> None:
            progress.update(bar, advance=1, description=what)

        measured = {}
        try:
            for name in models:
                measured[name] = measuring.measure(MODELS[name], list(chosen), effort, got_on)
        except KeyboardInterrupt:
            console.print("interrupted: what follows is of the models that were measured", style="bold red")
        return measured


if __name__ == "__main__":
    main()
