"""Exchanges from requests of an ASGI server: the suite for what answers HTTP, over uvicorn and real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dl_inference_core import asgi
from dl_inference_core.http_server import HttpServer
from dl_inference_core.testing.transport_http import HeldService, HttpConformance, pages
from dl_inference_core.transport import Http, HttpApp


class TestAsgi(HttpConformance):
    @asynccontextmanager
    async def serving_http(self, service: HeldService, app: HttpApp = pages) -> AsyncIterator[int]:
        server = await HttpServer.start(asgi.with_exchanges(Http(service=service, app=app)), "127.0.0.1", 0)
        try:
            yield server.port
        finally:
            await server.close()
