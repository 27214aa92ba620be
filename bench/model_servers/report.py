"""What the model servers came to: for programs, on the terminal, as a section of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import figures, machine
from bench.goals import COLUMNS, Outcome
from bench.model_servers import goals
from bench.model_servers.environments import TRITON_RELEASE
from bench.model_servers.measuring import Measured
from bench.model_servers.models import MODELS
from bench.model_servers.systems import EVERY, TOLERANCE
from bench.outputs import MODEL_SERVERS, NODE

CHART = "performance-model-servers.svg"
_VARIED = ", 1 to 4 rows"
TRITON_NOTE = """\
Triton {release}, Python backend: its C++ backends cannot be installed here and may be faster.
"""
_HEAD = """\
# Model servers

The same models in ours and in other model servers, in one run on one machine. Written by `{command}` on {date}:
{cores} cores of {cpu}. {conditions}

![Requests per second and p99 by requests in flight]({chart})

- Each figure is the median of {rounds} rounds ({longer}), in which the systems take turns; "least to most" is the
  range over the rounds, of which none is left out. All systems run all the time; one that takes CPU without a request
  is stopped (SIGSTOP) while it is not its turn.
- The load is `bench/load_generator`'s, on the same cores: 64 different requests, ids and values, in turn; each answer
  is followed by the next request, and every status is read. The goals are about requests of one row; those of one to
  four rows stand in tables of their own. litserve and bentoml speak HTTP/1.1: h2load{h2load} sends them one request
  again and again, and they have no rows in the tables of one to four rows.
- Every system answers with one copy of the model: the same frozen TorchScript, with the same number of torch's threads
  ({threads}). No server puts more rows together than these: {most}. Before it is measured, each system gets as many
  different requests at one time, and its answers are compared with the bare model's: none is off by more than
  {tolerance:g}.
- CPU is the user and system time of all processes of a server, over the requests. Memory is their resident memory at
  the end; pages that two of the processes share count twice.
- `bare` is the model in a Python process without a server, called again and again: one row at a time at 1 in flight,
  else in the batch with which it gets through most rows ({batches}). Its p50 and p99 are of a batch, its memory is what
  the process holds once it has answered one row.
- seldon-core is measured on Python 3.10 if there is one, as on a later one its protobuf is pure Python. PyPI has only
  torch with CUDA for that, which takes more memory than "+cpu", and its processes are many.
- Each system has the best of its settings, chosen in the same run for each model and each number in flight: for 1 by
  p50, else by requests/s.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that one run came to.

    Attributes:
        machine: where, when, how and with what it was measured.
        made_of: by system, its release and what it runs on.
        measured: by model.
        absent: by system, why it could not be had.
    """

    machine: Mapping[str, Any]
    made_of: Mapping[str, str]
    measured: Mapping[str, Measured]
    absent: Mapping[str, str]

    @property
    def rows(self) -> goals.Rows:
        """By load: "mmoe@8", or "mmoe, 1 to 4 rows@8"."""
        return {
            f"{name}{rows}@{in_flight}": by_system
            for name, measured in self.measured.items()
            for rows, by_load in (("", measured.rows), (_VARIED, measured.varied))
            for in_flight, by_system in by_load.items()
        }

    @property
    def outcomes(self) -> list[Outcome]:
        return goals.outcomes(self.rows)

    def values(self) -> dict[str, Any]:
        """What it has of bench.json."""
        rest = {
            "machine": dict(self.machine),
            "systems": dict(self.made_of),
            "bare": {name: asdict(measured.bare) for name, measured in self.measured.items()},
            "settings": {name: {**measured.settings} for name, measured in self.measured.items()},
            "failed": {name: dict(measured.failed) for name, measured in self.measured.items()},
            "absent": dict(self.absent),
            "goals": [each.values() for each in self.outcomes],
        }
        rows = {load: {name: row.values() for name, row in by_system.items()} for load, by_system in self.rows.items()}
        return {NODE: rows, MODEL_SERVERS: rest}

    def show(self, console: Console) -> None:
        for heading, headings, lines in self._tables():
            table = Table(*headings, title=heading, title_justify="left", box=SIMPLE_HEAD, padding=0)
            for line in lines:
                table.add_row(*line)
            console.print(table)
        for line in self._remarks():
            console.print(line, highlight=False)

    def section(self) -> str:
        """Its part of docs/performance.md; the chart is in the file `CHART` beside it."""
        models = [MODELS[name] for name in self.measured]
        facts = {
            **self.machine,
            "chart": CHART,
            "threads": ", ".join(f"{model.name}: {model.threads}" for model in models),
            "most": ", ".join(f"{model.name}: {model.batch}" for model in models),
            "batches": ", ".join(f"{name}: {measured.bare.batch}" for name, measured in self.measured.items()),
            "tolerance": TOLERANCE,
            "conditions": machine.conditions(self.machine),
            "longer": ", ".join(f"{model.name}: {self.machine['seconds'] * model.rounds_of:g} s" for model in models),
        }
        lines = [_HEAD.format_map(facts)]
        for heading, headings, cells in self._tables():
            lines += [
                f"## {heading}\n",
                TRITON_NOTE.format(release=TRITON_RELEASE),
                f"| {' | '.join(headings)} |",
                f"| --- |{' --- |' * (len(headings) - 1)}",
                *(f"| {' | '.join(line)} |" for line in cells),
                "",
            ]
        return "\n".join([*lines, *(f"- {line}" for line in self._remarks())]).rstrip("\n") + "\n"

    def _tables(self) -> Iterator[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
        """Each with its heading, the headings of its columns, and its lines."""
        yield "Goals for model servers", COLUMNS, [each.cells() for each in self.outcomes]
        yield "Systems", ("system", "what it is", *self.measured), [*self._systems()]
        for name, measured in self.measured.items():
            for rows, by_load in (("", measured.rows), (_VARIED, measured.varied)):
                for in_flight, by_system in by_load.items():
                    heading = f"{MODELS[name].title}: {in_flight} in flight{rows}"
                    lines = [(system, *row.cells()) for system, row in by_system.items()]
                    yield heading, ("system", *figures.COLUMNS), lines

    def _systems(self) -> Iterator[Sequence[str]]:
        """Of those that were measured, what they are, and their settings for each model."""
        for system in EVERY:
            if system.name not in self.made_of or system.name in self.absent:
                continue
            settings = (measured.settings.get(system.name) for measured in self.measured.values())
            yield system.name, f"{self.made_of[system.name]}: {system.how}", *map(_chosen, settings)

    def _remarks(self) -> Iterator[str]:
        """The systems that are left out, and why."""
        for name, why in self.absent.items():
            yield f"{name} is left out, as it cannot be had here: {why}"
        for model, measured in self.measured.items():
            for name, why in measured.failed.items():
                yield f"{name} failed with {model}, and is left out from there on: {why}"


def _chosen(settings: Mapping[int, str] | None) -> str:
    """For a cell: what was chosen for which numbers in flight."""
    if settings is None:
        return "left out"
    if len(set(settings.values())) == 1:
        return next(iter(settings.values()))
    return "; ".join(f"{in_flight}: {name}" for in_flight, name in settings.items())
