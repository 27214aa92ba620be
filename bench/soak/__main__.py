"""`python -m bench.soak`: a soak, its report, and exit status 1 if something is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from bench.soak import stage
from bench.soak.course import Pace, Soak
from bench.soak.report import CHART, Report, view
from bench.soak.stage import Stage
from bench.soak.traffic import Client, Traffic
from dl_inference_core.errors import InferenceError
from dl_inference_core.plugins import Plugins
from dl_inference_core.serving import new_event_loop

_OUT = Path(__file__).parents[1] / "out" / "soak.json"
_DOCS = Path(__file__).parents[2] / "docs"
_VERSIONS = ("dl-inference-core", "grpcio", "uvloop")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--transport", default="auto", show_default=True, help="What the gateway serves on.")
@click.option("--minutes", default=10.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--warm-up", "warm_up_s", default=60.0, show_default=True, help="Seconds of it before memory counts.")
@click.option("--rate", default=400.0, show_default=True, help="Requests per second.")
@click.option("--reload", "reload_s", default=3.0, show_default=True, help="Seconds between two changes of the routes.")
@click.option("--restart", "restart_s", default=10.0, show_default=True, help="Seconds between two ends of a node.")
@click.option("--seed", default=1, show_default=True, help="Of what is sent and changed.")
@click.option(
    "--out",
    default=_OUT,
    type=click.Path(path_type=Path),
    help="Where to write the figures.  [default: bench/out/soak.json]",
)
@click.option("--docs", is_flag=True, help=f"Write docs/soak.md and docs/{CHART} too.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures.")
def main(transport: str, minutes: float, out: Path, docs: bool, as_json: bool, **given: Any) -> None:
    """Soak a gateway: all kinds of requests while routes change and nodes end, and see whether anything is left behind.

    Exit status 1 says that a rule is not met. What the gateway itself complained of is in a file beside the
    figures, with .log for .json.

    \b
    python -m bench.soak --transport grpcio --minutes 10 --json
    python -m bench.soak --transport grpcio --minutes 1 --warm-up 15
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no server is left behind
    pace = Pace(
        busy_s=minutes * 60 - given["warm_up_s"],
        **{name: given[name] for name in ("warm_up_s", "reload_s", "restart_s")},
    )
    if pace.busy_s <= 0:
        raise click.BadParameter("there is no time left after the warm-up", param_hint="--minutes")
    try:
        transport, _ = Plugins().choose_transport(transport)
    except InferenceError as error:
        raise click.BadParameter(str(error), param_hint="--transport") from None
    begun = datetime.now(UTC)
    out.parent.mkdir(exist_ok=True)
    with (
        out.with_suffix(".log").open("w", encoding="utf-8") as log,
        stage.set_up(transport, log, given["seed"]) as staged,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        soak = runner.run(_soaked(staged, pace, given["rate"], given["seed"]))
    report = Report(
        machine=_machine(begun),
        settings={
            "transport": transport,
            "nodes": f"{len(staged.nodes)} nodes on {' and '.join(sorted({node.transport for node in staged.nodes}))}",
            "minutes": minutes,
            **asdict(pace),
            "rate": given["rate"],
            "seed": given["seed"],
            "reloads": soak.reloads,
            "restarts": soak.restarts,
            "held_back": soak.traffic.held_back,
        },
        soak=soak,
        findings=soak.findings(),
    )
    values = json.dumps(report.values(), indent=2)
    out.write_text(values + "\n", encoding="utf-8")
    if docs:
        from bench.soak import chart

        (_DOCS / "soak.md").write_text(report.page(), encoding="utf-8")
        chart.svg(soak.samples, _DOCS / CHART)
    if as_json:
        click.echo(values)
    console = Console(stderr=as_json)
    for finding in report.findings:
        console.print(str(finding), style="" if finding.met else "bold red", highlight=False)
    sys.exit(0 if report.met else 1)


async def _soaked(staged: Stage, pace: Pace, rate: float, seed: int) -> Soak:
    """A soak that has run, seen on the terminal while it did."""
    client = Client(staged.gateway.address, staged.http_address, seed)
    progress = Progress(BarColumn(None), TimeElapsedColumn(), TimeRemainingColumn())
    bar = progress.add_task("", total=pace.total_s)
    with Live(progress, console=Console(stderr=True), auto_refresh=False) as live:

        def show(soak: Soak) -> None:
            progress.update(bar, completed=soak.samples[-1].at_s)
            live.update(Group(view(soak), progress), refresh=live.console.is_terminal)

        soak = Soak(staged, Traffic(client, rate, seed), pace, show)
        await soak.run()
    await client.close()
    return soak


def _machine(begun: datetime) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": begun.isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _VERSIONS},
        "command": " ".join(["python -m bench.soak", *sys.argv[1:]]),
    }


if __name__ == "__main__":
    main()
