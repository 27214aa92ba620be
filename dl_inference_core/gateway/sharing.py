"""What one of several gateway processes learns, told to the others: short messages by topic, between their event loops.

Whoever has something to tell subscribes to its topic before the share starts, and publishes from then on::

    def heard(payload: dict[str, Any]) -> None:  # from another process; raise ValueError if it makes no sense
        ...

    def everything() -> Iterable[dict[str, Any]]:  # for a process that has just started: all that holds now
        return [{"address": address} for address in known]

    share.subscribe("registrations", heard, everything)
    share.publish("registrations", {"address": "10.0.0.1:8500"})

Messages are Unix datagrams, between sockets in a private folder that the supervisor makes. The kernel neither loses nor
reorders them. A process that takes none for a while is told everything again afterwards, like one that is new. What is
heard must not be published again: everybody has heard it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import socket
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

from dl_inference_core.gateway.balancing import Balancer
from dl_inference_core.gateway.health_states import Reason

if TYPE_CHECKING:
    from dl_inference_core.gateway.forwarding import Forwarder
    from dl_inference_core.gateway.pool import Endpoint, Endpoints, Node

_log = logging.getLogger(__name__)

LARGEST = 32_768
"""Bytes of the largest message."""

_VERSION = 1
_HELLO = "hello"
_LOOK_S = 1.0
_AGAIN_S = 0.005
_MOST_WAITING = 1024
_AT_ONCE = 64
_COLLECT_S = 0.1
# Between two looks in ten, what has changed by less waits for the others.
_LITTLE = 0.05
_LONGEST_DETAIL = 200
_ENVELOPE_BYTES = 100
_VALUE_BYTES = 40

Heard: TypeAlias = Callable[[dict[str, Any]], None]
Everything: TypeAlias = Callable[[], Iterable[dict[str, Any]]]


class _Peer:
    """Another process.

    Attributes:
        everything: what is left of what it is being told of all that holds; drawn as it takes it.
        waiting: messages for after that, the oldest first.
        behind: whether there were too many, so that it has to be told everything anew after that.
    """

    __slots__ = ("_next", "behind", "everything", "socket", "waiting")

    def __init__(self, path: Path, everything: Iterator[bytes]) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.everything = everything
        self.waiting: deque[bytes] = deque()
        self.behind = False
        self._next: bytes | None = None
        try:
            self.socket.setblocking(False)
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise

    def send(self) -> bool:
        """Send the next message; False if there is none.

        Raises:
            OSError: it was not sent.
        """
        if self._next is None:
            self._next = next(self.everything, None)
            if self._next is None and self.waiting:
                self._next = self.waiting.popleft()
            if self._next is None:
                return False
        self.socket.send(self._next)
        self._next = None
        return True


class Share:
    """One process's end. Event loop only; never blocks, and never raises for what others send or do."""

    def __init__(self, folder: Path, index: int) -> None:
        """Args:
        folder: private, and the same for all processes.
        index: this process's own number.
        """
        self._folder = folder
        self._index = index
        self._heard: dict[str, Heard] = {}
        self._everything: dict[str, Everything] = {}
        self._peers: dict[int, _Peer] = {}
        self._socket: socket.socket | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._flushing: asyncio.TimerHandle | None = None
        self._complained_of: set[str] = set()

    @property
    def gateway_id(self) -> str:
        """The id of the gateway whose processes these are: the same in each, and no other gateway's."""
        return uuid.uuid5(uuid.NAMESPACE_URL, f"//{socket.gethostname()}{self._folder}").hex[:16]

    @property
    def others(self) -> int:
        """How many other processes are known; after `start` every one that runs is."""
        return len(self._peers)

    def subscribe(self, topic: str, heard: Heard, everything: Everything | None = None) -> None:
        """Args:
        heard: is given what another process published; a ValueError, KeyError or TypeError of it is ignored.
        everything: what `heard` of a process that knows nothing has to be given; drawn little by little, while other
            things go on.
        """
        self._heard[topic] = heard
        if everything is not None:
            self._everything[topic] = everything

    def publish(self, topic: str, payload: dict[str, Any]) -> None:
        """Tell the others; before `start` there are none.

        Raises:
            ValueError: as JSON the message has over LARGEST bytes.
        """
        if self._peers:
            message = self._message(topic, payload)
            for index in tuple(self._peers):
                self._send(index, message)

    def start(self) -> None:
        """Listen, and ask the others for everything."""
        path = self._folder / str(self._index)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listening.setblocking(False)
        try:
            path.unlink(missing_ok=True)  # a predecessor's
            listening.bind(str(path))
        except OSError as error:
            listening.close()
            _log.warning("what this worker learns stays its own: %s: %s", path, error.strerror or error)
            return
        self._socket = listening
        asyncio.get_running_loop().add_reader(listening, self._readable)
        self._look()

    def close(self) -> None:
        """Neither hear nor tell anything any more."""
        for timer in (self._looking, self._flushing):
            if timer is not None:
                timer.cancel()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
            (self._folder / str(self._index)).unlink(missing_ok=True)
        for index in tuple(self._peers):
            self._drop(index)

    def _look(self) -> None:
        """Greet whoever is there and not known: once a second, since a greeting may fail for want of descriptors."""
        self._looking = asyncio.get_running_loop().call_later(_LOOK_S, self._look)
        try:
            names = os.listdir(self._folder)  # noqa: PTH208 - names, not paths
        except OSError:
            return
        for name in names:
            if name.isdecimal() and int(name) not in self._peers and int(name) != self._index:
                self._meet(int(name), greet=True)

    def _meet(self, index: int, *, greet: bool) -> None:
        self._drop(index)
        try:
            peer = _Peer(self._folder / str(index), self._all(greet=greet))
        except OSError:  # it has gone; or there are no descriptors for now
            return
        self._peers[index] = peer
        self._flush(index)

    def _drop(self, index: int) -> None:
        peer = self._peers.pop(index, None)
        if peer is not None:
            peer.socket.close()

    def _send(self, index: int, message: bytes) -> None:
        peer = self._peers[index]
        if peer.behind:
            return  # everything will have it
        if len(peer.waiting) < _MOST_WAITING:
            peer.waiting.append(message)
        else:
            peer.waiting.clear()
            peer.behind = True
        self._flush(index)

    def _flush(self, index: int) -> None:
        peer = self._peers[index]
        try:
            while True:
                while peer.send():
                    pass
                if not peer.behind:
                    return
                peer.behind = False
                peer.everything = self._all(greet=True)
        except BlockingIOError:
            if self._flushing is None:
                self._flushing = asyncio.get_running_loop().call_later(_AGAIN_S, self._flush_all)
        except OSError:  # it has gone; its successor will greet
            self._drop(index)

    def _flush_all(self) -> None:
        self._flushing = None
        for index in tuple(self._peers):
            self._flush(index)

    def _all(self, *, greet: bool) -> Iterator[bytes]:
        if greet:
            yield self._message(_HELLO, {})
        for topic, everything in self._everything.items():
            for payload in everything():
                yield self._message(topic, payload)

    def _message(self, topic: str, payload: dict[str, Any]) -> bytes:
        content = (_VERSION, self._index, topic, payload)
        message = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        if len(message) > LARGEST:
            raise ValueError(f"a message on {topic} has {len(message)} bytes, over {LARGEST}")
        return message

    def _readable(self) -> None:
        assert self._socket is not None
        for _ in range(_AT_ONCE):  # then others have a turn
            try:
                message = self._socket.recv(LARGEST)
            except OSError:  # there is none
                return
            self._take(message)
            if self._socket is None:
                return

    def _take(self, message: bytes) -> None:
        try:
            version, index, topic, payload = json.loads(message)
        except (ValueError, TypeError, RecursionError):
            return
        if version != _VERSION or type(index) is not int or index == self._index or not isinstance(payload, dict):
            return
        if topic == _HELLO:
            self._meet(index, greet=False)
        elif isinstance(topic, str) and (heard := self._heard.get(topic)) is not None:
            try:
                heard(payload)
            except (ValueError, KeyError, TypeError):
                if topic not in self._complained_of:
                    self._complained_of.add(topic)
                    _log.warning("what worker %d tells of %s makes no sense here", index, topic, exc_info=True)


