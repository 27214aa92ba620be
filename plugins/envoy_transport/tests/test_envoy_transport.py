from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from dl_inference_envoy_transport.host import Host
from dl_inference_envoy_transport.transport import EnvoyTransport

from dl_inference_core.testing import TransportConformance


class TestEnvoyTransport(TransportConformance):
    transport_class = EnvoyTransport

    def run(self, test: Coroutine[Any, Any, None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(60):
                await test

        host = Host.of_this_process()
        assert host is not None
        host.run(bounded())
