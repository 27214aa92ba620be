"""Nodes that register themselves, by `protos/registry.proto`: each says where it is and what it serves, for as long as
its lease lasts.

Several processes of one node share an address, and each has a lease of its own: a model can be asked for there while
all of them have it, and the node is gone with the last. Of several processes of the gateway one hears of a
registration, and tells the others.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dl_inference_core.config import NodeConfig, RegistryConfig, RouteConfig, read_token
from dl_inference_core.coroutines import UnaryHandler
from dl_inference_core.errors import BadRequest, InferenceError, Overloaded, Unauthenticated
from dl_inference_core.gateway.discovery import Complain
from dl_inference_core.gateway.sharing import Share
from dl_inference_core.transport import Exchange
from dl_inference_core.wire import messages

_TOPIC = "registrations"
# In base 64 it must fit into one message between processes.
_LARGEST = 20_000
_NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,255}")
_INSTANCE = re.compile(r"[\x21-\x7e]{0,64}")
_SHORTEST_LEASE_MS = 100
_LEARN_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Registration:
    """What one process of a node has said.

    Attributes:
        models: the task id of each by its name.
        request: the RegisterRequest's bytes.
    """

    node: NodeConfig
    instance: str
    models: Mapping[str, int | None]
    request: bytes


@dataclass(slots=True, kw_only=True)
class _Lease:
    registration: _Registration
    ends: float
    timer: asyncio.TimerHandle


@dataclass(slots=True)
class _Model:
    """Who serves one model.

    Attributes:
        nodes: by their addresses.
        tasks: the task id that each of them says, if it says one.
        route: for it alone; None if it has yet to be made.
    """

    nodes: dict[str, NodeConfig] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    route: RouteConfig | None = None

    @property
    def task(self) -> int | None:
        return min(self.tasks.values(), default=None)


class Registry:
    """The nodes that have registered themselves. Event loop only.

    Attributes:
        own: addresses of this gateway, which are refused: it would forward requests to itself.
    """

    def __init__(self, config: RegistryConfig, changed: Callable[[], None], complain: Complain) -> None:
        """Args:
        changed: called when `onto` would come to something else.

        Raises:
            ConfigError: the token's file cannot be used.
        """
        self._config = config
        self._token = read_token(config.token_file).encode()
        self._changed = changed
        self._complain = complain
        self._settings = {name: getattr(config.route, name) for name in type(config.route).model_fields}
        self._leases: dict[str, dict[str, _Lease]] = {}
        """By address and instance."""
        self._registered = self._registered_models = 0
        self._models: dict[str, _Model] = {}
        self._share: Share | None = None
        self._learning = False
        self._told = asyncio.Event()
        """Set once this process knows all that the others do."""
        self._as_new: set[str] = set()
        """The others that do not know all either, by their ids."""
        self._id = uuid.uuid4().hex
        self.own: frozenset[str] = frozenset()

    @property
    def example(self) -> RouteConfig:
        """A route as it makes them, without nodes."""
        return RouteConfig.model_construct(name="[gateway.registry.route]", nodes=(), **self._settings)

    def methods(self) -> Mapping[str, UnaryHandler]:
        """What answers an exchange of each method, by path, on the event loop; raises InferenceError."""
        return {
            f"{messages.REGISTRY}/Register": self._register,
            f"{messages.REGISTRY}/Deregister": self._deregister,
        }

    def share(self, share: Share) -> None:
        """Tell the gateway's other processes from now on, and hear from them; before `share` starts."""
        self._share = share
        share.subscribe(_TOPIC, self._heard, self._everything)

    async def learn(self) -> None:
        """Wait until another process that knows all has told it, if there is one; for half a second at most. What is
        learned meanwhile is one change."""
        if self._share is None or self._share.others == 0:
            self._told.set()
            return
        self._learning = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._told.wait(), _LEARN_S)
        self._learning = False
        self._changed()

    def close(self) -> None:
        """Let no lease end any more."""
        for leases in self._leases.values():
            for lease in leases.values():
                lease.timer.cancel()

    def onto(self, routes: Mapping[str | int, RouteConfig]) -> dict[str | int, RouteConfig]:
        """`routes`, by their keys, with the nodes that have registered themselves: behind those of the route of the
        model's name, and of one without a name that has its task id. A model that has no route of its name gets one."""
        wanted = dict(routes)
        taken = {route.task_id for route in routes.values()}
        conflicts = []
        for name, model in sorted(self._models.items()):
            task = model.task
            if name in routes:
                wanted[name] = _with(routes[name], model)
            else:
                if task is not None and task in taken:
                    if task not in routes:
                        conflicts.append(f"{task} of {name}")
                    task = None
                taken.add(task)
                wanted[name] = self._route(name, model, task)
            if model.task is not None and model.task in routes:
                wanted[model.task] = _with(wanted[model.task], model)
        said = ", ".join(conflicts[:5])
        self._complain("task ids", said and f"registered task ids that other routes have already, ignored: {said}")
        return wanted

    def _route(self, name: str, model: _Model, task: int | None) -> RouteConfig:
        if model.route is None or model.route.task_id != task:
            nodes = tuple(model.nodes.values())
            model.route = RouteConfig(name=name, task_id=task, nodes=nodes, **self._settings)
        return model.route

    async def _register(self, exchange: Exchange) -> bytes:
        self._authenticate(exchange)
        request = messages.parse(messages.RegisterRequest, exchange.message)
        registration = _registration(request, bytes(exchange.message))
        if registration.node.address in self.own:
            raise BadRequest(f"address: {registration.node.address} is this gateway's own")
        longest = self._config.lease_ms
        lease_ms = max(_SHORTEST_LEASE_MS, min(request.lease_ms or longest, longest))
        self._hold(registration, lease_ms)
        self._publish(registration, lease_ms)
        return _body(messages.RegisterResponse(lease_ms=lease_ms))

    async def _deregister(self, exchange: Exchange) -> bytes:
        self._authenticate(exchange)
        request = messages.parse(messages.DeregisterRequest, exchange.message)
        address = _address(request)
        lease = self._leases.get(address, {}).get(request.instance)
        if lease is not None:
            self._publish(lease.registration, 0)
            self._end(address, request.instance)
        return _body(messages.DeregisterResponse())

    def _authenticate(self, exchange: Exchange) -> None:
        shown = exchange.find_metadata("authorization") or ""
        scheme, _, token = str(shown).partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), self._token):
            raise Unauthenticated('expected "authorization: Bearer TOKEN" with the gateway\'s token')

    def _hold(self, registration: _Registration, lease_ms: int) -> None:
        """Begin or renew a lease.

        Raises:
            Overloaded: there are too many registrations or models.
        """
        address, instance = registration.node.address, registration.instance
        before = self._leases.get(address, {}).get(instance)
        registered = self._registered + (before is None)
        models = self._registered_models + len(registration.models)
        models -= len(before.registration.models) if before is not None else 0
        for name, count in (("max_nodes", registered), ("max_models", models)):
            if count > (limit := getattr(self._config, name)):
                raise Overloaded(f"gateway.registry.{name} is {limit}; with this registration there would be {count}")
        if before is not None:
            before.timer.cancel()
        self._registered, self._registered_models = registered, models
        lease_s = lease_ms / 1000
        self._leases.setdefault(address, {})[instance] = _Lease(
            registration=registration,
            ends=time.monotonic() + lease_s,
            timer=asyncio.get_running_loop().call_later(lease_s, self._end, address, instance),
        )
        if before is None or before.registration.request != registration.request:
            self._take(address)

    def _end(self, address: str, instance: str) -> None:
        lease = self._leases[address].pop(instance)
        lease.timer.cancel()
        self._registered -= 1
        self._registered_models -= len(lease.registration.models)
        if not self._leases[address]:
            del self._leases[address]
        self._take(address)

    def _take(self, address: str) -> None:
        """Take over what the processes at an address serve by now."""
        registrations = [lease.registration for lease in self._leases.get(address, {}).values()]
        serves = dict(registrations[0].models) if registrations else {}
        for other in registrations[1:]:
            serves = {name: task for name, task in serves.items() if name in other.models}
        changed = False
        served = [name for name, model in self._models.items() if address in model.nodes]
        for name in [name for name in served if name not in serves]:
            model = self._models[name]
            del model.nodes[address]
            model.tasks.pop(address, None)
            model.route = None
            if not model.nodes:
                del self._models[name]
            changed = True
        for name, task in serves.items():
            node = registrations[-1].node
            model = self._models.setdefault(name, _Model())
            if model.nodes.get(address) == node and model.tasks.get(address) == task:
                continue
            model.nodes[address] = node
            model.tasks.pop(address, None)
            if task is not None:
                model.tasks[address] = task
            model.route = None
            changed = True
        if changed and not self._learning:
            self._changed()

    def _publish(self, registration: _Registration, lease_ms: int) -> None:
        if self._share is not None:
            self._share.publish(_TOPIC, _told(registration, lease_ms))

    def _everything(self) -> Iterator[dict[str, Any]]:
        for lease in [lease for leases in self._leases.values() for lease in leases.values()]:
            yield _told(lease.registration, max(1, int(1000 * (lease.ends - time.monotonic()))))
        yield {"all": self._told.is_set(), "of": self._id}

    def _heard(self, payload: dict[str, Any]) -> None:
        if "all" in payload:
            assert self._share is not None
            self._as_new.add(str(payload["of"]))
            if payload["all"] or len(self._as_new) >= self._share.others:
                self._told.set()
            return
        body, lease_ms = base64.b64decode(payload["request"]), int(payload["lease_ms"])
        try:
            registration = _registration(messages.parse(messages.RegisterRequest, body), body)
            if lease_ms > 0:
                self._hold(registration, min(lease_ms, self._config.lease_ms))
            elif registration.instance in self._leases.get(registration.node.address, {}):
                self._end(registration.node.address, registration.instance)
        except InferenceError as error:
            raise ValueError(str(error)) from error