class StateSync:
    """Keeps alike what all workers' gateways know: which endpoints are left out, and what strategies have learned.

    The latest word counts, whoever's it is.
    """

    def __init__(self, share: Share, endpoints: Endpoints, forwarders: Callable[[], Collection[Forwarder]]) -> None:
        """Args:
        forwarders: every route's, now.
        """
        self._share = share
        self._endpoints = endpoints
        self._forwarders = forwarders
        self._looks = 0
        self._timer: asyncio.TimerHandle | None = None
        self._known: WeakKeyDictionary[Forwarder, dict[str, float]] = WeakKeyDictionary()
        """By route and endpoint what the others know."""
        self._by_key: dict[str | int, Forwarder] = {}
        self._indexed: Collection[Forwarder] = ()
        self._complained_of: set[str] = set()

    def start(self) -> None:
        """Tell and hear from now on; the others are asked for all that they know."""
        self._share.subscribe("health", self._hear_health, self._all_health)
        self._share.subscribe("learned", self._hear_learned, self._all_learned)
        self._endpoints.told = self._tell_health
        self._share.start()
        self._collect()

    def close(self) -> None:
        """Neither tell nor hear anything any more."""
        self._endpoints.told = None
        if self._timer is not None:
            self._timer.cancel()
        self._share.close()

    # Health

    def _tell_health(self, endpoint: Endpoint) -> None:
        self._share.publish("health", _health(endpoint))

    def _hear_health(self, payload: dict[str, Any]) -> None:
        target, reason, detail = str(payload["target"]), payload["reason"], str(payload["detail"])
        endpoint = self._endpoints.find(target)
        if endpoint is None:  # a reload is not in step
            return
        if reason is None:
            endpoint.health.learn_returned()
        else:
            endpoint.health.learn_left_out(Reason(reason), detail)

    def _all_health(self) -> Iterator[dict[str, Any]]:
        left_out = [endpoint for endpoint in self._endpoints if not endpoint.health.usable]
        return (_health(endpoint) for endpoint in left_out)

    # What strategies have learned

    def _collect(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_COLLECT_S, self._collect)
        self._looks += 1
        least = _LITTLE if self._looks % 10 else 0.0
        changes: list[_Learned] = []
        for forwarder in self._forwarders():
            if forwarder.recorded:
                forwarder.recorded = False
                changes += self._changes(forwarder, least)
        for payload in _batches(changes):
            self._share.publish("learned", payload)

    def _changes(self, forwarder: Forwarder, least: float) -> Iterator[_Learned]:
        """What the others do not know; what has changed by no more than the part `least` is left for later."""
        known = self._known.setdefault(forwarder, {})
        learned = self._learned(forwarder)
        if len(known) > len(learned):
            for gone in known.keys() - {target for target, _ in learned}:
                del known[gone]
        for target, value in learned:
            before = known.get(target)
            if before is None or abs(value - before) > least * abs(before):
                known[target] = value
                yield forwarder.config.key, target, value
            elif value != before:
                forwarder.recorded = True

    def _learned(self, forwarder: Forwarder) -> list[tuple[str, float]]:
        """Of each endpoint of which the route's strategy has learned anything."""
        balancer = forwarder.balancer
        if type(balancer).learned is Balancer.learned:
            return []
        try:
            with forwarder.lock:
                learned = [(node.endpoint.target, balancer.learned(node)) for node in forwarder.pool.nodes]
        except Exception:
            self._balancer_raised(balancer)
            return []
        return [(target, value) for target, value in learned if value is not None and math.isfinite(value)]

    def _hear_learned(self, payload: dict[str, Any]) -> None:
        if self._indexed is not (forwarders := self._forwarders()):
            self._indexed = forwarders
            self._by_key = {forwarder.config.key: forwarder for forwarder in forwarders}
        nodes: dict[str | int, dict[str, Node]] = {}
        for key, target, value in payload["learned"]:
            if (forwarder := self._by_key.get(key)) is not None and math.isfinite(value):
                if key not in nodes:
                    nodes[key] = {node.endpoint.target: node for node in forwarder.pool.nodes}
                if (node := nodes[key].get(target)) is not None:
                    self._learn(forwarder, node, value)

    def _learn(self, forwarder: Forwarder, node: Node, value: float) -> None:
        balancer = forwarder.balancer
        try:
            with forwarder.lock:
                balancer.learn(node, value)
                learned = balancer.learned(node)
        except Exception:
            self._balancer_raised(balancer)
            return
        if learned is not None:
            self._known.setdefault(forwarder, {})[node.endpoint.target] = learned

    def _all_learned(self) -> Iterator[dict[str, Any]]:
        return _batches(
            [
                (forwarder.config.key, target, value)
                for forwarder in self._forwarders()
                for target, value in self._learned(forwarder)
            ]
        )

    def _balancer_raised(self, balancer: Balancer) -> None:
        """Log what is being handled, the first time."""
        if balancer.name not in self._complained_of:
            self._complained_of.add(balancer.name)
            _log.exception('balancer "%s" failed to exchange what it has learned', balancer.name)


_Learned: TypeAlias = tuple[str | int, str, float]
"""The key of a route, the target of an endpoint, and what its strategy has learned of it."""


def _health(endpoint: Endpoint) -> dict[str, Any]:
    health = endpoint.health
    reason = None if health.reason is None else health.reason.value
    return {"target": endpoint.target, "reason": reason, "detail": health.detail[:_LONGEST_DETAIL]}


def _batches(values: Iterable[_Learned]) -> Iterator[dict[str, Any]]:
    """Payloads that are not too large."""
    batch: list[_Learned] = []
    size = _ENVELOPE_BYTES
    for value in values:
        key, target, _ = value
        most = _VALUE_BYTES + 4 * (len(str(key)) + len(target))  # bytes of UTF-8, or an escape
        if batch and size + most > LARGEST:
            yield {"learned": batch}
            batch, size = [], _ENVELOPE_BYTES
        batch.append(value)
        size += most
    if batch:
        yield {"learned": batch}
