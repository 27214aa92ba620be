"""The original's way to its nodes, as a plain proxy: one attempt, no look at health, and its weights.

Its nodes are chosen by smooth weighted round robin on effective weights, which a failure halves and a success brings
half the way back up to the node's weight. As published nothing ever sets a node's weight, so that it is 0, all current
weights stay equal, and the first node is always taken. What its text describes is a weight of 100.

Source: wuba/dl_inference, `TensorflowServingBlockingStub`, `TensorflowServingService` and `BlockingStubEntity`.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import uvloop

from bench.contract import MESSAGE_BYTES

_SIZES = [("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.max_send_message_length", MESSAGE_BYTES)]


class _Node:
    """Attributes:
    weight: the most that `effective` comes to.
    """

    def __init__(self, address: str, weight: int) -> None:
        self.channel = grpc.aio.insecure_channel(address, options=[*_SIZES, ("grpc.enable_http_proxy", 0)])
        self.weight = weight
        self.effective = weight
        self.current = 0

    def succeeded(self) -> None:
        self.effective += (self.weight - self.effective + 1) >> 1

    def failed(self) -> None:
        if self.effective != 1:
            self.effective >>= 1


class Proxy(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc is untyped
    """Every method, as bytes. Event loop only."""

    def __init__(self, addresses: list[str], weight: int, timeout_s: float) -> None:
        self.nodes = [_Node(address, weight) for address in addresses]
        self._timeout_s = timeout_s

    def service(self, details: Any) -> Any:
        method = details.method

        async def answer(request: bytes, context: Any) -> bytes:
            node = self.choose()
            try:
                answered: bytes = await node.channel.unary_unary(method)(request, timeout=self._timeout_s)
            except grpc.aio.AioRpcError as error:
                node.failed()
                await context.abort(error.code(), error.details())
                raise
            node.succeeded()
            return answered

        return grpc.unary_unary_rpc_method_handler(answer)

    def choose(self) -> _Node:
        """The next node: the first of those of the largest current weight."""
        for node in self.nodes:
            node.current += node.effective
        chosen = max(self.nodes, key=lambda node: node.current)
        chosen.current -= sum(node.effective for node in self.nodes)
        return chosen


async def _serve(weight: str, timeout_ms: str, *nodes: str) -> None:
    server = grpc.aio.server(options=_SIZES)
    server.add_generic_rpc_handlers((Proxy(list(nodes), int(weight), int(timeout_ms) / 1000),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"serving on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(*sys.argv[1:]))
