"""An echo server on our Envoy transport: what Envoy runs."""

from __future__ import annotations

import asyncio
import sys

from bench.contract import HEALTH, MESSAGE_BYTES, METHOD, SERVING
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.transport import Call, Limits, Methods


async def echo(_: list[str]) -> int:
    """Serve until standard input ends."""
    transport = Plugins().make(Kind.TRANSPORTS, "envoy", {}, "bench")
    methods = Methods(unary={METHOD: _echo, HEALTH: _serving})
    server = await transport.serve(methods, ("127.0.0.1:0",), Limits(message_bytes=MESSAGE_BYTES))
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    print(f"serving on 127.0.0.1:{server.ports[0]}", flush=True)
    await ended.wait()
    return 0


async def _echo(call: Call) -> bytes:
    return call.request


async def _serving(_: Call) -> bytes:
    return SERVING
