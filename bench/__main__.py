"""`python -m bench`: run the measurements, print a table, write bench/out/bench.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import gateway
from bench.load import LoadError, require_h2load

_OUT = Path(__file__).parent / "out" / "bench.json"
_GOALS = (("600B", "echo-grpcio", 3.0), ("600B", "proxy-grpcio", 1.15), ("600KB", "proxy-grpcio", 1.15))


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Measurements of each system.")
@click.option("--quick", is_flag=True, help="One short round, to see that it works; its figures mean little.")
@click.option("--json", "as_json", is_flag=True, help="Print what goes into bench/out/bench.json.")
def main(rounds: int, quick: bool, as_json: bool) -> None:
    """Measure CPU per request of the gateway beside a bare echo server and a plain byte proxy.

    All run on this machine, one after the other in turns, under h2load on the same machine. Only ratios within
    one run mean anything.
    """
    console = Console(stderr=True)
    if quick:
        rounds = 1
    try:
        require_h2load()
        with Progress(console=console) as progress:
            task = progress.add_task("gateway", total=rounds * len(gateway.SIZES) * len(gateway.SYSTEMS))
            rows = gateway.measure(rounds, 0.05 if quick else 1, lambda: progress.advance(task))
    except LoadError as error:
        console.print(f"error: {error}")
        sys.exit(2)
    goals = [_goal(rows, *goal) for goal in _GOALS]
    result = {
        "machine": _machine(),
        "gateway": {size: {name: asdict(row) for name, row in by_system.items()} for size, by_system in rows.items()},
        "goals": goals,
    }
    _OUT.parent.mkdir(exist_ok=True)
    _OUT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _print(Console(), rows, goals)


def _goal(rows: dict[str, dict[str, gateway.Row]], size: str, system: str, most: float) -> dict[str, Any]:
    ours, theirs = rows[size]["ours-grpcio"], rows[size][system]
    ratio = ours.cpu_us_per_request / theirs.cpu_us_per_request
    return {"size": size, "of": system, "ratio": ratio, "goal": most, "met": ratio <= most}


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    h2load = subprocess.run(["h2load", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("dl-inference-core", "grpcio", "uvloop")} | {"h2load": h2load},
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
    }


def _print(console: Console, rows: dict[str, dict[str, gateway.Row]], goals: list[dict[str, Any]]) -> None:
    table = Table("size", "system", "CPU µs", "least-most", "req/s", "p50 ms", "p99 ms", "MB")
    for size, by_system in rows.items():
        for name, row in by_system.items():
            table.add_row(
                size,
                name,
                f"{row.cpu_us_per_request:.0f}",
                f"{row.cpu_us_least:.0f}-{row.cpu_us_most:.0f}",
                f"{row.requests_per_s:.0f}",
                f"{row.p50_ms:.1f}",
                f"{row.p99_ms:.1f}",
                f"{row.memory_mb:.0f}",
            )
    console.print(table)
    for goal in goals:
        console.print(
            f"ours / {goal['of']} at {goal['size']}: {goal['ratio']:.2f} "
            f"(goal: at most {goal['goal']:.2f}, {'met' if goal['met'] else 'NOT met'})"
        )


if __name__ == "__main__":
    main()
