"""Worker processes: N of them share one port, each with its own copy of the models and an address of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import click

from dl_inference_core.config import Config
from dl_inference_core.errors import ConfigError
from dl_inference_core.transport import Transport

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_STEADY_S = 10.0
_KILL_AFTER_DRAIN_S = 5.0
_LONGEST_LINE = 65_536


class Supervisor:
    """Starts workers, restarts those that die, ends them all by the end of their standard input, which comes too when
    this process dies."""

    def __init__(self, config: Config, transport: Transport, arguments: Sequence[str], said: str) -> None:
        """Args:
        transport: knows how a worker is started.
        arguments: the command line of `serve`, to be repeated for each worker.
        said: printed, where there are several, before they are said to serve; one says everything itself.
        """
        self._config = config
        self._transport = transport
        self._arguments = arguments
        self._said = said
        self._ending = asyncio.Event()
        self._status = 0
        self._processes: dict[int, asyncio.subprocess.Process] = {}

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            SystemExit: with 0; or with the status of the only worker, which could not start and has said why.
            ConfigError: the address cannot be listened on, or a worker could not start; it has said why.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ending.set)
        with contextlib.closing(self._reserve()) as reserved:
            port = reserved.getsockname()[1]
            ready = [asyncio.Event() for _ in range(self._config.workers)]
            keeping = [asyncio.create_task(self._keep(index, port, event)) for index, event in enumerate(ready)]
            everyone = asyncio.gather(*(event.wait() for event in ready))
            ending = asyncio.create_task(self._ending.wait())
            awaited: set[asyncio.Future[Any]] = {everyone, ending, *keeping}
            try:
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                if everyone.done() and self._config.workers > 1:
                    click.echo(self._said)
                    click.echo(f"serving on {self._config.host}:{port}")
                await asyncio.wait(awaited - {everyone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                everyone.cancel()
                self._ending.set()
                await asyncio.gather(everyone, ending, return_exceptions=True)
                await self._end(keeping)
            for task in keeping:
                task.result()
        sys.exit(self._status)

    def _reserve(self) -> socket.socket:
        """The port, bound but not listened on: it stays ours while workers come and go."""
        host = self._config.host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as alone:
                # Another server that shares its port would take half of our calls.
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind((host, self._config.port))
                port = alone.getsockname()[1]
            reserved = socket.socket(family, socket.SOCK_STREAM)
            try:
                reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                reserved.bind((host, port))
            except OSError:
                reserved.close()
                raise
        except OSError as error:
            raise ConfigError(f"cannot listen on {self._config.host}:{self._config.port}: {error.strerror}") from error
        return reserved

    async def _keep(self, index: int, port: int, ready: asyncio.Event) -> None:
        """Keep worker `index` running."""
        pause_s = _FIRST_PAUSE_S
        while not self._ending.is_set():
            started = time.monotonic()
            status = await self._work(index, port, ready)
            if self._ending.is_set():
                return
            if not ready.is_set():
                if self._config.workers == 1:
                    self._status = status
                    return
                raise ConfigError(f"worker {index} could not start (exit status {status})")
            if time.monotonic() - started > _STEADY_S:
                pause_s = _FIRST_PAUSE_S
            _log.error("worker %d ended with exit status %s; it is started again in %.1f s", index, status, pause_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _work(self, index: int, port: int, ready: asyncio.Event) -> int:
        """Run worker `index` once; returns its exit status."""
        command, *rest = self._arguments
        arguments = [command, "--worker", f"{index}:{port}", *rest]
        name = f"worker {index}: " if self._config.workers > 1 else ""
        with self._transport.program(arguments) as program:
            process = await asyncio.create_subprocess_exec(
                *program.command,
                env={**os.environ, **program.environment},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # What a terminal sends to its foreground group is for the supervisor to pass on.
                process_group=0,
            )
            self._processes[index] = process
            if self._ending.is_set():  # it came too late to be ended with the others
                _tell_to_end(process)
            assert process.stdout is not None
            async for line in _lines(process.stdout):
                text = line.decode(errors="replace").rstrip()
                click.echo(f"{name}{text}")
                if text.startswith("serving on "):
                    ready.set()
            del self._processes[index]
            return await process.wait()

    async def _end(self, keeping: Sequence[asyncio.Task[None]]) -> None:
        for process in self._processes.values():
            _tell_to_end(process)
        _, late = await asyncio.wait(keeping, timeout=self._config.drain_s + _KILL_AFTER_DRAIN_S)
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
