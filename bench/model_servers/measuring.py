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

from bench import bodies, load, replay, rounds
from bench.bare import BareCalls
from bench.figures import Figures, Sample
from bench.load import Load, LoadError, Post
from bench.model_servers import starting
from bench.model_servers.models import BATCHES, Floats, Model
from bench.model_servers.starting import Setting
from bench.model_servers.systems import BARE, System
from bench.processes import Server
from bench.replay import Lasting
from bench.rounds import turns

_WARM_S = 0.3

Settings = Mapping[str, Mapping[int, Setting]]
"""The setting of each system, by its name and the number in flight."""


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
        varied: the same of requests of one to four rows, without the bare model and what speaks HTTP/1.1.
        settings: by system and number in flight, the name of what was chosen.
        failed: what came of systems that did not start, answer, or answer as the bare model does; they may have rows of
            before.
    """

    rows: Mapping[int, Mapping[str, Figures]]
    varied: Mapping[int, Mapping[str, Figures]]
    bare: Bare
    settings: Mapping[str, Mapping[int, str]]
    failed: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured: rounds, seconds of load in each, and in each trial of a setting."""

    rounds: int
    seconds: float
    trial_s: float


def steps(model: Model, chosen: Sequence[System], effort: Effort) -> int:
    """How often `measure` will say that it has got on, if nothing fails."""
    chosen = _with(model, chosen)
    trials = sum(len(system.settings) for system in chosen if len(system.settings) > 1)
    varied = [system for system in chosen if _varies(system)] if model.varied else []
    return trials + effort.rounds * (len(model.in_flight) * (len(chosen) + 1) + len(varied))


def measure(model: Model, chosen: Sequence[System], effort: Effort, got_on: Callable[[str], None]) -> Measured:
    """All of the `chosen` systems that are measured with `model`, and the bare model.

    Args:
        got_on: told what is being measured.

    Raises:
        LoadError: the bare model cannot be measured.
    """
    chosen = _with(model, chosen)
    failed: dict[str, str] = {}
    with made(model) as (folder, scores), starting.bare_model(model, folder) as alone:
        bare = _bare(model, alone, effort.trial_s)
        settings = _best(model, chosen, folder, scores, effort.trial_s, failed, got_on)
        rows, varied = {}, {}
        with ExitStack() as stack:
            started = _Started(stack, model, folder, scores, settings)
            for in_flight in model.in_flight:
                turn = _Turns(model, in_flight, effort, failed, got_on)
                running = started.servers(chosen, in_flight, failed)
                rows[in_flight] = turn.rows(running, alone, bare)
            if model.varied:
                most = max(model.in_flight)
                several = _Turns(model, most, effort, failed, got_on, most_rows=bodies.MOST_ROWS)
                running = started.servers([each for each in chosen if _varies(each)], most, failed)
                varied[most] = several.rows(running)
    names = {name: {in_flight: each.name for in_flight, each in of.items()} for name, of in settings.items()}
    return Measured(rows=rows, varied=varied, bare=bare, settings=names, failed=failed)


def _with(model: Model, chosen: Sequence[System]) -> list[System]:
    return [system for system in chosen if not system.models or model.name in system.models]


def _varies(system: System) -> bool:
    """Whether its requests can have different numbers of rows: h2load sends one body only."""
    return system.read is not None and not system.speaks_http1


class _Started:
    """Servers that run until the end, or until their system is needed with another setting: one of each system."""

    def __init__(self, stack: ExitStack, model: Model, folder: Path, expected: Floats, settings: Settings) -> None:
        self._stack = stack
        self._settings = settings
        self._what = model, folder
        self._expected = expected
        self._servers: dict[str, tuple[Setting, ExitStack, Server]] = {}

    def servers(
        self, chosen: Sequence[System], in_flight: int, failed: dict[str, str]
    ) -> dict[str, tuple[System, Server]]:
        """Those of the `chosen` systems that have not failed, by name, as they are set up for so many in flight."""
        running = {}
        for system in chosen:
            if system.name not in failed:
                with _noted(failed, system.name):
                    running[system.name] = system, self._server(system, self._settings[system.name][in_flight])
        return running

    def _server(self, system: System, setting: Setting) -> Server:
        if system.name in self._servers:
            its_setting, its_stack, server = self._servers[system.name]
            if its_setting == setting:
                return server
            del self._servers[system.name]
            its_stack.close()
        own = self._stack.enter_context(ExitStack())
        server = own.enter_context(system.running(*self._what, setting, self._expected))
        if system.polls:
            server.pause()
        self._servers[system.name] = setting, own, server
        return server


@contextmanager
def made(model: Model) -> Iterator[tuple[Path, Floats]]:
    """A folder with the model, until the block ends, and the bare model's own scores of its first requests."""
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
    rates = {size: size * rounds.called(alone, str(size), trial_s).requests_per_s for size in sizes}
    return Bare(batch=max(rates, key=lambda size: rates[size]), memory_mb=memory_mb)


