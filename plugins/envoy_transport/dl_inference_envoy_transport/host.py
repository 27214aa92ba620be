"""Inside Envoy: one event loop, the program that it runs, and Envoy's own listeners and clusters.

pyvoy loads `hosted.app` with Envoy's control listener. `Host` then runs `dl-inference-core` with the arguments that the
starting process left in the private directory, and ends the process with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import http.client
import importlib
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from dl_inference_core.errors import ConfigError
from dl_inference_core.transport import HttpApp, Limits
from dl_inference_envoy_transport import configuration
from dl_inference_envoy_transport.configuration import Address, Document, Options, Secrets
from dl_inference_envoy_transport.loop import OneLoop, Pace

T = TypeVar("T")

FOLDER = "DL_INFERENCE_ENVOY"
"""The environment variable that names the private directory, in a process that Envoy hosts."""
PROGRAM = "program.json"

_POLL_S = 0.002
_APPLIED_WITHIN_S = 10.0
_BACKGROUND = "/background"
_BEGIN = {"type": "http.response.start", "status": 200, "headers": []}
_END = {"type": "http.response.body", "body": b""}


class Host:
    """One process of Envoy with Python in it. Event loop only, where not said otherwise."""

    def __init__(self, folder: Path, program: dict[str, Any]) -> None:
        """Args:
        program: what `transport.EnvoyTransport.program` wrote.
        """
        self.folder = folder
        self.module: str = program["module"]
        self.pace = Pace()
        self.background: contextvars.Context
        """Of a request that is open as long as this process."""
        self._arguments: list[str] = program["arguments"]
        self._entry: str = program["entry"]
        self._listeners: dict[str, Document] = {}
        self._clusters: dict[str, Document] = {}
        self._versions = itertools.count(1)
        self._names = itertools.count()
        self._writing: asyncio.Handle | None = None
        self._background_open = asyncio.Event()
        self._end = asyncio.Event()
        self._runs: dict[str, tuple[Coroutine[Any, Any, Any], Future[Any]]] = {}

    @classmethod
    def begin(cls) -> Host:
        """The host of this process; before any event loop is made in it. On Envoy's main thread."""
        folder = Path(os.environ[FOLDER])
        program = json.loads((folder / PROGRAM).read_text(encoding="utf-8"))
        # What it took to start Python here must not reach the processes that this one starts.
        for name, value in program["environment"].items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        sys.executable = program["executable"]
        sys.argv = ["dl-inference-core", *program["arguments"]]
        host = cls(folder, program)
        asyncio.set_event_loop_policy(OneLoop(host.pace))
        return host

    @staticmethod
    def of_this_process() -> Host | None:
        """None where Envoy does not host this process."""
        hosted = sys.modules.get("dl_inference_envoy_transport.hosted")
        return None if hosted is None else hosted.app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The control listener's ASGI application."""
        if scope["type"] == "lifespan":
            await receive()
            asyncio.get_running_loop().set_exception_handler(_unhandled)
            program = asyncio.ensure_future(self._program())
            await send({"type": "lifespan.startup.complete"})
            await receive()  # a signal has ended Envoy; what was in flight is lost
            program.cancel()
            self._exit(128 + signal.SIGTERM)
            return
        if scope["path"] == _BACKGROUND:
            self.background = contextvars.copy_context()
            self._background_open.set()
            await self._end.wait()
        coroutine, future = self._runs.pop(scope["path"])
        try:
            future.set_result(await coroutine)
        except BaseException as error:
            future.set_exception(error)
        await send(_BEGIN)
        await send(_END)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of `coroutine`, run on the loop while a request of Envoy's is open: calls that it makes go through
        Envoy's client. From any thread but the loop's, which waits."""
        future: Future[T] = Future()
        path = self.new_name("/")
        self._runs[path] = (coroutine, future)
        _unix_get(self.folder / configuration.CONTROL, path, timeout_s=None)
        return future.result()

    async def _program(self) -> None:
        status = 1
        try:
            status = await self._run_entry()
        except Exception:
            traceback.print_exc()
        finally:
            self._exit(status)

    def _exit(self, status: int) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        sys.stdout.flush()
        sys.stderr.flush()
        # Envoy's own way out joins threads that would wait for this one.
        os._exit(status)

    async def _run_entry(self) -> int:
        module, _, function = self._entry.partition(":")
        entry: Callable[[list[str]], Coroutine[Any, Any, int]] = getattr(importlib.import_module(module), function)
        await self._until_live()
        # Envoy's client works only while a request is open. What is no part of answering a call, or outlives it, takes
        # this one's context.
        _, writer = await asyncio.open_unix_connection(self.folder / configuration.CONTROL)
        try:
            writer.write(f"GET {_BACKGROUND} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            await self._background_open.wait()
            return await entry(self._arguments)
        finally:
            self._end.set()
            writer.close()

    async def _until_live(self) -> None:
        """Envoy takes listeners and clusters from now on.

        Raises:
            ConfigError: it does not come up.
        """
        end = time.monotonic() + _APPLIED_WITHIN_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                status, _ = await self._admin("/ready")
                if status == 200:
                    return
            await asyncio.sleep(_POLL_S)
        raise ConfigError(f"Envoy is not ready after {_APPLIED_WITHIN_S:.0f} s")

    def new_name(self, kind: str) -> str:
        """Never given before: an address that was left and is used again is another listener or cluster."""
        return f"{kind}{next(self._names)}"

    def new_version(self) -> int:
        """Of what Envoy reads from a file."""
        return next(self._versions)

    async def listen(
        self,
        name: str,
        app: HttpApp,
        addresses: list[Address],
        options: Options,
        limits: Limits,
        *,
        share_port: bool,
        secrets: Secrets | None,
    ) -> tuple[int, ...]:
        """Open a listener whose requests `app` answers, on this loop; returns the ports of the addresses that have one.

        Raises:
            ConfigError: Envoy refuses it, as it does if an address is in use; says why.
        """
        hosted = sys.modules["dl_inference_envoy_transport.hosted"]
        setattr(hosted, name, app)
        self.pace.longest_s = options.longest_pause_us / 1e6
        self._listeners[name] = configuration.listener(
            name,
            addresses,
            self.module,
            f"{hosted.__name__}:{name}",
            options,
            limits,
            share_port=share_port,
            secrets=secrets,
        )
        self._write_listeners()
        try:
            ports = await self._applied_listener(name)
        except BaseException:
            del self._listeners[name]
            self._write_listeners()
            raise
        finally:
            delattr(hosted, name)  # pyvoy has looked it up
        return ports

    async def close_listener(self, name: str) -> None:
        """Take no more connections; those that are there are told to go away with their next answer."""
        if self._listeners.pop(name, None) is None:
            return
        self._write_listeners()
        async with asyncio.timeout(_APPLIED_WITHIN_S):
            while name in await self._listening():  # noqa: ASYNC110 - Envoy tells nobody
                await asyncio.sleep(_POLL_S)

    async def open_calls(self, name: str) -> int:
        """The calls on a listener that Envoy has not sent the whole answer of; 0 if it does not tell."""
        with contextlib.suppress(OSError, ValueError):
            _, body = await self._admin(f"/stats?filter=^http.{name}.downstream_rq_active$")
            return int(body.partition(b":")[2] or 0)
        return 0

    def add_cluster(self, document: Document) -> None:
        """A cluster under its name; it can be called a few milliseconds later."""
        self._clusters[document["name"]] = document
        self._write_clusters_soon()

    def remove_cluster(self, name: str) -> None:
        """Forget a cluster, and close its connections."""
        self._clusters.pop(name, None)
        self._write_clusters_soon()

    def _write_clusters_soon(self) -> None:
        if self._writing is None:
            self._writing = asyncio.get_running_loop().call_soon(self._write_clusters)

    def _write_clusters(self) -> None:
        self._writing = None
        configuration.written(self.folder / configuration.CLUSTERS, list(self._clusters.values()), self.new_version())

    def _write_listeners(self) -> None:
        configuration.written(self.folder / configuration.LISTENERS, list(self._listeners.values()), self.new_version())

    async def _applied_listener(self, name: str) -> tuple[int, ...]:
        end = time.monotonic() + _APPLIED_WITHIN_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                _, body = await self._admin(f"/config_dump?resource=dynamic_listeners&name_regex=^{name}$")
                for entry in json.loads(body).get("configs", ()):
                    if "error_state" in entry:
                        details: str = entry["error_state"].get("details", "")
                        raise ConfigError(details.partition("\n")[0] or "Envoy refuses the listener")
                addresses = (await self._listening()).get(name)
                if addresses is not None:
                    return addresses
            await asyncio.sleep(_POLL_S)
        raise ConfigError(f"Envoy has not opened the listener after {_APPLIED_WITHIN_S:.0f} s")

    async def _listening(self) -> dict[str, tuple[int, ...]]:
        """The ports of each listener."""
        _, body = await self._admin("/listeners?format=json")
        return {
            entry["name"]: tuple(
                address["socket_address"]["port_value"]
                for address in (entry["local_address"], *entry.get("additional_local_addresses", ()))
                if "socket_address" in address
            )
            for entry in json.loads(body).get("listener_statuses", ())
        }

    async def _admin(self, path: str) -> tuple[int, bytes]:
        """The status and body of Envoy's own answer."""
        return await asyncio.to_thread(_unix_get, self.folder / configuration.ADMIN, path, timeout_s=5.0)


def _unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # pyvoy sets a result on whatever was waited for when a call ends, also if the waiting had been cancelled.
    if not isinstance(context.get("exception"), asyncio.InvalidStateError):
        loop.default_exception_handler(context)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _unix_get(socket_path: Path, path: str, *, timeout_s: float | None) -> tuple[int, bytes]:
    connection = _UnixConnection(socket_path, timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
