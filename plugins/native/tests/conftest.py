"""A coroutine test runs on an event loop of its own, for at most four minutes. A server of HTTP for such tests."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dl_inference_core.config import ServerTls
from dl_inference_core.testing.loopback import ECHO, LOOPBACK, CoroutineService, echo, has_refused
from dl_inference_core.testing.transport_http import HeldService, pages
from dl_inference_core.transport import Http, HttpApp, Limits


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

    async def bounded() -> None:
        async with asyncio.timeout(240):
            await pyfuncitem.obj(**arguments)

    asyncio.run(bounded())
    return True


class ServedHttp:
    """A server of one test, whose method of gRPC is ECHO."""

    def __init__(self, transport: Any, server: Any) -> None:
        self.transport = transport
        self.server = server
        self.port: int = server.ports[0]

    async def has_refused(self, **expected: int) -> None:
        """Returns once the transport has refused so many by each reason, and none by any other."""
        await has_refused(self.transport, **expected)

    async def has_freed_all(self) -> None:
        """Returns once the transport holds no bytes of messages."""
        async with asyncio.timeout(60):
            while self.transport._threads.buffered_bytes():  # noqa: ASYNC110 - an I/O thread sets no event
                await asyncio.sleep(0.02)


@asynccontextmanager
async def _serve_http(
    service: HeldService | None, app: HttpApp = pages, tls: ServerTls | None = None, **options: int
) -> AsyncIterator[ServedHttp]:
    from dl_inference_native import NativeTransport

    transport = NativeTransport(NativeTransport.Options(**options))
    http = None if service is None else Http(service=service, app=app)
    server = await transport.serve(CoroutineService({ECHO: echo}), LOOPBACK, Limits(), tls=tls, http=http)
    try:
        yield ServedHttp(transport, server)
    finally:
        await server.drain(0)


@pytest.fixture
def serve_http() -> Any:
    """(service, app, tls, **options): an asynchronous context manager of a `ServedHttp`; without a service, it answers
    no HTTP."""
    return _serve_http