def _best(
    model: Model,
    chosen: Sequence[System],
    folder: Path,
    expected: Floats,
    trial_s: float,
    failed: dict[str, str],
    got_on: Callable[[str], None],
) -> Settings:
    """For one request at a time by p50, for any other number in flight by requests per second."""
    best: dict[str, dict[int, Setting]] = {}
    for system in chosen:
        if len(system.settings) == 1:
            best[system.name] = dict.fromkeys(model.in_flight, system.settings[0])
            continue
        tried: dict[str, dict[int, Sample]] = {}
        for setting in system.settings:
            got_on(f"{model.name}: {system.name}, {setting.name}")
            with _noted(failed, system.name), system.running(model, folder, setting, expected) as server:
                tried[setting.name] = {
                    in_flight: _trial(model, system, server, in_flight, trial_s) for in_flight in model.in_flight
                }
        if tried:
            failed.pop(system.name, None)
            by_name = {setting.name: setting for setting in system.settings}
            best[system.name] = {each: by_name[best_of(tried, each)] for each in model.in_flight}
    return best


def best_of(tried: Mapping[str, Mapping[int, Sample]], in_flight: int) -> str:
    """The name of the best setting at one number in flight, of those that were tried."""
    if in_flight == 1:
        return min(tried, key=lambda name: tried[name][1].p50_ms)
    return max(tried, key=lambda name: tried[name][in_flight].requests_per_s)


def _trial(model: Model, system: System, server: Server, in_flight: int, seconds: float) -> Sample:
    return _Load(model, system, server, in_flight, seconds).sample()


class _Load:
    """What one server is asked with: gRPC by the load generator, HTTP/1.1 by h2load. Warms the server up."""

    def __init__(
        self, model: Model, system: System, server: Server, in_flight: int, seconds: float, most_rows: int = 1
    ) -> None:
        self._server = server
        self._asked = system.ask(model, most_rows)
        self._lasting = Lasting(seconds=seconds, in_flight=in_flight)
        if isinstance(self._asked, Post):
            self._amount = self._warm(self._asked)
        else:
            replay.last(server.address, self._asked, replace(self._lasting, seconds=_WARM_S))

    def _warm(self, post: Post) -> Load:
        """The load that takes so many seconds. HTTP/1.1 has one request in flight on a connection."""
        in_flight = self._lasting.in_flight
        few = Load(requests=max(in_flight, 2), clients=in_flight, streams=1)
        rate = load.run(self._server.address, post, 0, few).requests_per_s
        if few.requests < (enough := round(rate * _WARM_S)):
            rate = load.run(self._server.address, post, 0, replace(few, requests=enough)).requests_per_s
        return replace(few, requests=max(round(rate * self._lasting.seconds), few.requests))

    def sample(self) -> Sample:
        """One round."""
        if not isinstance(self._asked, Post):
            return rounds.sample(self._server, self._asked, self._lasting)
        before = self._server.cpu_s()
        run = load.run(self._server.address, self._asked, 0, self._amount)
        used = self._server.cpu_s() - before
        return Sample(
            cpu_us_per_request=used / self._amount.requests * 1e6,
            requests_per_s=run.requests_per_s,
            p50_ms=run.p50_ms,
            p99_ms=run.p99_ms,
        )


class _Turns:
    """All systems in turns, at one number in flight."""

    def __init__(
        self,
        model: Model,
        in_flight: int,
        effort: Effort,
        failed: dict[str, str],
        got_on: Callable[[str], None],
        most_rows: int = 1,
    ) -> None:
        self._model, self._in_flight, self._most_rows = model, in_flight, most_rows
        self._rounds, self._seconds = effort.rounds, effort.seconds * model.rounds_of
        self._failed = failed
        self._got_on = got_on

    def rows(
        self, running: Mapping[str, tuple[System, Server]], alone: BareCalls | None = None, bare: Bare | None = None
    ) -> dict[str, Figures]:
        """Figures of the `running` systems, and of the bare model if it is given. One that fails has none."""
        loads: dict[str, _Load] = {}
        for name, (system, server) in running.items():
            with _noted(self._failed, name), _turn(system, server):
                loads[name] = _Load(self._model, system, server, self._in_flight, self._seconds, self._most_rows)
        samples: dict[str, list[Sample]] = {name: [] for name in (*([BARE] if bare else []), *loads)}
        for name in turns(list(samples), self._rounds):
            self._got_on(f"{self._model.name}@{self._in_flight}: {name}")
            if name == BARE and alone and bare:
                samples[name].append(self._bare_sample(alone, bare))
            elif name not in self._failed:
                system, server = running[name]
                with _noted(self._failed, name), _turn(system, server):
                    samples[name].append(loads[name].sample())
        memory_mb = {name: server.memory_mb() for name, (_, server) in running.items()}
        if bare:
            memory_mb[BARE] = bare.memory_mb
        return {
            name: Figures(rounds=each, memory_mb=memory_mb[name])
            for name, each in samples.items()
            if name not in self._failed
        }

    def _bare_sample(self, alone: BareCalls, bare: Bare) -> Sample:
        """Of batches, as rows per second; each row takes as long as its batch."""
        batch = 1 if self._in_flight == 1 else bare.batch
        sample = rounds.called(alone, str(batch), self._seconds)
        return replace(
            sample,
            cpu_us_per_request=sample.cpu_us_per_request / batch,
            requests_per_s=sample.requests_per_s * batch,
        )
