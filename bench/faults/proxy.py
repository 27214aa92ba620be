"""A TCP proxy that does to connections what networks and broken programs do."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvloop

from bench.faults import control

MODES = ("pass", "delay", "reset", "half-close", "trickle", "corrupt")
"""What is done to bytes that come from the node, or to their connection: nothing; 50 ms later; a reset, every half
second; the node's side ends and the other stays; 200 bytes a second; some bytes are others."""

_DELAY_S = 0.05
_EVERY_S = 0.5
_TRICKLED, _TRICKLE_S = 2, 0.01
_CHUNK = 65_536
_CORRUPTED = 0.2


class _Proxy:
    """Event loop only."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._mode = "pass"
        self._clients: set[asyncio.StreamWriter] = set()
        self._random = random.Random(1)  # noqa: S311 - the same run again

    async def apply(self, settings: dict[str, Any]) -> None:
        self._mode = settings["mode"]

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        try:
            upstream, to_node = await asyncio.open_connection(*self._target)
            try:
                await asyncio.gather(self._pump(reader, to_node), self._pump_back(upstream, writer))
            finally:
                to_node.transport.abort()
        except (OSError, RuntimeError):  # uvloop raises the latter for a connection that has been reset
            pass
        finally:
            self._clients.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _pump_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK):
            mode = self._mode
            if mode == "delay":
                await asyncio.sleep(_DELAY_S)
            elif mode == "half-close":
                writer.write_eof()
                return
            elif mode == "trickle":
                for start in range(0, len(data), _TRICKLED):
                    writer.write(data[start : start + _TRICKLED])
                    await asyncio.sleep(_TRICKLE_S)
                continue
            elif mode == "corrupt" and self._random.random() < _CORRUPTED:
                data = _corrupted(data)
            writer.write(data)
            await writer.drain()
        writer.close()

    async def keep_resetting(self) -> None:
        """Reset every connection now and then, in the mode for it."""
        while True:
            await asyncio.sleep(_EVERY_S)
            for writer in list(self._clients) if self._mode == "reset" else ():
                connection = writer.get_extra_info("socket")
                with suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()


def _corrupted(data: bytes) -> bytes:
    """With another head: what a frame of HTTP/2 says of its own length and kind is wrong."""
    return bytes(byte ^ 0xFF for byte in data[:9]) + data[9:]


async def _serve(address: str, target: str, path: str) -> None:
    """Stand in front of `target` until standard input ends."""
    proxy = _Proxy(target)
    host, _, port = address.rpartition(":")
    await asyncio.start_server(proxy.accept, host, int(port))
    await control.listen(Path(path), proxy.apply)
    resetting = asyncio.create_task(proxy.keep_resetting())
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    print(f"serving on {address}", flush=True)
    await ended.wait()
    resetting.cancel()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(*sys.argv[1:]))
