"""`python -m bench`: run the measurements, print a table, write bench/out/bench.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
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
_DOCS = Path(__file__).parents[1] / "docs" / "performance.md"
_GOALS = (("600B", "echo-grpcio", 3.0), ("600B", "proxy-grpcio", 1.15), ("600KB", "proxy-grpcio", 1.15))


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Measurements of each system.")
@click.option("--quick", is_flag=True, help="One short round, to see that it works; its figures mean little.")
@click.option("--docs", is_flag=True, help="Write docs/performance.md too.")
@click.option("--json", "as_json", is_flag=True, help="Print what goes into bench/out/bench.json.")
def main(rounds: int, quick: bool, docs: bool, as_json: bool) -> None:
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
    machine = _machine()
    result = {
        "machine": machine,
        "gateway": {size: {name: asdict(row) for name, row in by_system.items()} for size, by_system in rows.items()},
        "goals": goals,
    }
    _OUT.parent.mkdir(exist_ok=True)
    _OUT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if docs:
        _DOCS.write_text(_document(rows, machine, goals), encoding="utf-8")
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
    h2load = subprocess.run(["h2load", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("dl-inference-core", "grpcio", "uvloop")} | {"h2load": h2load},
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
    }


_COLUMNS = ("size", "system", "CPU µs/request", "least to most", "requests/s", "p50 ms", "p99 ms", "memory MB")


def _cells(rows: dict[str, dict[str, gateway.Row]]) -> Iterator[tuple[str, ...]]:
    for size, by_system in rows.items():
        for name, row in by_system.items():
            yield (
                size,
                name,
                f"{row.cpu_us_per_request:.0f}",
                f"{row.cpu_us_least:.0f} to {row.cpu_us_most:.0f}",
                f"{row.requests_per_s:.0f}",
                f"{row.p50_ms:.1f}",
                f"{row.p99_ms:.1f}",
                f"{row.memory_mb:.0f}",
            )


def _verdict(goal: dict[str, Any]) -> str:
    return (
        f"ours / {goal['of']} at {goal['size']}: {goal['ratio']:.2f} "
        f"(goal: at most {goal['goal']:.2f}, {'met' if goal['met'] else 'NOT met'})"
    )


def _print(console: Console, rows: dict[str, dict[str, gateway.Row]], goals: list[dict[str, Any]]) -> None:
    table = Table(*_COLUMNS)
    for cells in _cells(rows):
        table.add_row(*cells)
    console.print(table)
    for goal in goals:
        console.print(_verdict(goal))


def _document(rows: dict[str, dict[str, gateway.Row]], machine: dict[str, Any], goals: list[dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# Performance",
        "",
        f"Written by `{machine['command']}` on {machine['date']}: {machine['cores']} cores of {machine['cpu']}, Python "
        f"{machine['python']}, {versions}.",
        "",
        "What the gateway costs per request, beside a bare grpc.aio echo server, which is what one leg costs at the",
        "least, and a grpc.aio proxy that passes bytes to two nodes in turn and does nothing else. CPU is the user",
        "and system time of the server's process, by `/proc`; each figure is the median of several rounds in which the",
        "systems take turns under h2load on the same machine. Only ratios within one run mean anything.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"| {' | '.join('---' for _ in _COLUMNS)} |",
        *(f"| {' | '.join(cells)} |" for cells in _cells(rows)),
        "",
        *(f"- {_verdict(goal)}" for goal in goals),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