def _told(registration: _Registration, lease_ms: int) -> dict[str, Any]:
    return {"request": base64.b64encode(registration.request).decode(), "lease_ms": lease_ms}


def _address(request: Any) -> str:
    """What a RegisterRequest or a DeregisterRequest says, in the one way to write it.

    Raises:
        BadRequest: it is none.
    """
    try:
        return NodeConfig.parse_one(request.address).address
    except ValueError as error:
        raise BadRequest(f"address: {error}") from error


def _registration(request: Any, body: bytes) -> _Registration:
    """Raises:
    BadRequest: says what is wrong with the RegisterRequest.
    """
    if len(body) > _LARGEST:
        raise BadRequest(f"a registration has {len(body)} bytes; expected {_LARGEST} at most")
    weight = request.weight if request.HasField("weight") else 1
    address = _address(request)
    if request.lease_ms < 0:
        raise BadRequest(f"lease_ms: {request.lease_ms} is below 0")
    if weight > 10_000:
        raise BadRequest(f"weight: {weight} is over 10000")
    if not _INSTANCE.fullmatch(request.instance):
        raise BadRequest("instance: expected up to 64 visible ASCII characters")
    models: dict[str, int | None] = {}
    for model in request.models:
        if not _NAME.fullmatch(model.name) or model.name in models:
            raise BadRequest("models: expected names, each once, up to 255 characters without / and control characters")
        if model.task_id < 0:
            raise BadRequest(f"models: the task id {model.task_id} is below 0")
        models[model.name] = model.task_id if model.HasField("task_id") else None
    node = NodeConfig(address=address, weight=weight)
    return _Registration(node=node, instance=request.instance, models=models, request=body)


def _with(route: RouteConfig, model: _Model) -> RouteConfig:
    static = {node.address for node in route.nodes}
    added = tuple(node for address, node in model.nodes.items() if address not in static)
    return route.model_copy(update={"nodes": (*route.nodes, *added)})


def _body(message: Any) -> bytes:
    body: bytes = message.SerializeToString()
    return body
