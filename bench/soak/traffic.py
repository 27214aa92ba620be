"""What clients send: much that is ordinary, and all that is not; and how each request ended."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

import grpc
import grpc.aio
import numpy as np

from bench.contract import METHOD, SERVING
from bench.soak.node import DELAY
from bench.soak.stage import MESSAGE_BYTES, NAME, PASSING, TASK
from dl_inference_core.client import build

_CHANNELS = 4
_LARGE_BYTES = 100_000
_MOST_IN_FLIGHT = 256
_HANGS_S = 30.0
_PACE_S = 0.01
_SHOWN = 50
_WATCH = "/grpc.health.v1.Health/Watch"
_WATCHED = b"\x0a\x04" + NAME.encode()  # HealthCheckRequest{service: NAME}
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))


class End(NamedTuple):
    """How a request ended: its gRPC or HTTP status, or what else became of it; and what was said."""

    outcome: str
    detail: str = ""


class Client:
    """Sends one request of a kind, and says how it ended."""

    def __init__(self, address: str, http_address: str, seed: int) -> None:
        self._address = address
        self._http_address = http_address
        self._random = random.Random(seed)  # noqa: S311 - the same run again
        self._numbers = itertools.count()
        self._channels = [self._channel() for _ in range(_CHANNELS)]
        self._small = [_request(NAME, 256, "tfserving"), _request(NAME, 256, "openinference")]
        self._small += [_request(f"textcnn-{TASK}", 256, "tfserving"), _request(TASK, 256, "seldon")]
        self._large = [_request(NAME, _LARGE_BYTES, "tfserving"), _request(NAME, _LARGE_BYTES, "openinference")]
        self._oversize = _request(NAME, MESSAGE_BYTES + 1, "tfserving")
        self._unknown = _request("nobody", 256, "tfserving")
        self._passing = _request(PASSING, 256, "tfserving")

    def _channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self._address, options=_OPTIONS)

    async def small(self) -> End:
        return await self._ask(self._random.choice(self._small))

    async def large(self) -> End:
        return await self._ask(self._random.choice(self._large))

    async def passing(self) -> End:
        return await self._ask(self._passing)

    async def cancelled(self) -> End:
        """Cancelled within 20 ms; the node answers within 40."""
        return await self._ask(
            self._random.choice(self._small),
            delay_ms=self._random.uniform(0, 40),
            cancel_after_s=self._random.uniform(0, 0.02),
        )

    async def deadline(self) -> End:
        """With 1 to 50 ms; the node answers within 50."""
        return await self._ask(
            self._random.choice(self._small),
            delay_ms=self._random.uniform(0, 50),
            timeout_s=self._random.uniform(0.001, 0.05),
        )

    async def oversize(self) -> End:
        return await self._ask(self._oversize)

    async def malformed(self) -> End:
        return await self._ask((METHOD, b"\xff" * self._random.randint(1, 500)))

    async def unknown(self) -> End:
        return await self._ask(self._unknown)

    async def connecting(self) -> End:
        """On a connection of its own."""
        async with self._channel() as channel:
            return await self._ask(self._random.choice(self._small), channel)

    async def disconnecting(self) -> End:
        """On a connection of its own that is closed within 20 ms; the node answers within 40."""
        channel = self._channel()
        closing = asyncio.get_running_loop().call_later(
            self._random.uniform(0, 0.02), lambda: asyncio.ensure_future(channel.close())
        )
        try:
            return await self._ask(self._random.choice(self._small), channel, delay_ms=self._random.uniform(0, 40))
        finally:
            closing.cancel()
            await channel.close()

    async def watching(self) -> End:
        """Health's stream, for up to a second."""
        stream = self._random.choice(self._channels).unary_stream(_WATCH)(_WATCHED)
        said = await stream.read()
        await asyncio.sleep(self._random.uniform(0, 1))
        stream.cancel()
        code = await stream.code()
        return End("SERVING" if said == SERVING else code.name, await stream.details() or "")

    async def metrics(self) -> End:
        status, body = await http_get(self._http_address, "/metrics")
        return End(str(status)) if "dl_inference_requests_total" in body else End("no metrics", body[:200])

    async def readiness(self) -> End:
        status, body = await http_get(self._http_address, "/readyz")
        return End(str(status), body)

    async def _ask(
        self,
        request: tuple[str, bytes],
        channel: grpc.aio.Channel | None = None,
        *,
        delay_ms: float = 0.0,
        timeout_s: float | None = None,
        cancel_after_s: float | None = None,
    ) -> End:
        """Send a method's message, made unlike any other by a field that no protocol knows."""
        method, message = request
        message += b"\x79" + next(self._numbers).to_bytes(8, "little")
        channel = channel or self._random.choice(self._channels)
        call = channel.unary_unary(method)(
            message, timeout=timeout_s, metadata=((DELAY, str(delay_ms)),) if delay_ms else None
        )
        if cancel_after_s is not None:
            await asyncio.sleep(cancel_after_s)
            call.cancel()
        code = await call.code()
        if code is grpc.StatusCode.OK and await call != message:
            return End("another's answer")
        return End(code.name, await call.details() or "")

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


