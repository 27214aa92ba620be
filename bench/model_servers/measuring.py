"""One model, all systems: the best setting of each, then all of them in turns, at each number in flight."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench import load
from bench.bare import BareCalls, Calls
from bench.load import Load, LoadError
from bench.model_servers import systems
from bench.model_servers.models import BATCHES, Floats, Model
from bench.model_servers.systems import BARE, Setting, System
from bench.processes import Server
from bench.rounds import Figures, figures, turns

_CONNECTIONS = 16
_WARM_S = 0.5

Settings = Mapping[str, Setting]
"""The setting of each system, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bare:
    """The model without a server.

    Attributes:
        batch: with which it gets through most rows.
        memory_mb: resident, of the process when it has answered one row.
    """

    batch: int
    memory_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One model.

    Attributes:
        rows: by number in flight and system; that of the bare model counts rows, one at a time or in its best batch.
        settings: by system, what was chosen for one request at a time and for many, by their names.
        failed: what came of systems that did not start, answer, or answer as the bare model does; they may have rows of
            before.
    """

    rows: Mapping[int, Mapping[str, Figures]]
    bare: Bare
    settings: Mapping[str, tuple[str, str]]
    failed: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured: rounds, seconds of load in each, and in each trial of a setting."""

    rounds: int
    seconds: float
    trial_s: float


def steps(model: Model, chosen: Sequence[System], effort: Effort) -> int:
    """How often `measure` will say that it has got on, if nothing fails."""
    trials = sum(len(system.settings) for system in chosen if len(system.settings) > 1)
    return trials + len(model.in_flight) * effort.rounds * (len(chosen) + 1)


def measure(model: Model, chosen: Sequence[System], effort: Effort, got_on: Callable[[str], None]) -> Measured:
    """All of the `chosen` systems, and the bare model.

    Args:
        got_on: told what is being measured.

    Raises:
        LoadError: the bare model cannot be measured.
    """
    failed: dict[str, str] = {}
    with made(model) as (folder, scores), systems.bare_model(model, folder) as alone:
        bare = _bare(model, alone, effort.trial_s)
        one, many = _best(model, chosen, folder, scores, effort.trial_s, failed, got_on)
        rows = {}
        with ExitStack() as stack:
            started = _Started(stack, model, folder, scores)
            for in_flight in model.in_flight:
                running = {}
                for system in chosen:
                    if system.name not in failed:
                        with _noted(failed, system.name):
                            setting = (one if in_flight == 1 else many)[system.name]
                            running[system.name] = system, started.server(system, setting)
                rows[in_flight] = _rows(model, running, in_flight, effort, failed, got_on, alone, bare)
    settings = {name: (one[name].name, many[name].name) for name in one}
    return Measured(rows=rows, bare=bare, settings=settings, failed=failed)


class _Started:
    """Servers that run until the end, each setting of a system once."""

    def __init__(self, stack: ExitStack, model: Model, folder: Path, expected: Floats) -> None:
        self._stack = stack
        self._what = model, folder
        self._expected = expected
        self._servers: dict[tuple[str, str], Server] = {}

    def server(self, system: System, setting: Setting) -> Server:
        key = system.name, setting.name
        if key not in self._servers:
            server = self._stack.enter_context(system.running(*self._what, setting, self._expected))
            if system.polls:
                server.pause()
            self._servers[key] = server
        return self._servers[key]


@contextmanager
def made(model: Model) -> Iterator[tuple[Path, Floats]]:
    """A folder with the model, until the block ends, and the bare model's own scores of `model.row()`."""
    with tempfile.TemporaryDirectory() as folder:
        command = (sys.executable, "-W", "ignore", "-m", "bench.model_servers.nets", model.name, folder)
        told = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        yield Path(folder), np.array(json.loads(told), np.float32)


@contextmanager
def _turn(system: System, server: Server) -> Iterator[None]:
    """It is this system's turn until the block ends."""
    if not system.polls:
        yield
        return
    server.resume()
    try:
        yield
    finally:
        server.pause()


@contextmanager
def _noted(failed: dict[str, str], name: str) -> Iterator[None]:
    """Has a system that fails left out, with a word on why."""
    try:
        yield
    except (LoadError, RuntimeError) as error:
        failed[name] = str(error)


