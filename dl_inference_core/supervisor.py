"""Worker processes: N of them share one port, each with its own copy of the models and an address of its own.

A worker that dies is replaced, at the same address; so is one that hangs: each says from its event loop that it lives,
as a Unix datagram with its process id to a socket in a private folder, where workers also meet each other. To start
takes a second of CPU time, nearly all of it for imports. So of gateways one process more waits, having imported
everything, to be told the place of one that died.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from dl_inference_core import sockets
from dl_inference_core.config import Config
from dl_inference_core.errors import ConfigError

_log = logging.getLogger(__name__)

RELOAD = b"reload\n"
"""What a supervisor writes to the standard input of a worker that is to reload. A signal would end a worker that has
just been started."""

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_STEADY_S = 10.0
_KILL_AFTER_DRAIN_S = 5.0
_LONGEST_LINE = 65_536
_SOCKET = "supervisor"
_LONGEST_BEAT_S = 1.0
_BEATS_TO_HANG = 4
_LAST_WORDS_S = 0.2
# What a process may take beyond `hang_s` until its first beat: a backend may import a framework before.
_LONGEST_START_S = 60.0
_LONGEST_TAKEOVER_S = 3.0


@dataclass(frozen=True, slots=True)
class Place:
    """What the supervisor tells a worker, in the first line of its standard input.

    Attributes:
        port: of all workers.
        own: this worker's own port, the same each time it is started.
        folder: where workers meet; private.
        vacated: whether an earlier worker has served there. Its successor listens only when its models have loaded:
            until then the other workers answer every request on the shared port.
    """

    index: int
    port: int
    own: int
    folder: Path
    vacated: bool = False

    def __str__(self) -> str:
        return f"{self.index}:{self.port}:{self.own}:{int(self.vacated)}:{self.folder}"

    @classmethod
    def parse(cls, text: str) -> Place:
        index, port, own, vacated, folder = text.split(":", 4)
        return cls(int(index), int(port), int(own), Path(folder), vacated == "1")


class Heartbeat:
    """Tells the supervisor, from the event loop that makes it, that it runs."""

    def __init__(self, folder: Path, hang_s: float) -> None:
        """Args:
        folder: a `Place`'s.
        hang_s: without a beat for so long this process is killed.
        """
        self._interval_s = min(hang_s / _BEATS_TO_HANG, _LONGEST_BEAT_S)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._supervisor = str(folder / _SOCKET)
        self._message = str(os.getpid()).encode()
        self._beat()

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # it has many to read, or has ended
            self._socket.sendto(self._message, self._supervisor)
        self._next = asyncio.get_running_loop().call_later(self._interval_s, self._beat)

    def close(self) -> None:
        self._next.cancel()
        self._socket.close()


class _Protocol(asyncio.subprocess.SubprocessStreamProtocol):
    """Says when a process has ended, whoever else holds its pipes: `Process.wait` waits for those too."""

    def __init__(self) -> None:
        super().__init__(_LONGEST_LINE, asyncio.get_running_loop())
        self.exited = asyncio.Event()

    def process_exited(self) -> None:
        super().process_exited()
        self.exited.set()


@dataclass(frozen=True, slots=True)
class _Started:
    """A process, with our ends of its pipes until `close`.

    Attributes:
        exited: set once it has ended.
        close: closes our ends of its pipes.
    """

    process: asyncio.subprocess.Process
    exited: asyncio.Event
    close: Callable[[], None]

    def tell(self, place: Place) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{place}\n".encode())


class Supervisor:
    """Starts at least two workers, replaces those that die, and ends them all by the end of their standard input,
    which also ends when this process dies."""

    def __init__(self, config: Config, command: Sequence[str], said: str, *, keeps_spare: bool) -> None:
        """Args:
        command: starts one worker, which ends when its standard input does.
        said: printed once all workers serve, before "serving on".
        keeps_spare: whether one more process is started, which takes the place of the next worker that dies. A node
            keeps none: loading its models takes longer than starting a process.
        """
        self._config = config
        self._command = command
        self._said = said
        self._keeps_spare = keeps_spare
        self._ending = asyncio.Event()
        self._ready = [asyncio.Event() for _ in range(config.workers)]
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._spare: _Started | None = None
        self._spare_wanted = asyncio.Event()
        self._beats: dict[int, float] = {}
        """When each process was last heard of, by its id and `time.monotonic`."""

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; have the workers reload at SIGHUP.

        Raises:
            ConfigError: the address cannot be listened on, or a worker could not start; it has said why.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ending.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        with ExitStack() as stack:
            places = self._places(stack)
            port = places[0].port
            keeping = [asyncio.create_task(self._keep(place)) for place in places]
            everyone = asyncio.gather(*(event.wait() for event in self._ready))
            ending = asyncio.create_task(self._ending.wait())
            beside = [asyncio.create_task(work) for work in self._beside()]
            awaited: set[asyncio.Future[Any]] = {everyone, ending, *keeping, *beside}
            try:
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                if everyone.done():
                    click.echo(self._said)
                    click.echo(f"serving on {self._config.host}:{port}")
                await asyncio.wait(awaited - {everyone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                everyone.cancel()
                for task in beside:
                    task.cancel()
                self._ending.set()
                await asyncio.gather(everyone, ending, *beside, return_exceptions=True)
                await self._end(keeping)
            # The exception of every task is retrieved, or asyncio would print those of the others as it ends.
            failed = [task.exception() for task in (*keeping, *beside) if not task.cancelled()]
            for error in filter(None, failed):
                raise error

    def _reload(self) -> None:
        for process in self._processes.values() if not self._ending.is_set() else ():
            assert process.stdin is not None
            process.stdin.write(RELOAD)

    def _beside(self) -> Iterator[Coroutine[Any, Any, None]]:
        """What goes on for ever while workers are kept."""
        if self._config.hang_s:
            yield self._watch()
        if self._keeps_spare:
            yield self._keep_spare()

    def _places(self, stack: ExitStack) -> list[Place]:
        """Every worker's; the folder and the ports are there until `stack` closes."""
        count = self._config.workers
        folder = stack.enter_context(sockets.private_folder())
        stack.callback(self._listen(folder))
        port, *own = (
            stack.enter_context(contextlib.closing(self._reserve(wanted))).getsockname()[1]
            for wanted in (self._config.port, *[0] * count)
        )
        return [Place(index, port, own[index], folder) for index in range(count)]

    def _reserve(self, wanted: int) -> socket.socket:
        """A port, bound but not listened on: it stays ours while workers come and go.

        Both sockets have SO_REUSEADDR: without it, connections of an earlier server that wait in TIME_WAIT hold the
        port for a minute.

        Raises:
            ConfigError: another server has the port, or this machine does not have the host.
        """
        host = self._config.host.strip("[]")
        try:
            family, *_, address = socket.getaddrinfo(host, wanted, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as alone:
                # Another server that shares its port would take half of our calls.
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind(address)
                bound = alone.getsockname()
            reserved = socket.socket(family, socket.SOCK_STREAM)
            try:
                for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                    reserved.setsockopt(socket.SOL_SOCKET, option, 1)
                reserved.bind(bound)
            except OSError:
                reserved.close()
                raise
        except OSError as error:
            raise ConfigError(f"cannot listen on {self._config.host}:{wanted}: {error.strerror}") from error
        return reserved

    def _listen(self, folder: Path) -> Callable[[], None]:
        """Hear the workers' hearts beat; returns what ends that."""
        loop = asyncio.get_running_loop()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listening.setblocking(False)
        listening.bind(str(folder / _SOCKET))

        def heard() -> None:
            with contextlib.suppress(OSError, ValueError):
                self._beats[int(listening.recv(32))] = time.monotonic()

        def close() -> None:
            loop.remove_reader(listening)
            listening.close()

        loop.add_reader(listening, heard)
        return close

    async def _watch(self) -> None:
        """Kill workers that hang; one that has yet to be heard of may be busy starting, for a minute more."""
        hang_s = self._config.hang_s
        pause_s = min(hang_s / _BEATS_TO_HANG, _LONGEST_BEAT_S)
        while True:
            before = time.monotonic()
            await asyncio.sleep(pause_s)
            now = time.monotonic()
            living = {process.pid: index for index, process in self._processes.items()}
            self._beats = {pid: heard for pid, heard in self._beats.items() if pid in living}
            if now - before > 2 * pause_s:  # this process stood still, and they may have with it
                self._beats = {pid: max(heard, now) for pid, heard in self._beats.items()}
            for pid, heard in self._beats.items():
                if now - heard > hang_s:
                    _log.error(
                        "worker %d (process %d) hangs: no sign of life from its event loop for %.1f s; it is killed",
                        *(living[pid], pid, now - heard),
                    )
                    self._beats[pid] = math.inf
                    with contextlib.suppress(ProcessLookupError):
                        self._processes[living[pid]].kill()

    async def _keep(self, place: Place) -> None:
        """Keep a worker running."""
        index = place.index
        ready = self._ready[index]
        pause_s = _FIRST_PAUSE_S
        while not self._ending.is_set():
            started = time.monotonic()
            status: int | None = None
            try:
                status = await self._work(replace(place, vacated=ready.is_set()))
                what = f"ended with exit status {status}"
            except OSError as error:  # no memory or descriptors for now
                what = f"could not be started: {error.strerror or error}"
            if self._ending.is_set():
                return
            if not ready.is_set():
                if status is None:
                    raise ConfigError(f"worker {index} {what}")
                raise ConfigError(f"worker {index} could not start (exit status {status})")
            if time.monotonic() - started > _STEADY_S:
                pause_s = _FIRST_PAUSE_S
            _log.error("worker %d %s; it is started again in %.1f s", index, what, pause_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _work(self, place: Place) -> int:
        """Run a worker once; returns its exit status."""
        spare = self._take_spare()
        started = spare or await self._start()
        process = started.process
        with contextlib.closing(started):
            self._processes[place.index] = process
            self._beats[process.pid] = time.monotonic() + (_LONGEST_TAKEOVER_S if spare else _LONGEST_START_S)
            started.tell(place)
            if self._ending.is_set():  # it came too late to be ended with the others
                _tell_to_end(process)
            echoing = asyncio.create_task(self._echo(process, place.index))
            await started.exited.wait()
            del self._processes[place.index]
            self._beats.pop(process.pid, None)
            # Whoever else holds its standard output, a process that it has started, is not waited for.
            await asyncio.wait((echoing,), timeout=_LAST_WORDS_S)
            echoing.cancel()
            assert process.returncode is not None
            return process.returncode

    async def _echo(self, process: asyncio.subprocess.Process, index: int) -> None:
        """Say what a worker says."""
        assert process.stdout is not None
        async for line in _lines(process.stdout):
            text = line.decode(errors="replace").rstrip()
            click.echo(f"worker {index}: {text}")
            if text.startswith("serving on "):
                self._ready[index].set()
                if all(event.is_set() for event in self._ready):
                    self._spare_wanted.set()

    async def _start(self) -> _Started:
        """A process that waits for its place."""
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.subprocess_exec(
            _Protocol,
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=None,
            # What a terminal sends to its foreground group is for the supervisor to pass on.
            process_group=0,
        )
        return _Started(asyncio.subprocess.Process(transport, protocol, loop), protocol.exited, transport.close)

    async def _keep_spare(self) -> None:
        """Have a spare whenever all serve."""
        while True:
            await self._spare_wanted.wait()
            self._spare_wanted.clear()
            while self._spare is None:
                try:
                    self._spare = await self._start()
                except OSError:  # no memory or descriptors for now
                    await asyncio.sleep(_LONGEST_PAUSE_S)

    def _take_spare(self) -> _Started | None:
        spare, self._spare = self._spare, None
        if spare is not None and spare.process.returncode is not None:
            spare.close()
            return None
        return spare

    async def _end(self, keeping: Sequence[asyncio.Task[None]]) -> None:
        if (spare := self._take_spare()) is not None:
            with contextlib.closing(spare), contextlib.suppress(ProcessLookupError):
                spare.process.kill()
                await spare.exited.wait()
        for process in self._processes.values():
            _tell_to_end(process)
        longest_s = self._config.drain_delay_s + self._config.drain_s + _KILL_AFTER_DRAIN_S
        _, late = await asyncio.wait(keeping, timeout=longest_s)
        for process in self._processes.values() if late else ():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await asyncio.wait(keeping)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of `stream`; a long one in pieces."""
    rest = b""
    while chunk := await stream.read(_LONGEST_LINE):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > _LONGEST_LINE:
            yield rest
            rest = b""
    if rest:
        yield rest


def _tell_to_end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
