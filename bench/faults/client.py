"""A client that sends by the clock, whether or not answers come, and keeps a record of every request."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from array import array
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import uvloop

from bench.contract import SERVING
from bench.faults import control, sockets
from dl_inference_core.client import build

NAME, TASK = "m", 7
"""Of the route that requests go by."""
COLUMNS = 4
"""Of a record, each a float64: when it was due, sent and ended, by time.monotonic; gRPC's code."""

_WATCH = "/grpc.health.v1.Health/Watch"
_MESSAGE_BYTES = 64 * 1024 * 1024
OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),  # what is sent again in secret would hide a failure
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a client sends.

    Attributes:
        rate: requests a second, on average; they come at random, as from many independent clients (Poisson).
        deadline_ms: of each request.
        cancel_ms: each is cancelled after so long; 0 is never.
        even: whether they come at even intervals instead.
        until_not_serving: whether it ends by itself once the gateway's health says that it is going.
        protocols: taken in turn.
    """

    rate: float
    seed: int
    deadline_ms: float = 2000.0
    cancel_ms: float = 0.0
    even: bool = False
    until_not_serving: bool = False
    connections: int = 4
    content: int = 64
    model: str = NAME
    protocols: tuple[str, ...] = ("openinference", "tfserving", "seldon")


class _Client:
    """Event loop only."""

    def __init__(self, address: str, load: Load) -> None:
        self._load = load
        self._channels = [grpc.aio.insecure_channel(address, options=OPTIONS) for _ in range(load.connections)]
        self._requests = [_request(load, protocol) for protocol in load.protocols]
        self._calls = [
            [(channel.unary_unary(method), body) for method, body in self._requests] for channel in self._channels
        ]
        self._tasks: set[asyncio.Task[None]] = set()
        self._records = array("d")
        self._stopped = asyncio.Event()

    async def apply(self, settings: dict[str, Any]) -> None:
        """New settings of the load; "stop" ends it."""
        if settings.pop("stop", False):
            self._stopped.set()
        self._load = replace(self._load, **settings)

    async def connect(self, port: int) -> list[int]:
        """One channel after the other; returns its own port of each one's connection to `port`.

        Raises:
            ValueError: a channel has not made one connection.
        """
        own: list[int] = []
        for channel in self._channels:
            await channel.channel_ready()
            (new,) = sockets.opened(os.getpid(), port).difference(own)
            own.append(new)
        return own

    async def run(self) -> array[float]:
        """Send until it is stopped; returns the records of all that was sent, once all of it has ended."""
        watching = asyncio.create_task(self._watch()) if self._load.until_not_serving else None
        chance = random.Random(self._load.seed)  # noqa: S311 - the same run again
        due = time.monotonic()
        number = 0
        while not self._stopped.is_set():
            rate = self._load.rate
            due += 1 / rate if self._load.even else chance.expovariate(rate)
            if (ahead := due - time.monotonic()) > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), ahead)
                    break
            elif number % 64 == 0:
                await asyncio.sleep(0)
            # All protocols on all connections.
            calls = self._calls[number % len(self._calls)]
            call, body = calls[number // len(self._calls) % len(calls)]
            number += 1
            task = asyncio.create_task(self._send(call, body, due))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        if watching is not None:
            watching.cancel()
        return self._records

    async def _send(self, ask: Any, body: bytes, due: float) -> None:
        load = self._load
        sent = time.monotonic()
        call = ask(body, timeout=load.deadline_ms / 1000)
        if load.cancel_ms:
            await asyncio.sleep(load.cancel_ms / 1000)
            sent = time.monotonic()
            call.cancel()
        code = await call.code()
        self._records.extend((due, sent, time.monotonic(), code.value[0]))

    async def _watch(self) -> None:
        """Stop when the gateway says that it is not serving any more, as a balancer in front of it would."""
        stream = self._channels[0].unary_stream(_WATCH)(b"")
        async for said in stream:
            if said != SERVING:
                break
        self._stopped.set()


def _request(load: Load, protocol: str) -> tuple[str, bytes]:
    model = TASK if protocol == "seldon" and load.model == NAME else load.model
    spoken, body = build(model, {"x": np.zeros(load.content, np.uint8)}, protocol=protocol)
    return spoken.node_method, body


async def _send(address: str, records: str, path: str, load: str) -> None:
    """Send to `address` until told to stop on `path`, then write the records; the ports are beside them before."""
    client = _Client(address, Load(**json.loads(load)))
    ports = await client.connect(int(address.rpartition(":")[2]))
    Path(records).with_suffix(".ports").write_text(json.dumps(ports))
    await control.listen(Path(path), client.apply)
    print(f"serving on {path}", flush=True)
    content = (await client.run()).tobytes()
    await asyncio.to_thread(Path(records).write_bytes, content)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_send(*sys.argv[1:]))
