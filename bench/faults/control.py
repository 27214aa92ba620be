"""Settings of a running process, changed through a Unix-domain socket beside it, which no network fault reaches."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

_ANSWERS_S = 5.0

Apply = Callable[[dict[str, Any]], Awaitable[None]]


class _Endpoint(asyncio.DatagramProtocol):
    def __init__(self, apply: Apply) -> None:
        self._apply = apply
        self._applying: set[asyncio.Task[None]] = set()
        self._transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        task = asyncio.ensure_future(self._answer(json.loads(data), addr))
        self._applying.add(task)
        task.add_done_callback(self._applying.discard)

    async def _answer(self, settings: dict[str, Any], addr: Any) -> None:
        await self._apply(settings)
        self._transport.sendto(b"done", addr)


def _bound(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(str(path))
    return listening


async def listen(path: Path, apply: Apply) -> None:
    """`apply` whatever is told on `path` from now on."""
    listening = _bound(path)
    listening.setblocking(False)
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: _Endpoint(apply), sock=listening)


def tell(path: Path, **settings: Any) -> None:
    """Change settings of the process that listens on `path`; returns once they hold.

    Raises:
        OSError: it does not answer.
    """
    own = path.with_name(f"{path.name}.{os.getpid()}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
        asking.bind(str(own))
        try:
            asking.settimeout(_ANSWERS_S)
            asking.connect(str(path))
            asking.send(json.dumps(settings).encode())
            asking.recv(16)
        finally:
            own.unlink()
