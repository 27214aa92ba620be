"""What people see of a load: progress while it runs, then a table, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dl_inference_tools.load_testing.processes import Processes
from dl_inference_tools.load_testing.results import PERCENTILES, Load, Results, Row, curve

_WIDTH = 130
_COLUMNS = (*(f"p{percentile:g}" for percentile in PERCENTILES), "max")
_NINES = (0.0, 0.9, 0.99, 0.999, 0.9999, 0.99999)


def console(*, stderr: bool = False) -> Console:
    """As wide as the terminal, or as a table needs."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDTH)


@contextmanager
def running(loads: tuple[Load, ...]) -> Iterator[Any]:
    """A function that runs one of the loads in processes; each has a bar, on a terminal only."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[done]}"))
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal
    ) as bars:

        def run(processes: Processes, load: Load) -> Row:
            seconds = load.warm_up_s + load.duration_s
            bar = bars.add_task(load.name, total=load.requests or seconds, done="")

            def tell(done: int) -> None:
                elapsed = bars.tasks[bar].elapsed or 0.0
                bars.update(bar, completed=done if load.requests else min(elapsed, seconds), done=f"{done:,} done")

            row = processes.run(load, tell)
            bars.update(bar, completed=load.requests or seconds)
            return row

        yield run


def show(results: Results, before: Results | None, to: Console) -> None:
    """A table with a row for each load, and beneath it what the figures do not say.

    Args:
        before: the ratio to its figures stands beside each.
    """
    shared = ", ".join(
        f"{count} {noun}{'' if count == 1 else plural}"
        for count, noun, plural in ((results.processes, "process", "es"), (results.connections, "connection", "s"))
    )
    _line(to, f"{results.method} at {results.address}, {shared}")
    _line(to, f"{results.request_bytes:,} bytes a request: {results.contents}")
    table = Table("load")
    for title in ("requests/s", *(f"{column} ms" for column in _COLUMNS), "failed"):
        table.add_column(title, justify="right")
    for row in results.rows:
        table.add_row(row.load.name, *_cells(row, before.like(row) if before is not None else None))
    to.print(table)
    for row in results.rows:
        for note in row.notes():
            _line(to, f"{row.load.name}: {note}", "yellow" if row.good else "red")
    if before is not None:
        _line(to, f"\N{MULTIPLICATION SIGN}: this run's figure as a multiple of that of {before.date}")
        missing = ", ".join(row.load.name for row in results.rows if before.like(row) is None)
        if missing:
            _line(to, f"{before.date} had no load of {missing}")


def _line(to: Console, text: str, style: str = "") -> None:
    to.print(Text(text, style=style), soft_wrap=True)


def _cells(row: Row, before: Row | None) -> list[Text]:
    was = before.latency_ms if before is not None else {}
    failed = sum(row.failed.values()) + row.unsent
    return [
        _cell(f"{row.requests_per_s:,.0f}", row.requests_per_s, before.requests_per_s if before is not None else None),
        *(
            _cell(f"{row.latency_ms[column]:.2f}", row.latency_ms[column], was.get(column))
            if row.latency_ms
            else Text("-")
            for column in _COLUMNS
        ),
        Text(f"{failed:,}", style="red" if failed else ""),
    ]


def _cell(text: str, value: float, before: float | None) -> Text:
    return Text(text) if not before else Text.assemble(text, (f" \N{MULTIPLICATION SIGN}{value / before:.2f}", "dim"))


def plot(results: Results, before: Results | None, file: Path) -> None:
    """Write a PNG: the latency within which each part of the requests was answered, and of several loads latency
    against throughput.

    Args:
        before: its lines are dashed.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    panels = 1 if len(results.rows) == 1 else 2
    figure = Figure(figsize=(7 * panels, 4.5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    names = dict.fromkeys(row.load.name for run in (results, before) if run is not None for row in run.rows)
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    _percentiles(axes[0], results, colours, "-")
    if before is not None:
        _percentiles(axes[0], before, colours, "--", f", {before.date[:16]}")
    if panels == 2:
        _throughput(axes[1], results, "-")
        if before is not None:
            _throughput(axes[1], before, "--", f", {before.date[:16]}")
    for panel in axes:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    figure.suptitle(f"{results.method} at {results.address}", fontsize=10)
    figure.savefig(file, format="png", dpi=150)


def _percentiles(axes: Any, results: Results, colours: Mapping[str, str], style: str, suffix: str = "") -> None:
    most = 1.0
    for row in results.rows:
        if row.latency_ms:
            parts, ms = curve(row.latency)
            across = [1 / (1 - part) for part in parts if part < 1]  # the parts rise, to 1
            most = max(most, *across, 1.0)
            name = row.load.name
            axes.plot(across, ms[: len(across)], style, color=colours[name], label=f"{name}{suffix}")
    ticks = [nine for nine in _NINES if 1 / (1 - nine) <= most] or [0.0]
    axes.set_xscale("log")
    axes.set_xticks([1 / (1 - tick) for tick in ticks], [f"{tick * 100:.10g} %" for tick in ticks])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="part of the requests", ylabel="answered within, ms")
    axes.grid(alpha=0.3)


def _throughput(axes: Any, results: Results, style: str, suffix: str = "") -> None:
    rows = [row for row in results.rows if row.latency_ms]
    rates = [row.requests_per_s for row in rows]
    for index, column in enumerate(("p50", "p99")):
        latencies = [row.latency_ms[column] for row in rows]
        axes.plot(rates, latencies, f"o{style}", color=f"C{index}", label=f"{column}{suffix}")
    for row, rate in zip(rows, rates, strict=True):
        axes.annotate(
            row.load.name, (rate, row.latency_ms["p99"]), fontsize=7, textcoords="offset points", xytext=(4, 4)
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="requests per second", ylabel="latency, ms")
    axes.grid(alpha=0.3, which="both")
