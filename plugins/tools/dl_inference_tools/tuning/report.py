"""What people see of the tuning: how far it is, then a table, words, and a picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from pydantic import BaseModel, ConfigDict, computed_field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dl_inference_tools.load_testing.results import Row
from dl_inference_tools.tuning.search import Candidate, Settings, Turns, reaches

_TIMES = "\N{MULTIPLICATION SIGN}"
_COLUMNS = ("max_rows", "max_delay_us", "instances", "intra-op", "in flight", "requests/s", "p50 ms", "p99 ms")


class Tuning(BaseModel):
    """All of one command.

    Attributes:
        date: when it began, ISO 8601.
        p99_ms: the limit.
        contents: what was sent, for people.
        cpus: how many were there.
        candidates: in the order that they were tried in; the first is what the model had.
        complete: whether the search came to its end; else the budget did.
        best: the settings of one of them; None where none is within the limit.
        turns: the best and the first, measured in turns; None where there was nothing to compare.
        written: the file that was changed.
    """

    model_config = ConfigDict(frozen=True)

    version: str
    date: str
    model: str
    model_version: int
    backend: str
    p99_ms: float
    contents: str
    request_bytes: int
    cpus: int
    candidates: tuple[Candidate, ...]
    complete: bool
    best: Settings | None
    turns: Turns | None
    written: Path | None

    @computed_field  # type: ignore[prop-decorator] # as pydantic's documentation has it
    @property
    def better(self) -> bool:
        """Whether the best is better than what the model had, by more than the spread."""
        return self.turns is not None and self.turns.better(self.p99_ms)

    def nearest(self) -> Candidate:
        """The best of all, within the limit or not."""
        return max(self.candidates, key=lambda candidate: candidate.score(self.p99_ms))

    def verdict(self) -> list[str]:
        """In words, what was found."""
        more = [] if self.complete else ["the budget ended the search; a larger --budget tries more"]
        return [*self._found(), *more]

    def _found(self) -> list[str]:
        limit = f"a p99 of {self.p99_ms:g} ms"
        if self.best is None:
            nearest = self.nearest()
            row = nearest.at(self.p99_ms)
            if row is None:
                return [f"nothing that was tried reaches {limit}: no request was answered"]
            failed = "" if row.good else ", and requests failed"
            return [
                f"nothing that was tried reaches {limit}; the nearest has {row.latency_ms['p99']:.2f} ms at "
                f"{row.load.name}{failed}: {nearest.settings}"
            ]
        if self.turns is None:
            return [f"best of {len(self.candidates)} within {limit}: what the model has"]
        turns = self.turns
        lines = [
            f"best of {len(self.candidates)} within {limit}: {self.best}",
            f"in turns, {len(turns.best)} rounds: best {_typical(turns.best)}; before {_typical(turns.before)}; "
            f"{_TIMES}{turns.ratio:.2f}, the rounds within a factor of {1 + turns.spread:.2f}",
        ]
        if not self.better:
            lines.append("that is over the limit, or no more than the rounds differ by: not written")
        return lines


def _typical(rows: tuple[Row, ...]) -> str:
    p99s = [row.latency_ms["p99"] for row in rows if row.latency_ms]
    said = f"p99 {median(p99s):.2f} ms" if p99s else "no answers"
    return f"{median(row.requests_per_s for row in rows):,.0f} requests/s, {said} ({rows[0].load.name})"


@contextmanager
def progress(budget_s: float) -> Iterator[Callable[[str], None]]:
    """A function that says what is being done, beside a bar of the time; on a terminal only."""
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    to = Console(stderr=True)
    with Progress(*columns, console=to, transient=True, disable=not to.is_terminal) as bars:
        bar = bars.add_task("", total=budget_s)
        began = time.monotonic()
        yield lambda doing: bars.update(bar, completed=time.monotonic() - began, description=doing)


def show(tuning: Tuning, to: Console) -> None:
    """A table with all that was tried, the best first, and beneath it what that comes to."""
    to.print(Text(f"{tuning.model} version {tuning.model_version}, {tuning.contents}"), soft_wrap=True)
    table = Table()
    for title in _COLUMNS:
        table.add_column(title, justify="right")
    table.add_column("")
    before = tuning.candidates[0]
    for candidate in sorted(tuning.candidates, key=lambda each: each.score(tuning.p99_ms), reverse=True):
        row = candidate.at(tuning.p99_ms)
        notes = []
        if candidate.settings == tuning.best:
            notes.append("best")
        if candidate is before:
            notes.append("before")
        if row is not None and not reaches(row, tuning.p99_ms):
            notes.append(f"over {tuning.p99_ms:g} ms" if row.good else "requests failed")
        settings = candidate.settings
        style = "bold green" if candidate.settings == tuning.best else "" if row is not None else "dim"
        table.add_row(
            str(settings.max_rows),
            str(settings.max_delay_us),
            str(settings.instances),
            "-" if settings.intra_op_threads is None else str(settings.intra_op_threads),
            *(_figures(row) if row is not None else ["-"] * 4),
            Text(", ".join([*notes, *([candidate.failed] if candidate.failed else [])])),
            style=style,
        )
    to.print(table)
    for line in tuning.verdict():
        to.print(Text(line), soft_wrap=True)
    best = tuning.best and next(each for each in tuning.candidates if each.settings == tuning.best)
    row = best.at(tuning.p99_ms) if best else None
    for note in row.notes() if row is not None else ():
        to.print(Text(f"best: {note}", style="yellow"), soft_wrap=True)


def _figures(row: Row) -> list[str]:
    latency = row.latency_ms
    return [
        str(row.load.in_flight),
        f"{row.requests_per_s:,.0f}",
        f"{latency['p50']:.2f}",
        f"{latency['p99']:.2f}",
    ]


def plot(tuning: Tuning, file: Path) -> None:
    """Write a PNG: of all that was tried the p99 against the throughput, a point for each number in flight.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    before = tuning.candidates[0].settings
    named = {before: ("C1", f"before: {before}")}
    if tuning.best is not None:
        named[tuning.best] = "C2", f"best{', and before' if tuning.best == before else ''}: {tuning.best}"
    others = "others that were tried"
    for candidate in sorted(tuning.candidates, key=lambda each: each.settings in named):
        colour, label = named.get(candidate.settings, ("0.75", others))
        rows = [row for row in candidate.rows if row.latency_ms]
        if not rows:
            continue
        rates, p99s = [row.requests_per_s for row in rows], [row.latency_ms["p99"] for row in rows]
        axes.plot(rates, p99s, "o-", color=colour, label=label, markersize=4, linewidth=1)
        if label == others:
            others = "_"  # once in the legend
        marked = candidate.at(tuning.p99_ms)
        if candidate.settings == tuning.best and marked is not None:
            axes.plot(marked.requests_per_s, marked.latency_ms["p99"], "*", color=colour, markersize=16)
    axes.axhline(tuning.p99_ms, color="C3", linestyle="--", linewidth=1, label=f"p99 of {tuning.p99_ms:g} ms")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="requests per second", ylabel="p99, ms", title=f"{tuning.model}: {tuning.contents}")
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(file, format="png", dpi=150)
