"""python rest.py [SECONDS]: CPU per HTTP/1.1 request of the native transport and of the core's HTTP port, uvicorn, as a
table in Markdown. Both answer by exchanges with the request's body.

Relative only: everything runs with the lowest priority, the load generator beside it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

from dl_inference_native import NativeTransport

from dl_inference_core import asgi
from dl_inference_core.errors import InferenceError
from dl_inference_core.http_exchange import HttpExchange
from dl_inference_core.http_server import HttpServer
from dl_inference_core.testing.loopback import LOOPBACK, CoroutineService
from dl_inference_core.testing.transport_http import pages
from dl_inference_core.transport import Http, Limits

IDLE = ("chrt", "-i", "0", "nice", "-n", "19")
LOADS = ((600, 1), (600, 32), (600_000, 4))
"""Bytes of a body, and connections, each with one request in flight."""

CLIENT = """
import asyncio, sys, time
port, connections, size, seconds = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
head = "POST /api/ HTTP/1.1\\r\\nhost: h\\r\\ncontent-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n" % size
count = 0

async def ask(end):
    global count
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    while time.monotonic() < end:
        writer.write(head.encode() + bytes(size))
        assert (await reader.readuntil(b"\\r\\n\\r\\n")).startswith(b"HTTP/1.1 200")
        await reader.readexactly(size)
        count += 1
    writer.close()

async def main():
    end = time.monotonic() + seconds
    await asyncio.gather(*(ask(end) for _ in range(connections)))

asyncio.run(main())
print(count)
"""


class Echo:
    """Answers with the body."""

    paths = ("/api/",)
    body_bytes = 1 << 20
    timeout_s = 30.0

    def begin_http(self, exchange: HttpExchange) -> None:
        exchange.reply(200, {"content-type": "application/json"}, exchange.body)

    def fail_http(self, exchange: HttpExchange, error: InferenceError) -> None:
        exchange.reply(500, {}, str(error).encode())


async def native() -> tuple[int, object]:
    """The port, and what is to be kept while it answers."""
    transport = NativeTransport(NativeTransport.Options())
    served = await transport.serve(CoroutineService({}), LOOPBACK, Limits(), http=Http(service=Echo(), app=pages))
    return served.ports[0], served


async def uvicorn() -> tuple[int, object]:
    served = await HttpServer.start(asgi.with_exchanges(Http(service=Echo(), app=pages)), "127.0.0.1", 0)
    return served.port, served


async def cpu_us(port: int, size: int, connections: int, seconds: float) -> float:
    """Of this process, per request."""
    command = (*IDLE, sys.executable, "-c", CLIENT, str(port), str(connections), str(size), str(seconds))
    before = time.process_time()
    client = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await client.communicate()
    return (time.process_time() - before) / int(out) * 1e6


async def main(seconds: float = 2.0) -> None:
    servers: dict[str, Callable[[], Awaitable[tuple[int, object]]]] = {"native": native, "uvicorn": uvicorn}
    started = {name: await start() for name, start in servers.items()}
    print(f"| bytes, connections | {' | '.join(started)} |\n| --- |{' --- |' * len(started)}")
    for size, connections in LOADS:
        least = dict.fromkeys(started, float("inf"))
        for _ in range(3):  # in turns, so that a busy machine changes both alike
            for name, (port, _) in started.items():
                least[name] = min(least[name], await cpu_us(port, size, connections, seconds))
        print(f"| {size}, {connections} | {' | '.join(f'{us:.0f}' for us in least.values())} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*map(float, sys.argv[1:])))
