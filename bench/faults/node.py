"""A node that does as it is told, takes no CPU for it, and keeps a log of every attempt that reaches it."""

from __future__ import annotations

import asyncio
import os
import random
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvloop

from bench.contract import HEALTH, SERVING
from bench.faults import control

EVENT = struct.Struct("<dfHBx")
"""One event of the log: time.monotonic(), seconds of the deadline that are left (inf without), the port of the
connection, and one of `ARRIVED`, `ANSWERED`, `FAILED`, `CANCELLED`."""
ARRIVED, ANSWERED, FAILED, CANCELLED = range(4)

_NOT_SERVING = b"\x08\x02"
# An answer of each protocol, with the field that it cannot do without.
_ANSWERS = {
    "/inference.GRPCInferenceService/ModelInfer": b"\x0a\x01m",
    "/tensorflow.serving.PredictionService/Predict": b"\x12\x03\x0a\x01m",
    "/seldon.protos.Model/Predict": b"\x1a\x00",
}
_PADDING = b"\x7a"  # field 15, which none of them knows
# Of a node that ends: health checks have noticed, and what is under way has ended.
_NOTICE_S, _DRAIN_S = 1.5, 5.0
_MESSAGE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What a node does.

    Attributes:
        latency_ms: a request's time of service.
        at_once: requests that are served at one time; others wait in turn. Its capacity is so many per `latency_ms`.
        status: the gRPC code that requests are answered with at once; 0 serves them.
        status_share: of all requests, those that are answered with it.
        hangs: requests are never answered.
        answer_bytes: added to each answer.
        health: health checks are answered "serving", "not serving", with an "error", or not at all: "hangs".
        listening: whether the port is open; closing it drops what is under way.
        ending: once it is set, it says that it does not serve, takes no more, finishes what is under way, and ends.
    """

    latency_ms: float = 40.0
    at_once: int = 6
    status: int = 0
    status_share: float = 1.0
    hangs: bool = False
    answer_bytes: int = 0
    health: str = "serving"
    listening: bool = True
    ending: bool = False


class _Node(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc is untyped
    """Event loop only."""

    def __init__(self, address: str, log: Path) -> None:
        self._address = address
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._random = random.Random(address)  # noqa: S311 - the same run again
        self._server: grpc.aio.Server | None = None
        self._check = grpc.unary_unary_rpc_method_handler(self._checked)
        self._handlers = {
            method: grpc.unary_unary_rpc_method_handler(self._served(method, answer))
            for method, answer in _ANSWERS.items()
        }
        self._behaviour = Behaviour()
        self._places = asyncio.Semaphore(self._behaviour.at_once)
        self._padding = b""
        self.ended = asyncio.Event()

    async def apply(self, settings: dict[str, Any]) -> None:
        """Raises:
        RuntimeError: its port is taken.
        """
        before, self._behaviour = self._behaviour, replace(self._behaviour, **settings)
        if self._behaviour.at_once != before.at_once:
            self._places = asyncio.Semaphore(self._behaviour.at_once)
        size = self._behaviour.answer_bytes
        self._padding = _PADDING + _varint(size) + bytes(size) if size else b""
        if self._behaviour.listening and self._server is None:
            await self._open()
        elif not self._behaviour.listening and self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)
        if self._behaviour.ending and self._server is not None:
            self._behaviour = replace(self._behaviour, health="not serving")
            self._ending = asyncio.ensure_future(self._end(self._server))

    async def _end(self, server: grpc.aio.Server) -> None:
        await asyncio.sleep(_NOTICE_S)
        await server.stop(_DRAIN_S)
        self.ended.set()

    async def _open(self) -> None:
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", _MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MESSAGE_BYTES),
        ]
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers((self,))
        self._server.add_insecure_port(self._address)
        await self._server.start()

    def service(self, details: Any) -> Any:
        return self._check if details.method == HEALTH else self._handlers.get(details.method)

    def _served(self, method: str, answer: bytes) -> Any:
        async def serve(_: bytes, context: Any) -> bytes:
            remaining = context.time_remaining()
            left = float("inf") if remaining is None else remaining
            port = int(context.peer().rpartition(":")[2])
            self._note(ARRIVED, left, port)
            behaviour = self._behaviour
            try:
                if behaviour.status and self._random.random() < behaviour.status_share:
                    self._note(FAILED, left, port)
                    await context.abort(_CODES[behaviour.status], "as it was told")
                async with self._places:
                    if self._behaviour.hangs:
                        await asyncio.Event().wait()
                    await asyncio.sleep(self._behaviour.latency_ms / 1000)
            except asyncio.CancelledError:
                self._note(CANCELLED, left, port)
                raise
            self._note(ANSWERED, left, port)
            return answer + self._padding

        return serve

    def _note(self, event: int, left: float, port: int) -> None:
        # One write each, unbuffered: what is killed has written all that it has seen.
        os.write(self._log, EVENT.pack(time.monotonic(), left, port, event))

    async def _checked(self, _: bytes, context: Any) -> bytes:
        health = self._behaviour.health
        if health == "hangs":
            await asyncio.Event().wait()
        if health == "error":
            await context.abort(grpc.StatusCode.INTERNAL, "as it was told")
        return SERVING if health == "serving" else _NOT_SERVING


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


async def _serve(address: str, log: str, path: str) -> None:
    """Serve on `address` until standard input ends; `path` is where it can be told what to do."""
    node = _Node(address, Path(log))
    await node.apply({})
    await control.listen(Path(path), node.apply)
    asyncio.get_running_loop().add_reader(sys.stdin, node.ended.set)
    print(f"serving on {address}", flush=True)
    await node.ended.wait()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(*sys.argv[1:]))
