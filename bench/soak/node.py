"""A node that answers with what it was sent, at once or, if the request's metadata says so, after a while."""

from __future__ import annotations

import asyncio
import sys

from bench.contract import HEALTH, SERVING
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.serving import new_event_loop
from dl_inference_core.testing.loopback import CoroutineService
from dl_inference_core.transport import Exchange, Limits, Message
from dl_inference_core.wire.protocol import PROTOCOLS

DELAY = "delay-ms"
"""The metadata that says after how many milliseconds to answer."""

_DRAIN_S = 5.0


async def serve(arguments: list[str]) -> int:
    """Serve on the transport and the address that are the `arguments`, until standard input ends."""
    name, address = arguments
    transport = Plugins().make(Kind.TRANSPORTS, name, {}, "soak")
    service = CoroutineService({**{each.node_method: _echo for each in PROTOCOLS.values()}, HEALTH: _serving})
    server = await transport.serve(service, (address,), Limits())
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(sys.stdin, ended.set)
    print(f"serving on {address}", flush=True)
    await ended.wait()
    loop.remove_reader(sys.stdin)
    await server.drain(_DRAIN_S)
    return 0


async def _echo(exchange: Exchange) -> Message:
    for key, value in exchange.metadata:
        if key == DELAY:
            await asyncio.sleep(float(value) / 1000)
    return exchange.message


async def _serving(_: Exchange) -> bytes:
    return SERVING


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        sys.exit(runner.run(serve(sys.argv[1:])))
