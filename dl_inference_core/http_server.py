"""HTTP on a port of its own: uvicorn, on the event loop of the rest."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from dl_inference_core.transport import HttpApp

_FINISH_S = 1


class HttpServer:
    """A listening server of plaintext HTTP/1.1. Event loop only."""

    def __init__(self, app: HttpApp, listening: socket.socket) -> None:
        """Args:
        listening: a socket that listens; closed with the server.
        """
        self.port: int = listening.getsockname()[1]
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_FINISH_S,
        )
        self._uvicorn = _Uvicorn(config)
        self._serving = asyncio.create_task(self._uvicorn.serve([listening]))

    @classmethod
    async def start(cls, app: HttpApp, host: str, port: int) -> HttpServer:
        """Answer HTTP requests by `app`.

        Args:
            host: a name or an address; IPv6 in brackets or without.
            port: 0 is any free one.

        Raises:
            OSError: the address cannot be listened on.
        """
        if port > 65535:  # getaddrinfo would take the rest of it modulo 65536
            raise OSError("the port is over 65535")
        loop = asyncio.get_running_loop()
        (family, *_, address), *_ = await loop.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        # "::" is every interface to gRPC, IPv4 as well.
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return cls(app, socket.create_server(address, family=family, dualstack_ipv6=dual))

    async def close(self) -> None:
        """Stop listening, give the answers under way a second, cancel the rest."""
        self._uvicorn.should_exit = True
        await self._serving


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's own."""
        yield
