"""The routes to other nodes, kept as the config file, the node file, names and nodes themselves say, as it changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import uuid
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from pathlib import Path

from dl_inference_core import config as configs
from dl_inference_core import nodefile
from dl_inference_core.config import Config, NodeConfig, RouteConfig
from dl_inference_core.errors import ConfigError, InferenceError
from dl_inference_core.files import FileWatcher
from dl_inference_core.gateway import discovery
from dl_inference_core.gateway.balancing import Balancer
from dl_inference_core.gateway.clock import Clock
from dl_inference_core.gateway.discovery import Names, Resolve
from dl_inference_core.gateway.forwarding import Forwarder
from dl_inference_core.gateway.pool import Endpoints, Node, Pool
from dl_inference_core.gateway.registry import Registry
from dl_inference_core.gateway.sharing import Share, StateSync
from dl_inference_core.metrics import Metrics
from dl_inference_core.transport import Connection

_log = logging.getLogger(__name__)

# A node file whose last line has no end is taken once it has stayed the same for this long.
_PATIENCE_S = 2.0
# Between the two looks of a reload: a file that is being written changes within it.
_AGAIN_S = 0.25


class Gateway:
    """Every route to other nodes. Event loop only.

    A reload is all or nothing: the new routes are built and checked first, then swapped in; nodes that stay keep their
    connection, health and weight, and those that leave end their requests first.
    """

    def __init__(
        self,
        config: Config,
        config_file: Path | None,
        *,
        connect: Callable[[NodeConfig], Connection],
        clock: Clock,
        balancer: Callable[[RouteConfig], Balancer],
        metrics: Metrics,
        share: Share | None = None,
        resolve: Resolve = discovery.resolve,
    ) -> None:
        """Args:
        config: with what the command line said, if anything, already in it.
        config_file: where it came from, to be watched; None if from nowhere.
        connect: makes the connection to a node.
        clock: of the routes.
        balancer: makes a route's strategy; raises PluginError or ConfigError.
        share: to the other gateway processes, if there are any.
        resolve: looks up names that stand for nodes.

        Raises:
            ConfigError: the registry's token cannot be read.
        """
        self._config = config
        self._poll_s = config.gateway.poll_interval_ms / 1000
        patience = math.ceil(_PATIENCE_S / self._poll_s)
        self._config_file: FileWatcher | None = None
        if config_file is not None:
            self._config_file = FileWatcher(config_file, patience=patience)
        self._written = config
        """What the config file said at the start, without the command line."""
        self._nodefile: FileWatcher | None = None
        self._from_nodefile: Mapping[int | str, RouteConfig] = {}
        if config.gateway.nodefile is not None:
            self._nodefile = FileWatcher(config.gateway.nodefile, patience=patience)
        self._make_balancer = balancer
        self._clock = clock
        self._id = uuid.uuid4().hex[:16] if share is None else share.gateway_id
        self._metrics = metrics
        self._endpoints = Endpoints(connect, config.gateway.health, metrics, clock)
        self.forwarders: Collection[Forwarder] = ()
        """Every route's, once."""
        metrics.sample(
            "dl_inference_attempts_in_flight",
            "Attempts at nodes that are under way.",
            ("route",),
            lambda: {(forwarder.name,): forwarder.in_flight for forwarder in self.forwarders},
        )
        metrics.sample(
            "dl_inference_queued",
            "Requests that wait for a node of their route to have room.",
            ("route",),
            lambda: {(forwarder.name,): forwarder.queued for forwarder in self.forwarders},
        )
        self._retiring: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._asked = asyncio.Event()
        self._refreshing: asyncio.Handle | None = None
        self._complained: dict[str, str] = {}
        self._state_sync = None if share is None else StateSync(share, self._endpoints, lambda: self.forwarders)
        self.models: dict[str, Forwarder] = {}
        self.tasks: dict[int, Forwarder] = {}
        self._said: Mapping[str | int, RouteConfig] = {}
        """The routes as the files say."""
        self._whole: Mapping[str | int, RouteConfig] = {}
        """The same, with the nodes that have registered themselves."""
        self._named: Sequence[str | int] = ()
        """Those with nodes that a name stands for."""
        tls = config.gateway.tls
        self._names = Names(
            resolve,
            config.gateway.resolve_interval_ms / 1000,
            verified=tls is not None and tls.server_name is None,
            usable=self._usable,
            changed=self._refresh_soon,
            complain=self._complain,
        )
        self.registry: Registry | None = None
        if config.gateway.registry is not None:
            self.registry = Registry(config.gateway.registry, self._refresh_soon, self._complain)
            if share is not None:
                self.registry.share(share)

    async def start(self) -> None:
        """Build the routes, ask every node how it is, and watch the files from now on.

        Raises:
            ConfigError, PluginError: the routes cannot be built.
        """
        if self._config_file is not None:
            self._written = configs.parse(self._config_file.read(), self._config_file.path)
            self._config = self._config.model_copy(update={"routes": self._written.routes})
        if self._nodefile is not None:
            parsed = nodefile.parse(self._nodefile.read())
            if parsed.problems and not parsed.routes:
                raise ConfigError(f"{self._nodefile.path}: {'; '.join(parsed.problems[:3])}")
            self._take_nodefile(parsed, self._nodefile.path)
        wanted = self._wanted(self._config.routes, self._from_nodefile)
        await self._names.start(wanted.values())
        self._apply(wanted)
        if self._state_sync is not None:
            self._state_sync.start()
        if self.registry is not None:
            self._make_balancer(self.registry.example)
            await self.registry.learn()
            self._refresh()
        await self._endpoints.probed()
        if self._config_file is not None or self._nodefile is not None:
            self._watching = asyncio.create_task(self._watch(), name="watch the config files")

    async def close(self) -> None:
        """Stop watching, and close every connection once its requests have ended."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._names.close()
        if self.registry is not None:
            self.registry.close()
        self._refreshed()
        if self._state_sync is not None:
            self._state_sync.close()
        await asyncio.gather(*(forwarder.close() for forwarder in self.forwarders), *self._retiring)

    def _wanted(
        self, routes: Sequence[RouteConfig], others: Mapping[int | str, RouteConfig]
    ) -> dict[str | int, RouteConfig]:
        wanted: dict[str | int, RouteConfig] = {route.key: route for route in routes}
        taken = {route.task_id for route in routes} | set(wanted)
        wanted |= {key: route for key, route in others.items() if key not in taken}
        twice = ", ".join(str(key) for key in others if key in taken)
        self._complain("conflict", twice and f"the config and the node file both have {twice}; the config counts")
        return wanted

    def _apply(self, wanted: Mapping[str | int, RouteConfig]) -> None:
        """Args:
            wanted: the routes as the files say.

        Raises:
            ConfigError, PluginError: and nothing has changed.
        """
        said, whole = wanted, self._with_registered(wanted)
        self._names.want(whole.values())
        wanted = {key: self._names.expand(route) for key, route in whole.items()}
        kept = self._kept(wanted)
        balancers = {key: self._balancer(kept.get(key), route) for key, route in wanted.items()}
        gone: list[tuple[Pool, Node]] = []
        forwarders: dict[str | int, Forwarder] = {}
        for key, route in wanted.items():
            forwarder = kept.get(key)
            if forwarder is None:
                forwarder = Forwarder(
                    route, Pool(self._endpoints), balancers[key], self._metrics, self._clock, self._id
                )
            elif forwarder.config != route:
                gone += [(forwarder.pool, node) for node in forwarder.configure(route, balancers[key])]
            forwarders[key] = forwarder
        for forwarder in set(self.forwarders).difference(kept.values()):
            self._retire(self._end(forwarder))
        for pool, node in gone:
            self._retire(pool.retire(node))
        self.forwarders = tuple(forwarders.values())
        self.models = {route.name: forwarders[key] for key, route in wanted.items() if route.name}
        self.tasks = {route.task_id: forwarders[key] for key, route in wanted.items() if route.task_id is not None}
        self._names.want_only(whole.values())
        self._said, self._whole = said, whole
        self._named = [key for key, route in whole.items() if self._names.within(route)]

    def _with_registered(self, routes: Mapping[str | int, RouteConfig]) -> Mapping[str | int, RouteConfig]:
        return routes if self.registry is None else self.registry.onto(routes)

    def _kept(self, wanted: Mapping[str | int, RouteConfig]) -> dict[str | int, Forwarder]:
        """Which of the wanted routes is there already: one of the same name, or else of the same task id."""
        kept: dict[str | int, Forwarder] = {}
        free = set(self.forwarders)
        for key, route in wanted.items():
            if (forwarder := self.models.get(route.name)) is not None:
                kept[key] = forwarder
                free.discard(forwarder)
        for key, route in wanted.items():
            if key in kept or route.task_id is None:
                continue
            forwarder = self.tasks.get(route.task_id)
            if forwarder in free:
                kept[key] = forwarder
                free.discard(forwarder)
        return kept

    def _balancer(self, forwarder: Forwarder | None, route: RouteConfig) -> Balancer:
        """The strategy that serves the route already, with all it has learned, unless the config wants another."""
        if forwarder is not None and (forwarder.config.balancer, forwarder.config.balancer_options) == (
            route.balancer,
            route.balancer_options,
        ):
            return forwarder.balancer
        return self._make_balancer(route)

    def _retire(self, ending: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(ending)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _end(self, forwarder: Forwarder) -> None:
        """Let its requests end, and forget what was counted of them, unless there is a route of that name again."""
        await forwarder.close()
        if all(other.name != forwarder.name for other in self.forwarders):
            self._metrics.route_gone(forwarder.name)

    def _refresh_soon(self) -> None:
        """Once for all that changes until then."""
        if self._refreshing is None:
            self._refreshing = asyncio.get_running_loop().call_soon(self._refresh)

    def _refreshed(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            self._refreshing = None

    def _refresh(self) -> None:
        """Take over what has changed of the nodes that routes have by name, and of those that register themselves."""
        self._refreshed()
        try:
            self._take_over()
        except Exception:
            _log.exception("nodes have come or gone, and that cannot be taken over; the routes stay as they are")

    def _take_over(self) -> None:
        before, whole = self._whole, self._with_registered(self._said)
        changed = [key for key, route in whole.items() if route is not before.get(key)]
        if len(whole) != len(before) or any(
            key not in before or whole[key].task_id != before[key].task_id for key in changed
        ):
            self._apply(self._said)
            return
        for key in {*changed, *self._named}:
            route = self._names.expand(whole[key])
            forwarder = self.models[key] if isinstance(key, str) else self.tasks[key]
            if forwarder.config != route:
                for node in forwarder.configure(route, forwarder.balancer):
                    self._retire(forwarder.pool.retire(node))
        self._whole = whole

    def _usable(self, node: NodeConfig) -> bool:
        endpoint = self._endpoints.find(node.target)
        return endpoint is None or endpoint.health.usable

    def reload(self) -> None:
        """Look at the files at once, and again a moment later, when what has changed counts."""
        self._asked.set()

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._asked.wait()
            asked = self._asked.is_set()
            self._asked.clear()
            await self._look_or_complain()
            if asked:
                await asyncio.sleep(min(self._poll_s, _AGAIN_S))
                await self._look_or_complain()

    async def _look_or_complain(self) -> None:
        try:
            await self._look()
        except Exception:
            _log.exception("looking at the config files failed; the routes stay as they are")

    async def _look(self) -> None:
        if self._nodefile is not None and (content := await self._content(self._nodefile, "node file")) is not None:
            self._take_nodefile(await asyncio.to_thread(nodefile.parse, content), self._nodefile.path)
            self._apply(self._wanted(self._config.routes, self._from_nodefile))
        if self._config_file is not None and (content := await self._content(self._config_file, "config")) is not None:
            self._take_config(content, self._config_file.path)

    async def _content(self, file: FileWatcher, what: str) -> bytes | None:
        content = await asyncio.to_thread(file.look)
        self._complain(f"{what} unreadable", file.complaint and f"{file.complaint}; the routes stay as they are")
        return content

    def _take_config(self, content: bytes, path: Path) -> None:
        try:
            written = configs.parse(content, path)
            self._apply(self._wanted(written.routes, self._from_nodefile))
        except InferenceError as error:
            self._complain("config", f"reload failed, the routes stay as they are: {error}")
            return
        self._complain("config", "")
        changed = [name for name in configs.differences(self._written, written) if name != "routes"]
        what = ", ".join(changed)
        self._complain("restart", what and f"{path}: {what}: changes take effect at the next start")
        # What the command line said, and what only a start can change, stays.
        self._config = self._config.model_copy(update={"routes": written.routes})

    def _take_nodefile(self, parsed: nodefile.NodeFile, path: Path) -> None:
        self._from_nodefile = parsed.onto(self._from_nodefile)
        shown = "; ".join(parsed.problems[:5])
        more = f"; and {len(parsed.problems) - 5} more" if len(parsed.problems) > 5 else ""
        self._complain("node file", shown and f"{path}: {shown}{more}")

    def _complain(self, about: str, message: str) -> None:
        """Log `message`, if any, unless it was the last word on that matter already."""
        if not message:
            self._complained.pop(about, None)
        elif message != self._complained.get(about):
            _log.warning("%s", message)
            self._complained[about] = message
