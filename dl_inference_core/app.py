"""The only place that builds things: config + plugins → models, gateway, dispatcher, server; and takes them down."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dl_inference_core import admin, asgi, sockets
from dl_inference_core import config as configs
from dl_inference_core.api import Apis
from dl_inference_core.children import OwnSockets
from dl_inference_core.config import ClientTls, Config, NodeConfig, RouteConfig, resolved
from dl_inference_core.coroutines import UnaryHandler
from dl_inference_core.cpus import affinity_cores, cores
from dl_inference_core.dispatcher import Dispatcher
from dl_inference_core.errors import ConfigError
from dl_inference_core.gateway.balancing import Balancer
from dl_inference_core.gateway.clock import SystemClock
from dl_inference_core.gateway.reloading import Gateway
from dl_inference_core.gateway.sharing import Share
from dl_inference_core.http_server import HttpLimits, HttpServer
from dl_inference_core.introspection import Introspection, Readiness
from dl_inference_core.joining import Joining
from dl_inference_core.metrics import Metrics
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.rest.answering import Local, Rest
from dl_inference_core.routing import Routes
from dl_inference_core.transport import Connection, Http, HttpApp, Limits, Server, Transport, room_for
from dl_inference_core.wire import codecs
from dl_inference_core.wire.protocol import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.routing import BaseRoute

    from dl_inference_core.node.backend import Backend, Signature
    from dl_inference_core.node.repository import Repository

_log = logging.getLogger(__name__)

_READY_POLL_S = 0.05
_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - what a host may be, not one that is listened on
_SAY_UNREADY_AFTER_S = 2.0
_HTTP_SHARE = 4
"""The share of all connections that `http_port` gets if not all fit, as a divisor: most clients speak gRPC."""


class App:
    """One serving process. Everything on one event loop."""

    def __init__(
        self, config: Config, plugins: Plugins, *, config_file: Path | None = None, share: Share | None = None
    ) -> None:
        """Args:
        config_file: where the config came from, to be watched for changed routes.
        share: to the other workers, if there are any.

        Raises:
            ConfigError, PluginError: the config names what is not there, or nothing to serve.
        """
        # A handler may change the current folder, and files are looked at for as long as the process runs.
        self._config = config = resolved(config)
        config_file = config_file.absolute() if config_file is not None else None
        self._config_file = config_file
        self._plugins = plugins
        self.metrics = Metrics()
        # "auto" was resolved by whoever started this process, if that took anything to start it.
        name = config.transport if config.transport != "auto" else "grpcio"
        self.transport: Transport = plugins.make(Kind.TRANSPORTS, name, config.transport_options, "transport")
        self._limits = Limits(
            message_bytes=config.message_bytes, connections=config.connections, streams=config.streams
        )
        self._begun = False
        self._ports: set[int] = set()
        self._peer_ports: set[int] = set()
        self.repository: Repository | None = None
        self._backend_options: dict[str, dict[str, Any]] = {}
        self.codecs = plugins.choose_codecs(config.codec)
        """The name of the set of codecs in use, and why."""
        codecs.use(plugins.make(Kind.CODECS, self.codecs[0], {}, "codec"))
        folder = config_file.parent if config_file is not None else Path()
        self._apis = Apis(plugins, config, folder)
        for problem in plugins.broken:
            _log.error("%s; what it would have added to this server is missing", problem)
        if self._apis.serves_models:
            self.repository = repository = self._build_repository(folder)
            self.metrics.sample(
                "dl_inference_queue",
                "Requests that wait for a thread of a model.",
                ("model",),
                lambda: {(name,): model.waiting() for name, model in repository.models.items()},
            )
        self.metrics.sample_counts(
            "dl_inference_refusals",
            "Connections and requests of clients that a limit of a port refused or ended, by port (grpc or http) and "
            "reason.",
            ("port", "reason"),
            self._refusals,
        )
        self.gateway: Gateway | None = None
        if config.routes or config.gateway.nodefile is not None or config.gateway.registry is not None:
            self.gateway = Gateway(
                config,
                config_file,
                connect=self._connect,
                clock=SystemClock(self.transport),
                balancer=self._build_balancer,
                metrics=self.metrics,
                share=share,
            )
        if self.repository is None and self.gateway is None:
            raise ConfigError("nothing to serve: give a folder of models, or models by name, or routes, or a node file")
        if self.gateway is None and config_file is not None:
            self._written = configs.load(config_file)
            """What it said at the start, without the command line."""
        self._joining = self._build_joining()
        self._readiness = Readiness()
        self._awaiting: asyncio.Task[None] | None = None
        self._server: Server | None = None
        self._http_server: HttpServer | None = None

    def _build_repository(self, folder: Path) -> Repository:
        """Args:
        folder: what relative paths in the options of backends are taken from.
        """
        from dl_inference_core.node.backend import on_demand
        from dl_inference_core.node.load import LoadMeter
        from dl_inference_core.node.repository import Repository

        for name, options in self._config.backends.items():
            made = self._plugins.options(Kind.BACKENDS, name, options, f"[backends.{name}]", folder)
            self._backend_options[name] = made.model_dump(exclude_unset=True)
        backends = {
            name: on_demand(cls, partial(self._make_backend, name))
            for name, cls in self._plugins.classes(Kind.BACKENDS).items()
        }
        return Repository(
            self._config.models.directory,
            named=self._apis.name_models(),
            backends=backends,
            handlers=self._plugins.classes(Kind.HANDLERS),
            defaults=self._config.models.defaults,
            recorded=self._apis.recorded,
            poll_interval_s=self._config.models.poll_interval_ms / 1000,
            load_timeout_s=self._config.models.load_timeout_s,
            meter=LoadMeter(self._config.models.load_reports_per_s),
            metrics=self.metrics,
        )

    def _make_backend(self, name: str) -> Backend:
        """Runs on the thread that loads a model.

        Raises:
            ConfigError, PluginError: it cannot be made.
        """
        options = self._backend_options.get(name, {})
        backend: Backend = self._plugins.make(Kind.BACKENDS, name, options, f"[backends.{name}]")
        # Frameworks see the cores, but neither the other workers nor a quota.
        if self._config.workers > 1 or cores() < affinity_cores():
            backend.cores = max(1, cores() // self._config.workers)
        return backend

    def _build_joining(self) -> Joining | None:
        join, repository, host = self._config.join, self.repository, self._config.host
        if join is None:
            return None
        if repository is None:
            raise ConfigError("join: there are no models to register with a gateway")
        if join.advertise is None and host.strip("[]") in _EVERYWHERE:
            raise ConfigError(f"join: with host {host} gateways must be told where to reach this node: give advertise")
        if join.advertise is None and _is_loopback(host):
            far = next((gateway for gateway in join.gateways if not _is_loopback(gateway.rpartition(":")[0])), None)
            if far is not None:
                raise ConfigError(
                    f"join: gateway {far} cannot reach this node at host {host}: give a host that it can, or advertise"
                )
        return Joining(
            join,
            lambda address: self._connect_to(address, join.tls),
            lambda: {name: model.task_id for name, model in repository.models.items() if model.ready},
        )

    def _connect(self, node: NodeConfig) -> Connection:
        tls = self._config.gateway.tls
        if tls is not None and node.server_name is not None:
            tls = tls.model_copy(update={"server_name": node.server_name})
        return self._connect_to(node.address, tls)

    def _connect_to(self, address: str, tls: ClientTls | None) -> Connection:
        if sockets.path_of(address) is None:
            self._peer_ports.add(_port_of(address))
        return self.transport.connect(address, self._limits, tls)

    def _build_balancer(self, route: RouteConfig) -> Balancer:
        name = route.balancer
        if name is None:
            preferred = "dynamic_weighted_round_robin"
            name = preferred if preferred in self._plugins.classes(Kind.BALANCERS) else "round_robin"
        balancer: Balancer = self._plugins.make(
            Kind.BALANCERS, name, route.balancer_options, f"route {route.key}: balancer"
        )
        return balancer

    @property
    def http_port(self) -> int | None:
        """The port of its own that HTTP is answered on; None is none."""
        return None if self._http_server is None else self._http_server.port

    def own_sockets(self, *paths: Path) -> OwnSockets:
        """Which sockets of this process are the service's. Any thread.

        Args:
            paths: of Unix-domain sockets beside those that this app has made, or folders of them.
        """
        path = self._config.socket_path
        own = (path,) if path is not None else ()
        return OwnSockets(ports=self._ports, peer_ports=self._peer_ports, paths=(*own, *paths))

    async def load(self) -> None:
        """Build the routes and load the models, without serving. Returns when every model has loaded, failed or passed
        its load timeout.

        Raises:
            ConfigError, PluginError: what is configured cannot be.
        """
        self._services()
        await self._begin()
        await self._loaded()

    async def _loaded(self) -> None:
        if self.repository is not None:
            await self.repository.loaded()

    async def _begin(self) -> None:
        """Find the models, begin to load them, and build the routes.

        Raises:
            ConfigError, PluginError: what is configured cannot be.
        """
        if self.repository is not None:
            await self.repository.begin()
            self._apis.start(self.repository)
        if self.gateway is not None:
            if self._config.gateway.tls is not None:
                self.transport.prepare(self._config.gateway.tls)
            await self.gateway.start()
        self._begun = True

    def describe(self) -> list[dict[str, Any]]:
        """What `load` came to: for each version of a model, each node of a route and each route without nodes its kind,
        name, whether it is ok, and a detail."""
        from dl_inference_core.node.model import State

        rows: list[dict[str, Any]] = []
        if self.repository is not None and self.repository.misplaced:
            folder = str(self._config.models.directory)
            rows.append({"kind": "folder", "name": folder, "ok": False, "detail": self.repository.misplaced})
        for model in self.repository.models.values() if self.repository is not None else ():
            for number, status in sorted(model.versions.items()):
                detail = status.error or status.state.value
                if status.state is State.AVAILABLE and not status.error:
                    detail = f"{model.platform(number)}, inputs: {_inputs(model.signature(number))}"
                rows.append(
                    {"kind": "model", "name": f"{model.name}/{number}", "ok": not status.error, "detail": detail}
                )
            if not model.versions:
                rows.append({"kind": "model", "name": model.name, "ok": False, "detail": "it has no versions"})
            if labels := model.describe_labels():
                rows.append({"kind": "model", "name": model.name, "ok": False, "detail": labels})
        for forwarder in self.gateway.forwarders if self.gateway is not None else ():
            if not forwarder.pool.nodes:
                detail = "none of its names could be looked up, so it has no nodes"
                rows.append({"kind": "route", "name": forwarder.name, "ok": False, "detail": detail})
            for node in forwarder.pool.nodes:
                ok = node.endpoint.health.usable
                rows.append(
                    {
                        "kind": "node",
                        "name": node.address,
                        "ok": ok,
                        "detail": f"route {forwarder.name}: {'answers' if ok else 'does not answer'}",
                    }
                )
        return rows

    async def serve(
        self, *addresses: str, share_port: bool = False, listen_when_loaded: bool = False
    ) -> tuple[int, ...]:
        """Listen, load the models, and return the ports once every model has loaded, failed or passed its load timeout
        and a request for some model would succeed. While models load, each that has loaded already answers requests,
        and health says NOT_SERVING.

        Args:
            addresses: "host:port"; by default the config's. Its socket is listened on in any case.
            share_port: whether other processes listen on the same ports.
            listen_when_loaded: whether to listen only after the models have loaded, as other processes answer on the
                same port meanwhile. HTTP is answered from the start in any case.

        Raises:
            ConfigError, PluginError: as `load`; or an address cannot be listened on.
        """
        routes, dispatcher, http = self._services()
        limits, http_limits = self._with_room()
        if self._config.http_port is not None:
            # Who asks for certificates does not answer the same questions without them.
            app = self._http() if self._config.tls else asgi.with_exchanges(http)
            try:
                self._http_server = await HttpServer.start(app, self._config.host, self._config.http_port, http_limits)
            except OSError as error:
                raise ConfigError(f"http_port {self._config.http_port}: {error.strerror or error}") from error
            self._ports.add(self._http_server.port)
        addresses = addresses or (f"{self._config.host}:{self._config.port}",)
        # Not 0, which is any free port: a handler's own socket has it until it is connected.
        self._ports.update(port for port in map(_port_of, addresses) if port)
        await self._begin()
        if listen_when_loaded:
            await self._loaded()
        path = self._config.socket_path
        self._server = await self.transport.serve(
            dispatcher,
            (*addresses, *((f"{sockets.PREFIX}{path}",) if path is not None else ())),
            limits,
            share_port=share_port,
            tls=self._config.tls,
            http=http,
        )
        self._ports.update(self._server.ports)
        if self.gateway is not None and self.gateway.registry is not None:
            self.gateway.registry.own = self._own_addresses(self._server.ports)
        self._readiness.upstreams = lambda: routes.ready or self._awaits_config
        ready = self._until_ready()
        if self._awaits_nodes:
            self._awaiting = asyncio.create_task(ready, name="wait for nodes")
        else:
            await ready
        if self._joining is not None:
            join = self._config.join
            assert join is not None
            self._joining.start(join.advertise or f"{self._config.host}:{self._server.ports[-1]}")
        return self._server.ports

    async def reload(self) -> None:
        """Look at once for new and changed models, routes and nodes, whatever the intervals between two looks are. What
        cannot be taken over is logged, and changes nothing. Certificates need no reload: they are looked at twice a
        second. Before the first look there is nothing to reload."""
        if not self._begun:
            return
        _log.info("looking for changed models, routes and nodes")
        if self.gateway is not None:
            self.gateway.reload()
        elif self._config_file is not None:
            self._compare(self._config_file)
        await self._apis.reload()
        if self.repository is not None:
            await self.repository.reload()

    def _compare(self, file: Path) -> None:
        """Say what of the config file needs a start; a gateway does so itself."""
        try:
            written = configs.load(file)
        except ConfigError as error:
            _log.warning("reload failed, everything stays as it is: %s", error)
            return
        if changed := configs.differences(self._written, written):
            _log.warning("%s: %s: changes take effect at the next start", file, ", ".join(changed))

    def _own_addresses(self, ports: Sequence[int]) -> frozenset[str]:
        """Where this process itself is reached, as far as it knows."""
        host = self._config.host
        everywhere = host.strip("[]") in _EVERYWHERE
        hosts = ("127.0.0.1", "[::1]", "localhost") if everywhere else (host,)
        return frozenset(f"{host}:{port}" for host in hosts for port in ports)

    def _refusals(self) -> dict[tuple[str, ...], float]:
        counts: dict[tuple[str, ...], float] = {("grpc", why): n for why, n in self.transport.refusals().items()}
        if self._http_server is not None:
            counts |= {("http", why): n for why, n in self._http_server.refusals.items()}
        return counts

    def _with_room(self) -> tuple[Limits, HttpLimits]:
        """The limits of the gRPC port and of `http_port`, with no more connections than this process can have."""
        config = self._config
        http = config.http_max_connections if config.http_port is not None else 0
        room, wanted = room_for(config.connections and config.connections + http), config.connections + http
        http_room = http
        if not config.connections or room < wanted:
            http_room = min(http, max(1, room // _HTTP_SHARE))
        if config.connections and room < wanted:
            _log.warning(
                "the limit on open files (ulimit -n) leaves room for %d connections of clients%s, not %d",
                *(room, f", {http_room} of them to http_port" if http else "", wanted),
            )
        limits = HttpLimits(
            connections=http_room,
            headers_s=config.http_headers_timeout_s,
            body_s=config.http_body_timeout_s,
            idle_s=config.http_idle_timeout_s,
        )
        return replace(self._limits, connections=min(config.connections or room, max(1, room - http_room))), limits

    def _services(self) -> tuple[Routes, Dispatcher, Http]:
        """What answers gRPC and HTTP.

        Raises:
            PluginError: APIs fail, or clash.
        """
        routes = Routes(*(table for table in (self.repository, self.gateway) if table is not None))
        dispatcher = self._dispatcher(routes)
        pages = self._apis.pages(self._readiness, (self._config.metrics_path, admin.LIVE, admin.READY))
        return routes, dispatcher, Http(service=self._rest(dispatcher), app=self._http(*pages))

    def _dispatcher(self, routes: Routes) -> Dispatcher:
        waiting: dict[str, UnaryHandler] = {}
        if self.gateway is not None and self.gateway.registry is not None:
            waiting |= self.gateway.registry.methods()
        introspection = Introspection(routes, self._readiness)
        own = (*METHODS, *waiting, *introspection.unary(), *introspection.streaming())
        protocols, further = self._apis.methods(own)
        introspection = Introspection(routes, self._readiness, (*METHODS, *protocols, *further))
        return Dispatcher(
            routes,
            self.metrics,
            most_in_flight=self._config.in_flight,
            openinference_as_requested=self._config.models.openinference_outputs == "as_requested",
            protocols={**METHODS, **protocols},
            unary=introspection.unary(),
            waiting={**waiting, **further},
            streaming=introspection.streaming(),
        )

    def _rest(self, dispatcher: Dispatcher) -> Rest:
        timeout_ms, cors = self._config.rest_timeout_ms, self._config.rest_cors
        local = Local(self.repository, self.gateway, self._readiness)
        return Rest(
            *self._apis.rest(local, dispatcher, cors=cors),
            body_bytes=self._config.rest_bytes,
            timeout_s=timeout_ms / 1000 if timeout_ms else None,
        )

    def _http(self, *beside: BaseRoute) -> HttpApp:
        return admin.app(self.metrics, self._readiness, *beside, metrics_path=self._config.metrics_path)

    async def _until_ready(self) -> None:
        await self._loaded()
        loop = asyncio.get_running_loop()
        said = loop.time() + _SAY_UNREADY_AFTER_S
        while not self._readiness.upstreams():
            if loop.time() >= said:
                said = float("inf")
                why = []
                if self.repository is not None:
                    why.append("no model could be loaded, and a model is tried again only when its files change")
                if self.gateway is not None:
                    why.append("no node of any route answers")
                _log.warning("not serving yet: %s", "; ".join(why))
            await asyncio.sleep(_READY_POLL_S)
        self._readiness.serving = True

    @property
    def _awaits_config(self) -> bool:
        """Whether there is no model because a client has yet to say which."""
        has_folder = self._config.models.directory is not None
        return self.repository is not None and not has_folder and self._apis.awaits_models

    @property
    def _awaits_nodes(self) -> bool:
        """Whether there is nothing to serve because no node has registered itself yet."""
        if self.repository is not None or self.gateway is None or self.gateway.registry is None:
            return False
        return not self.gateway.forwarders

    async def close(self) -> None:
        """Say NOT_SERVING for `drain_delay_s` seconds, let requests in flight finish for at most `drain_s`, and take
        everything down."""
        if self._awaiting is not None:
            self._awaiting.cancel()
            await asyncio.gather(self._awaiting, return_exceptions=True)
        was_serving, self._readiness.serving = self._readiness.serving, False
        self._readiness.leaving = True
        if self._joining is not None:
            await self._joining.leave()
        if was_serving:
            await asyncio.sleep(self._config.drain_delay_s)
        self._readiness.ending.set()
        if self._server is not None:
            await self._server.drain(self._config.drain_s)
        if self.gateway is not None:
            await self.gateway.close()
        await self._apis.close()
        if self.repository is not None:
            await self.repository.close()
        if self._http_server is not None:
            await self._http_server.close()


def _port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def _inputs(signature: Signature) -> str:
    return ", ".join(map(str, signature.inputs)) or "any"