def _bare(model: Model, alone: BareCalls, trial_s: float) -> Bare:
    alone.call("1", 1)
    memory_mb = alone.memory_mb()
    sizes = [size for size in BATCHES if size <= max(model.in_flight)]
    rates = {size: size * _called(alone, size, trial_s).run.requests_per_s for size in sizes}
    return Bare(batch=max(rates, key=lambda size: rates[size]), memory_mb=memory_mb)


def _called(alone: BareCalls, batch: int, seconds: float) -> Calls:
    """The figures of batches."""
    first = alone.call(str(batch), 2)
    return alone.call(str(batch), max(round(first.run.requests_per_s * seconds), 1))


def _best(
    model: Model,
    chosen: Sequence[System],
    folder: Path,
    expected: Floats,
    trial_s: float,
    failed: dict[str, str],
    got_on: Callable[[str], None],
) -> tuple[Settings, Settings]:
    """For one request at a time, by p50, and for most of them in flight, by requests per second."""
    one, many = {}, {}
    for system in chosen:
        if len(system.settings) == 1:
            one[system.name] = many[system.name] = system.settings[0]
            continue
        alone, loaded = {}, {}
        for setting in system.settings:
            got_on(f"{model.name}: {system.name}, {setting.name}")
            with _noted(failed, system.name), system.running(model, folder, setting, expected) as server:
                alone[setting.name] = _trial(model, system, server, 1, trial_s).p50_ms
                loaded[setting.name] = _trial(model, system, server, max(model.in_flight), trial_s).requests_per_s
        if alone.keys() & loaded.keys():
            failed.pop(system.name, None)
            by_name = {setting.name: setting for setting in system.settings}
            one[system.name] = by_name[min(alone, key=lambda name: alone[name])]
            many[system.name] = by_name[max(loaded, key=lambda name: loaded[name])]
    return one, many


def _trial(model: Model, system: System, server: Server, in_flight: int, seconds: float) -> load.Run:
    post = system.post(model)
    return load.run(server.address, post, 0, _load(server, system, model, in_flight, seconds))


def _load(server: Server, system: System, model: Model, in_flight: int, seconds: float) -> Load:
    """Warm the server up, and see how much load will take so many seconds."""
    post = system.post(model)
    clients = min(in_flight, _CONNECTIONS) if post.grpc else in_flight
    few = Load(requests=max(in_flight, 2), clients=clients, streams=in_flight // clients)
    rate = load.run(server.address, post, 0, few).requests_per_s
    if few.requests < (enough := round(rate * _WARM_S)):
        rate = load.run(server.address, post, 0, replace(few, requests=enough)).requests_per_s
    return replace(few, requests=max(round(rate * seconds), few.requests))


def _rows(
    model: Model,
    running: Mapping[str, tuple[System, Server]],
    in_flight: int,
    effort: Effort,
    failed: dict[str, str],
    got_on: Callable[[str], None],
    alone: BareCalls,
    bare: Bare,
) -> dict[str, Figures]:
    loads: dict[str, Load] = {}
    lengths: dict[str, int] = {}
    for name, (system, server) in running.items():
        with _noted(failed, name), _turn(system, server):
            lengths[name] = len(load.ask(server.address, system.post(model))) if system.post(model).grpc else 0
            loads[name] = _load(server, system, model, in_flight, effort.seconds)
    cpu_us: dict[str, list[float]] = {name: [] for name in (BARE, *loads)}
    runs: dict[str, list[load.Run]] = {name: [] for name in (BARE, *loads)}
    for name in turns(list(runs), effort.rounds):
        got_on(f"{model.name}@{in_flight}: {name}")
        if name == BARE:
            batch = 1 if in_flight == 1 else bare.batch
            calls = _called(alone, batch, effort.seconds)
            cpu_us[name].append(calls.cpu_us / batch)
            runs[name].append(_of_rows(calls.run, batch))
        elif name not in failed:
            system, server = running[name]
            with _noted(failed, name), _turn(system, server):
                before = server.cpu_s()
                run = load.run(server.address, system.post(model), lengths[name], loads[name])
                cpu_us[name].append((server.cpu_s() - before) / loads[name].requests * 1e6)
                runs[name].append(run)
    memory_mb = {name: server.memory_mb() for name, (_, server) in running.items()}
    memory_mb[BARE] = bare.memory_mb
    return {name: figures(cpu_us[name], runs[name], memory_mb[name]) for name in runs if name not in failed}


def _of_rows(run: load.Run, batch: int) -> load.Run:
    """Of batches, as rows per second; each row takes as long as its batch."""
    return replace(run, requests_per_s=run.requests_per_s * batch)
