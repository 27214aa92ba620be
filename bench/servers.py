"""A plain proxy on grpc.aio, as a competent user would write it, which our gateway is measured against; and a server
that takes its time."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import uvloop

from bench.contract import HEALTH, MESSAGE_BYTES, METHOD, SERVING

_SIZES = [("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.max_send_message_length", MESSAGE_BYTES)]

Answer = Callable[[bytes, Any], Awaitable[bytes]]


class _Generic(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc is untyped
    """Every method, as bytes."""

    def __init__(self, answer: Answer) -> None:
        self._answer = grpc.unary_unary_rpc_method_handler(answer)
        self._check = grpc.unary_unary_rpc_method_handler(_serving)

    def service(self, details: Any) -> Any:
        return self._check if details.method == HEALTH else self._answer


async def _serving(_: bytes, __: Any) -> bytes:
    return SERVING


def _slow(delay_ms: float) -> Answer:
    """As a model that takes so long, and no CPU."""

    async def answer(request: bytes, _: Any) -> bytes:
        await asyncio.sleep(delay_ms / 1000)
        return request

    return answer


def _proxy(nodes: list[str]) -> Answer:
    """Static round robin over `nodes`, and nothing else."""
    calls = [grpc.aio.insecure_channel(node, options=_SIZES).unary_unary(METHOD) for node in nodes]
    turns = itertools.cycle(calls)

    async def answer(request: bytes, _: Any) -> bytes:
        response: bytes = await next(turns)(request)
        return response

    return answer


async def _serve(arguments: list[str]) -> None:
    server = grpc.aio.server(options=_SIZES)
    kind, *rest = arguments
    answer = _slow(float(rest[0])) if kind == "slow" else _proxy(rest)
    server.add_generic_rpc_handlers((_Generic(answer),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"serving on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(sys.argv[1:]))
