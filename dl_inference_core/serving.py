"""One process that serves, from its config to its end; or a supervisor of several."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dl_inference_core import children, sockets
from dl_inference_core.api import Apis
from dl_inference_core.cli_options import fail
from dl_inference_core.config import Config
from dl_inference_core.errors import ConfigError, PluginError
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.supervisor import RELOAD, Heartbeat, Place, Supervisor

if TYPE_CHECKING:
    from dl_inference_core.app import App

_YOUNG = 5_000
"""Objects that are made, and not freed, from one garbage collection to the next."""
new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
with contextlib.suppress(ImportError):
    from uvloop import new_event_loop


@dataclass(frozen=True, slots=True)
class Serving:
    """One process that serves.

    Attributes:
        transport: which one serves, and why.
        describes: whether it prints each model and node.
    """

    config: Config
    config_file: Path | None
    plugins: Plugins
    transport: str
    describes: bool = False

    def start(self, worker: bool, again: list[str]) -> None:
        """Serve until the end: in this process, or in others.

        Args:
            worker: whether a supervisor has started this process.
            again: the command line that says the same: the name of the command, behind which a worker gets `--worker`,
                and its arguments.
        """
        # A service manager may send it at any time. There is nothing to reload before the start is over.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        config = self.config
        if worker:
            run_coroutine(self.as_worker())
        elif config.workers > 1:
            try:  # once, rather than in each worker
                self.plugins.make(Kind.TRANSPORTS, config.transport, config.transport_options, "transport")
            except (ConfigError, PluginError) as error:
                fail(error)
            command, *rest = again
            program = (sys.executable, "-m", "dl_inference_core.cli", command, "--worker", *rest)
            # uvloop makes no process groups.
            supervisor = Supervisor(config, program, self.transport, keeps_spare=not self._serves_models())
            run_coroutine(supervisor.run(), asyncio.new_event_loop)
        else:
            run_coroutine(self.run())

    def _serves_models(self) -> bool:
        folder = self.config_file.parent if self.config_file is not None else Path()
        try:
            return Apis(self.plugins, self.config, folder).serves_models
        except (ConfigError, PluginError) as error:
            fail(error)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; reload at SIGHUP."""
        ending, reloading = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ending.set)
        loop.add_signal_handler(signal.SIGHUP, reloading.set)
        await self._until(asyncio.create_task(ending.wait()), reloading, self.config, None)

    async def as_worker(self) -> None:
        """Wait to be told the place, then serve until standard input ends: on the port of all workers, and on this
        worker's own port, by which it is known. Reload when the supervisor says so, or at SIGHUP."""
        importlib.import_module("dl_inference_core.app")  # what takes longest, before the place is known
        stdin = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
        told = await stdin.readline()
        if not told.endswith(b"\n"):
            return
        place = Place.parse(told.decode().rstrip("\n"))
        config = self.config
        if config.http_port:
            config = config.model_copy(update={"http_port": config.http_port + place.index})
        if config.socket_path is not None:
            path = config.socket_path.with_name(f"{config.socket_path.name}-{place.index}")
            config = config.model_copy(update={"socket_path": path})
        reloading = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloading.set)

        async def obey() -> None:
            """Until standard input ends: it is closed to end this worker, or the supervisor has ended."""
            while await stdin.readline() == RELOAD:
                reloading.set()

        ending = asyncio.create_task(obey())
        try:
            await self._until(
                ending, reloading, config, place, *(f"{config.host}:{port}" for port in (place.own, place.port))
            )
        finally:
            sockets.remove_left(place.folder)  # if the supervisor was killed

    async def _until(
        self,
        ending: asyncio.Task[Any],
        reloading: asyncio.Event,
        config: Config,
        place: Place | None,
        *addresses: str,
    ) -> None:
        from dl_inference_core.app import App
        from dl_inference_core.gateway.sharing import Share

        share = Share(place.folder, place.index) if place is not None else None
        app = App(config, self.plugins, config_file=self.config_file, share=share)
        children.isolate_children(lambda: app.own_sockets(*((place.folder,) if place is not None else ())))
        following = asyncio.create_task(_reload(app, reloading), name="reload at SIGHUP")
        # What holds up the event loop until here are imports.
        heart = Heartbeat(place.folder, config.hang_s) if place is not None and config.hang_s else None
        try:
            vacated = place is not None and place.vacated
            starting = asyncio.create_task(
                app.serve(*addresses, share_port=bool(addresses), listen_when_loaded=vacated)
            )
            await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return
            port = starting.result()[0]
            for row in app.describe() if self.describes else ():
                click.echo(in_a_line(row))
            if app.http_port is not None:
                click.echo(f"http on http://{config.host}:{app.http_port}")
            if config.socket_path is not None:
                click.echo(f"socket {config.socket_path}")
            if place is None:  # else the supervisor says it once
                click.echo(self.transport)
            settle()
            click.echo(f"serving on {config.host}:{port}")
            await ending
        finally:
            following.cancel()
            await app.close()
            if heart is not None:
                heart.close()


async def _reload(app: App, asked: asyncio.Event) -> None:
    """Reload whenever `asked` is set; once for all that ask meanwhile."""
    while True:
        await asked.wait()
        asked.clear()
        await app.reload()


def settle() -> None:
    """Have the garbage collector pass over the objects that exist once everything has started, and run so seldom that
    requests have ended before. With the settings of Python it looks at each request several times, which takes a tenth
    of a busy server's time. A model that is unloaded frees its memory all the same (`node/reclaiming.py`)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])


def in_a_line(row: dict[str, Any]) -> str:
    """What `App.describe` says of one model or node."""
    return f"{row['kind']:<7}{row['name']:<30}{'ok' if row['ok'] else 'FAILED':<8}{row['detail']}"


def run_coroutine(
    work: Coroutine[Any, Any, None], new_loop: Callable[[], asyncio.AbstractEventLoop] = new_event_loop
) -> None:
    """Run `work` on an event loop of its own."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        try:
            runner.run(_failing(work))
        except BaseException as error:
            # Before the runner has a child go through the parent's clean-up: a plugin forked on the event loop.
            children.end_child(error)
            raise


async def _failing(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except (ConfigError, PluginError) as error:
        fail(error)