async def http_get(address: str, path: str) -> tuple[int, str]:
    """The status and body of an answer, on a connection of its own."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read(-1)).decode().partition("\r\n\r\n")
    finally:
        writer.close()
    return int(head.split(" ", 2)[1]), body


def _request(model: str | int, content: int, protocol: str) -> tuple[str, bytes]:
    spoken, body = build(model, {"x": np.zeros(content, np.uint8)}, protocol=protocol)
    return spoken.node_method, body


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of request.

    Attributes:
        share: of all requests, in ‰.
        expected: how it may end.
    """

    name: str
    share: int
    expected: frozenset[str]
    send: Callable[[Client], Awaitable[End]]


def _kind(send: Callable[[Client], Awaitable[End]], share: int, *expected: str) -> Kind:
    return Kind(name=send.__name__, share=share, expected=frozenset(expected), send=send)


KINDS = (
    _kind(Client.small, 660, "OK"),
    _kind(Client.large, 60, "OK"),
    # UNAVAILABLE if its node is killed just after the route has gone: there is no other node to try then.
    _kind(Client.passing, 40, "OK", "NOT_FOUND", "UNAVAILABLE"),
    _kind(Client.cancelled, 70, "OK", "CANCELLED"),
    _kind(Client.deadline, 70, "OK", "DEADLINE_EXCEEDED"),
    _kind(Client.oversize, 10, "RESOURCE_EXHAUSTED"),
    _kind(Client.malformed, 20, "INVALID_ARGUMENT"),
    _kind(Client.unknown, 20, "NOT_FOUND"),
    _kind(Client.connecting, 15, "OK"),
    _kind(Client.disconnecting, 15, "OK", "CANCELLED"),
    _kind(Client.watching, 10, "SERVING"),
    _kind(Client.metrics, 5, "200"),
    _kind(Client.readiness, 5, "200"),
)
NORMAL = KINDS[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A request that ended as it should not have."""

    at_s: float
    kind: str
    outcome: str
    detail: str


class Traffic:
    """Requests of all kinds, and what became of them. Event loop only.

    Attributes:
        sent: requests by kind.
        ended: and by outcome.
        failures: the first of them.
        held_back: requests that were due but not sent, since too many were in flight.
    """

    def __init__(self, client: Client, rate: float, seed: int) -> None:
        """Args:
        rate: requests per second.
        """
        self._client = client
        self._rate = rate
        self._random = random.Random(seed)  # noqa: S311 - the same run again
        self._shares = [kind.share for kind in KINDS]
        self._tasks: set[asyncio.Task[None]] = set()
        self._begun = asyncio.get_running_loop().time()
        self.sent: Counter[str] = Counter()
        self.ended: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.failed = 0
        self.failures: list[Failure] = []
        self.held_back = 0

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    async def run(self, seconds: float) -> None:
        """Send for so long, at an even pace; return when all that was sent has ended."""
        loop = asyncio.get_running_loop()
        begun, due = loop.time(), 0
        while (passed := loop.time() - begun) < seconds:
            due, before = int(passed * self._rate), due
            for kind in self._random.choices(KINDS, self._shares, k=due - before):
                if len(self._tasks) < _MOST_IN_FLIGHT:
                    self._send(kind)
                else:
                    self.held_back += 1
            await asyncio.sleep(_PACE_S)
        await self._until_ended()

    async def send(self, kind: Kind, times: int) -> None:
        """Send so many of one kind at once; return when they have ended."""
        for _ in range(times):
            self._send(kind)
        await self._until_ended()

    def _send(self, kind: Kind) -> None:
        task = asyncio.create_task(self._one(kind))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _one(self, kind: Kind) -> None:
        self.sent[kind.name] += 1
        try:
            async with asyncio.timeout(_HANGS_S):
                end = await kind.send(self._client)
        except TimeoutError:
            end = End("HANGS", f"no end within {_HANGS_S:.0f} s")
        except Exception as error:
            end = End(type(error).__name__, str(error))
        self.ended[kind.name][end.outcome] += 1
        if end.outcome not in kind.expected:
            self.failed += 1
            if len(self.failures) < _SHOWN:
                at_s = asyncio.get_running_loop().time() - self._begun
                self.failures.append(Failure(at_s=round(at_s, 2), kind=kind.name, **end._asdict()))

    async def _until_ended(self) -> None:
        while self._tasks:
            await asyncio.wait(set(self._tasks))
