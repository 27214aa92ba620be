"""`python -m bench core`."""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from importlib import metadata
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import machine
from bench.core.measuring import PARTS, measure
from bench.core.report import Report
from dl_inference_core.errors import InferenceError
from dl_inference_core.serving import new_event_loop

_VERSIONS = ("dl-inference-core", "dl-inference-balancers")
_QUICK = 0.02
"""The share of a full sample: the run takes about 2 s, most of them for imports."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Samples of each part.")
@click.option("--quick", is_flag=True, help="One short round, to see that it works; the figures mean little.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON, not the table.")
def core(rounds: int, quick: bool, as_json: bool) -> None:
    """Measure what Python costs per request, in a gateway and in a node.

    The core runs as in a server, with metrics, deadlines, health, retries and limits, behind a transport in memory:
    there are no sockets, and the benchmark is the client and the nodes. What such a transport takes by itself is
    measured in the same run and taken off.

    The unit is one choice of dynamic_weighted_round_robin with its outcome. Compare units, not microseconds: the speed
    of the machine cancels out. A goal that is not met does not change the exit status.

    \b
    python -m bench core                     about 20 s
    python -m bench core --rounds 15         where other programs use the machine
    python -m bench core --json > core.json
    """
    rounds = 1 if quick else rounds
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # Without a thread of its own, whose CPU would count.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        bar = progress.add_task("Core", total=rounds * len(PARTS))
        advance = partial(progress.update, bar, advance=1, refresh=True)
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                samples, batch_rows = runner.run(measure(rounds, _QUICK if quick else 1.0, advance))
        except (InferenceError, RuntimeError) as error:
            raise click.ClickException(str(error)) from None
    report = Report(machine=_machine(rounds), samples=samples, batch_rows=batch_rows)
    if as_json:
        click.echo(json.dumps(report.values(), indent=2))
    else:
        report.show(Console())


def _machine(rounds: int) -> dict[str, Any]:
    return {
        **machine.facts(),
        "versions": {name: metadata.version(name) for name in _VERSIONS},
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "rounds": rounds,
    }
