"""python serve.py native|grpcio echo|gateway PORT NODE_PORT: what `load.py` measures. Ends with its standard input."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence

from dl_inference_native import NativeTransport

from dl_inference_core.errors import Code
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.transport import Ended, Exchange, Limits, Method, Transport

PATH = "/inference.GRPCInferenceService/ModelInfer"


class Service:
    """Begins each exchange by a function."""

    def __init__(self, begin: Callable[[Exchange], object]) -> None:
        self.methods = {PATH: Method()}
        self.private_trailers = frozenset({"x-private"})
        self._begin = begin

    def begin_all(self, exchanges: Sequence[Exchange]) -> None:
        for exchange in exchanges:
            self._begin(exchange)

    def ended_all(self, ended: Sequence[tuple[Exchange, Code]]) -> None:
        pass


def done(ended: Sequence[Ended]) -> None:
    for _, error, _, _ in ended:
        if error is not None:
            print(error, file=sys.stderr)


async def main(name: str, role: str, port: str, node: str) -> None:
    kinds: dict[str, type[Transport]] = {"native": NativeTransport, "grpcio": GrpcioTransport}
    transport = kinds[name](kinds[name].Options())
    connection = transport.connect(f"127.0.0.1:{node}", Limits())
    if role == "echo":
        service = Service(lambda exchange: exchange.reply(exchange.message))
    else:
        service = Service(lambda exchange: exchange.forward(connection, PATH, done, timeout_s=10.0))
    server = await transport.serve(service, (f"127.0.0.1:{port}",), Limits())
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.drain(0)
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
